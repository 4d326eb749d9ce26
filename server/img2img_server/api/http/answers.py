"""Results and events of img2img.v1 as OpenAI's JSON."""

import base64
import json
import time
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server.api.http.exchange import event

NO_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's clients expect this object. This server does not count tokens."""
_TIMINGS = tuple(field.name for field in pb.Timings.DESCRIPTOR.fields)


def images(result: pb.TransformResponse, base: str) -> bytes:
    """The response body of a finished request. `base` is this server's address, for the URLs of assets."""
    data = b",".join(_with_image(image, _about(image), base) for image in result.images)
    return b'{"data":[%s],%s' % (data, _dumped({"created": int(time.time()), **_facts(result)})[1:])


def completed(result: pb.TransformResponse, base: str) -> list[bytes]:
    """The last events of a stream: one for each image."""
    name, facts = "image_edit.completed", {"created_at": int(time.time()), **_facts(result)}
    return [
        event(name, _with_image(image, {"type": name, "index": index, **_about(image), **facts}, base))
        for index, image in enumerate(result.images)
    ]


def progress(happened: pb.TransformStreamResponse, index: int) -> bytes:
    """The event of a request in progress. `index` is the number of previews sent before."""
    kind = happened.WhichOneof("event")
    if kind == "progress" and happened.progress.HasField("preview"):
        return _partial(happened.progress, index)
    name = f"image_edit.{kind}"
    about: dict[str, Any] = {"type": name}
    value = getattr(happened, str(kind))
    for field in value.DESCRIPTOR.fields:
        if not field.has_presence or value.HasField(field.name):
            about[field.name] = getattr(value, field.name)
    return event(name, _dumped(about))


def queue_headers(position: int, eta: float | None) -> dict[str, str]:
    """Headers with the queue position of an accepted request and its estimated milliseconds."""
    headers = {"x-img2img-queue-position": str(position)}
    if eta is not None:
        headers["x-img2img-eta-ms"] = str(round(eta * 1000))
    return headers


def size_of(result: pb.TransformResponse) -> int:
    """The size of a response's images in bytes."""
    return sum(len(image.data) for image in result.images)


def _partial(progress: pb.Progress, index: int) -> bytes:
    name = "image_edit.partial_image"
    about = {
        "type": name,
        "partial_image_index": index,
        "created_at": int(time.time()),
        "output_format": "jpeg",
        "background": "opaque",
        "step": progress.step,
        "step_count": progress.step_count,
    }
    return event(name, b'{"b64_json":"%s",%s' % (base64.b64encode(progress.preview), _dumped(about)[1:]))


def _about(image: pb.ImageResult) -> dict[str, Any]:
    return {"seed": image.seed, "width": image.width, "height": image.height}


def _facts(result: pb.TransformResponse) -> dict[str, Any]:
    """The properties that all images share."""
    first = result.images[0]
    facts: dict[str, Any] = {
        "background": "opaque",
        "output_format": pb.OutputFormat.Name(first.format).removeprefix("OUTPUT_FORMAT_").lower(),
        "size": f"{first.width}x{first.height}",
        "usage": NO_USAGE,
        "model": result.model_id,
        "model_revision": result.model_revision,
        "engine": result.engine,
        "timings": {name: round(getattr(result.timings, name), 3) for name in _TIMINGS},
    }
    if result.HasField("speedup"):
        used = result.speedup
        facts["speedup"] = {field.name: getattr(used, field.name) for field in used.DESCRIPTOR.fields}
    if result.warnings:
        facts["warnings"] = [{"field": one.field, "code": one.code, "description": one.description} for one in result.warnings]
    return facts


def _with_image(image: pb.ImageResult, about: dict[str, Any], base: str) -> bytes:
    """A JSON object with an image. The image bypasses the JSON encoder, which would double the time."""
    rest = _dumped(about)[1:]
    if image.WhichOneof("content") == "asset_id":
        return b'{"url":%s,"asset_id":%s,%s' % (_dumped(f"{base}/v1/assets/{image.asset_id}"), _dumped(image.asset_id), rest)
    return b'{"b64_json":"%s",%s' % (base64.b64encode(image.data), rest)


def _dumped(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
