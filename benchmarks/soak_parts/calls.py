"""Calls of the server under test, and checks of its answers."""

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from img2img.v1 import asset_pb2, model_pb2
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from tritonclient.grpc import service_pb2 as kserve_pb  # type: ignore[import-untyped]
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub  # type: ignore[import-untyped]

from soak_parts.access import LOAD, Access
from soak_parts.images import TOLERANCE, difference
from soak_parts.ledger import Violated

PATIENCE = 300.0
"""Seconds after which a call without a short deadline counts as lost."""
_SLOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
"""Channel options of a reader whose flow-control window stays small."""
_FULL = ("QUEUE_FULL", "CLIENT_QUEUE_FULL", "MODEL_MEMORY_FULL", "ASSET_QUOTA_FULL")
_CHUNK = 64 * 2**10


class Connection:
    """A separate channel and its stubs."""

    def __init__(self, target: str, access: Access, tenant: str = LOAD, slow: bool = False) -> None:
        self.channel = access.channel(target, tenant, _SLOW if slow else ())
        self.images = ImageToImageServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.assets = AssetServiceStub(self.channel)
        self.kserve: Any = GRPCInferenceServiceStub(self.channel)

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()


def ending_of(error: Any) -> str:
    """The ending of a failed call (a grpc.aio.AioRpcError). Raises Violated for a status that no caller should get."""
    code, reasons, retries = error.code(), [], 0
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        reasons.append(_reason(detail))
        retries += detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    reason = next(filter(None, reasons), "")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and reason in _FULL:
        if not retries:
            raise Violated(f"{reason} without RetryInfo")
        return "refused"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "deadline"
    if code is grpc.StatusCode.INVALID_ARGUMENT and reason == "INVALID_FIELD":
        return "invalid"
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        return "disconnected"
    raise Violated(f"{code.name} {reason}: {error.details()}")


def _reason(detail: AnyMessage) -> str:
    info = error_details_pb2.ErrorInfo()
    return str(info.reason) if detail.Unpack(info) else ""


def check_images(response: pb.TransformResponse, references: Sequence[bytes]) -> None:
    """Raises Violated if the images differ from the references."""
    if len(response.images) != len(references):
        raise Violated(f"{len(response.images)} images instead of {len(references)}")
    for image, reference in zip(response.images, references, strict=True):
        off = difference(image.data, reference)
        if off > TOLERANCE:
            raise Violated(f"an image differs by {off} of 255")


async def follow(
    events: AsyncIterable[pb.TransformStreamResponse], pause: float = 0.0, started: asyncio.Event | None = None
) -> pb.TransformResponse:
    """The result of a stream. Raises Violated if its events are out of order. Pauses for `pause` seconds after each event."""
    completed: pb.TransformResponse | None = None
    seen, step = "", 0
    async for event in events:
        kind = event.WhichOneof("event") or ""
        if completed is not None:
            raise Violated(f"{kind} after completed")
        if kind == "progress":
            step += 1
            if event.progress.step != step:
                raise Violated(f"step {event.progress.step} instead of {step}")
        if kind not in {"": ("queued",), "queued": ("queued", "started"), "started": ("progress",)}.get(
            seen, ("progress", "completed")
        ):
            raise Violated(f"{kind} after {seen or 'nothing'}")
        seen = kind
        if started is not None:
            started.set()
        if kind == "completed":
            completed = event.completed
        await asyncio.sleep(pause)
    if completed is None:
        raise Violated(f"the stream ended with OK after {seen or 'nothing'}, without a result")
    return completed


async def upload(connection: Connection, data: bytes) -> str:
    """Uploads an image and returns its id."""

    async def messages() -> AsyncIterator[asset_pb2.UploadAssetRequest]:
        info = asset_pb2.UploadAssetInfo(media_type="image/png", size=len(data), sha256=hashlib.sha256(data).hexdigest())
        yield asset_pb2.UploadAssetRequest(info=info)
        for start in range(0, len(data), _CHUNK):
            yield asset_pb2.UploadAssetRequest(chunk=data[start : start + _CHUNK])

    response = await connection.assets.UploadAsset(messages(), timeout=PATIENCE)
    asset: asset_pb2.Asset = response.asset
    if asset.sha256 != hashlib.sha256(data).hexdigest() or asset.size != len(data):
        raise Violated("an uploaded asset has another size or SHA-256")
    return asset.id


async def download(connection: Connection, asset_id: str, pause: float = 0.0) -> bytes:
    """Downloads an image and checks its hash."""
    data, info = b"", asset_pb2.Asset()
    async for message in connection.assets.GetAsset(asset_pb2.GetAssetRequest(id=asset_id), timeout=PATIENCE):
        if message.HasField("asset"):
            info = message.asset
        data += message.chunk
        await asyncio.sleep(pause)
    if hashlib.sha256(data).hexdigest() != info.sha256 or len(data) != info.size:
        raise Violated("the SHA-256 or size of a downloaded asset does not match")
    return data


async def unload(connection: Connection, name: str) -> int:
    """Unloads a model. Returns the freed bytes."""
    response = await connection.models.UnloadModel(model_pb2.UnloadModelRequest(id=name), timeout=PATIENCE)
    return int(response.freed_bytes)


async def infer(connection: Connection, model: str, request: pb.TransformRequest) -> pb.TransformResponse:
    """Sends the same transform by KServe's ModelInfer."""
    message = kserve_pb.ModelInferRequest(model_name=model)
    message.inputs.add(name="image", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(len(request.image.data).to_bytes(4, "little") + request.image.data)
    for name in ("prompt", "seed", "num_inference_steps", "strength", "guidance_scale", "image_count"):
        value = getattr(request, name)
        kind = {str: "string_param", int: "int64_param", float: "double_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    answer = await connection.kserve.ModelInfer(message, timeout=PATIENCE)
    names = [output.name for output in answer.outputs]
    data, images = answer.raw_output_contents[names.index("images")], []
    while data:
        size = int.from_bytes(data[:4], "little")
        images.append(pb.ImageResult(data=data[4 : 4 + size]))
        data = data[4 + size :]
    return pb.TransformResponse(images=images)
