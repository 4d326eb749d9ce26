"""OpenAI's image API with OpenAI's own client, unchanged, and with plain requests."""

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest
from fakes import FakePipeline
from http_calls import EDITS, VARIATIONS, ask, client_of, form, get, names_of, opened, send, serving, typed
from img2img.v1 import asset_pb2
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api.http.fields import FIELDS
from img2img_server.api.http.openapi import document
from img2img_server.config import AssetSettings
from img2img_server.engine.request import RequestWarning
from img2img_server.support.model_fields import FieldRule
from messages import failure, png, request
from running import RunningServer
from soak_parts.stand_in import StandInPipeline, expected


class QuickPipeline(FakePipeline):
    """Edits in 4 steps, and has no strength."""

    fields = {"num_inference_steps": FieldRule(4.0)}


@pytest.fixture(scope="module")
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture(scope="module")
def server(pipeline: FakePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    pipelines = {"m": pipeline, "second": FakePipeline(), "drawn": StandInPipeline(0.0), "quick": QuickPipeline()}
    assets = AssetSettings(url=str(tmp_path_factory.mktemp("assets")))
    with serving(pipelines=pipelines, assets=assets) as made:
        yield made


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


@pytest.fixture
def native(server: RunningServer) -> Iterator[ImageToImageServiceStub]:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


def last(pipeline: FakePipeline) -> Any:
    """The request that the pipeline ran last."""
    return pipeline.prepared[-1].request


def test_every_field_of_an_edit_reaches_the_model(client: openai.OpenAI, pipeline: FakePipeline) -> None:
    result = client.images.edit(
        image=("photo.png", png()),
        prompt="a lake",
        model="m",
        n=2,
        size="16x8",  # OpenAI's sizes are others
        quality="high",
        output_format="jpeg",
        output_compression=50,
        response_format="b64_json",
        user="alice",
        background="opaque",
        extra_body={
            "negative_prompt": "fog", "strength": 0.5, "num_inference_steps": 10, "guidance_scale": 2.5, "seed": 7,
            "scheduler": "ddimscheduler",
        },
    )  # fmt: skip
    asked = last(pipeline)
    assert (asked.prompt, asked.negative_prompt, asked.scheduler, asked.image.size) == ("a lake", "fog", "DDIMScheduler", (16, 8))
    assert (asked.strength, asked.num_inference_steps, asked.guidance_scale, asked.seeds) == (0.5, 10, 2.5, (7, 8))
    assert result.data is not None
    assert [(opened(one.b64_json).format, opened(one.b64_json).size) for one in result.data] == [("JPEG", (16, 8))] * 2
    assert [one.model_extra for one in result.data] == [{"seed": seed, "width": 16, "height": 8} for seed in (7, 8)]
    assert (result.output_format, result.size, result.background) == ("jpeg", "16x8", "opaque")
    assert result.usage is not None
    assert result.usage.total_tokens == 0
    extra = result.model_extra or {}
    assert (extra["model"], extra["model_revision"], extra["engine"]) == ("m", "r1", "fake:cpu")
    assert extra["timings"].keys() == {"queue_ms", "encode_ms", "denoise_ms", "decode_ms", "total_ms"}


def test_edit_returns_the_same_image_as_grpc(client: openai.OpenAI, native: ImageToImageServiceStub) -> None:
    drawn = pb.ModelReference(path="drawn")
    same = native.Transform(request(model=drawn, prompt="a lake", seed=5, num_inference_steps=8)).images[0].data
    size: Any = "source"
    result = client.images.edit(
        image=png(), prompt="a lake", model="drawn", size=size, extra_body={"seed": 5, "num_inference_steps": 8}
    )
    assert result.data is not None
    assert result.data[0].b64_json is not None
    assert base64.b64decode(result.data[0].b64_json) == same
    assert (
        opened(result.data[0].b64_json).tobytes() == expected(opened(base64.b64encode(png()).decode()), "a lake", 5, 8).tobytes()
    )


def test_defaults_match_the_documentation(client: openai.OpenAI, pipeline: FakePipeline) -> None:
    result = client.images.edit(image=[png((40, 20))], prompt="a lake", model="m")  # sent as image[]
    asked = last(pipeline)
    assert (asked.strength, asked.num_inference_steps, asked.guidance_scale, len(asked.seeds)) == (0.8, 25, 7.5, 1)
    assert asked.image.size == (16, 8), "size auto: the source's aspect at the model's native area"
    assert result.output_format == "png"


@pytest.mark.parametrize(("quality", "steps"), [("low", 12), ("medium", 25), ("auto", 25), ("standard", 25), ("hd", 50)])
def test_quality_maps_to_a_step_count(client: openai.OpenAI, pipeline: FakePipeline, quality: Any, steps: int) -> None:
    client.images.edit(image=png(), prompt="a lake", model="m", quality=quality)
    assert last(pipeline).num_inference_steps == steps
    client.images.edit(image=png(), prompt="a lake", model="m", quality=quality, extra_body={"num_inference_steps": 3})
    assert last(pipeline).num_inference_steps == 3


def test_a_variation_needs_no_prompt(client: openai.OpenAI, pipeline: FakePipeline) -> None:
    with pytest.deprecated_call():  # by OpenAI
        result = client.images.create_variation(image=png(), model="m", n=2, response_format="b64_json", user="alice")
    asked = last(pipeline)
    assert (asked.prompt, asked.strength, asked.guidance_scale, len(asked.seeds)) == ("", 0.5, 1.0, 2)
    assert result.data is not None
    assert [opened(one.b64_json).format for one in result.data] == ["PNG", "PNG"]


def test_a_variation_may_have_settings_of_its_own(server: RunningServer, pipeline: FakePipeline) -> None:
    assert ask(server, VARIATIONS, ("model", "m"), ("prompt", "a lake"), ("strength", "0.25")).status == 200
    assert (last(pipeline).prompt, last(pipeline).strength, last(pipeline).guidance_scale) == ("a lake", 0.25, 7.5)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    listed = list(client.models.list())
    assert [(one.id, one.object, one.owned_by) for one in listed] == [
        (name, "model", "img2img") for name in ("drawn", "m", "quick", "second")
    ]
    found = client.models.retrieve("m")
    assert found == listed[1]
    extra = found.model_extra or {}
    assert (extra["state"], extra["is_default"], extra["engine"], extra["size_multiple"]) == ("ready", True, "fake:cpu", 8)
    assert extra["schedulers"] == ["EulerDiscreteScheduler", "DDIMScheduler"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert (caught.value.code, caught.value.param) == ("MODEL_NOT_FOUND", "model")


def test_stream_has_queue_progress_preview_and_result_events(client: openai.OpenAI, pipeline: FakePipeline) -> None:
    with client.images.edit(image=png(), prompt="a lake", model="m", stream=True, partial_images=3, n=2) as stream:
        events = list(stream)
        headers = stream.response.headers
    kinds = [str(event.type) for event in events]
    assert kinds[0] == "image_edit.queued"
    assert kinds.count("image_edit.started") == 1
    previews = [event for event in events if event.type == "image_edit.partial_image"]
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    assert [opened(event.b64_json).size for event in previews] == [(4, 4)] * 3
    assert kinds.count("image_edit.progress") + len(previews) == 20, "each step is reported once"
    done = [event for event in events if event.type == "image_edit.completed"]
    assert kinds[-2:] == ["image_edit.completed"] * 2
    assert [opened(event.b64_json).size for event in done] == [(16, 8)] * 2
    assert done[0].usage.total_tokens == 0
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-img2img-queue-position"] == "0"
    assert len(headers["x-request-id"]) == 32


@pytest.mark.parametrize(("steps", "wanted"), [(1, 3), (2, 3), (3, 2), (7, 3), (10, 4), (20, 1), (25, 0), (5, 100)])
def test_no_more_previews_than_requested(server: RunningServer, steps: int, wanted: int) -> None:
    fields = (("prompt", "a lake"), ("model", "m"), ("strength", "1"), ("num_inference_steps", str(steps)))
    answer = ask(server, EDITS, *fields, ("stream", "true"), ("partial_images", str(wanted)))
    names = names_of(answer.events)
    assert names.count("image_edit.partial_image") == min(wanted, steps - 1)
    assert names[-1] == "image_edit.completed"


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
def test_previews_are_spread_over_the_steps_that_the_model_runs(server: RunningServer, path: str) -> None:
    answer = ask(server, path, ("prompt", "a lake"), ("model", "quick"), ("stream", "true"), ("partial_images", "3"))
    assert [
        event["type"].removeprefix("image_edit.") for name, event in answer.events if "progress" in name or "partial" in name
    ] == (["partial_image"] * 3 + ["progress"]), "of the model's own 4 steps, without a strength"


def test_response_headers_have_queue_position_and_request_id(server: RunningServer) -> None:
    headers = {"x-request-id": "my-own-id"}
    answer = ask(server, EDITS, ("prompt", "a lake"), ("model", "m"), headers=headers)
    assert answer.headers["x-img2img-queue-position"] == "0"
    assert float(answer.headers["x-img2img-eta-ms"]) >= 0, "known once a request was measured"
    assert int(answer.headers["openai-processing-ms"]) >= 1
    assert answer.headers["x-request-id"] == "my-own-id"


def test_response_format_url_stores_the_image_as_an_asset(server: RunningServer, client: openai.OpenAI) -> None:
    result = client.images.edit(image=png(), prompt="a lake", model="drawn", response_format="url", extra_body={"seed": 3})
    assert result.data is not None
    (one,) = result.data
    assert one.b64_json is None
    assert one.url is not None
    assert one.url.startswith(client.base_url.copy_with(path="/v1/assets/").__str__())
    answer = get(server, one.url.partition(f":{client.base_url.port}")[2])
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    asset = (one.model_extra or {})["asset_id"]
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        chunks = [part.chunk for part in AssetServiceStub(channel).GetAsset(asset_pb2.GetAssetRequest(id=asset))]
    assert answer.body == b"".join(chunks)
    again = ask(server, EDITS, ("image", f"asset:{asset}"), ("prompt", "a lake"), ("model", "drawn"), ("seed", "3"), image=None)
    assert again.status == 200, "an asset is a source, too"
    assert get(server, "/v1/assets/" + "0" * 64).error["code"] == "ASSET_NOT_FOUND"
    assert get(server, "/v1/assets/nope").error["param"] == "id"


def test_the_source_may_be_an_address(server: RunningServer, pipeline: FakePipeline) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png((64, 64))).decode()
    fields = (("prompt", "a lake"), ("model", "m"), ("size", "source"))
    assert ask(server, EDITS, ("image", uri), *fields, image=None).status == 200
    assert last(pipeline).image.size == (64, 64)
    error = ask(server, EDITS, ("image", "https://example.com/a.png"), *fields, image=None).error
    assert (error["param"], error["code"]) == ("image", "INVALID_FIELD")


def test_warnings_are_returned(server: RunningServer, pipeline: FakePipeline) -> None:
    pipeline.warnings = (RequestWarning("prompt", "the end of the prompt is not read", "PROMPT_TRUNCATED"),)
    try:
        answer = ask(server, EDITS, ("prompt", "a lake"), ("model", "m"))
    finally:
        pipeline.warnings = ()
    assert [(one["field"], one["code"]) for one in answer.json["warnings"]] == [("prompt", "PROMPT_TRUNCATED")]


WRONG = [
    (("strength", "0"), "strength"),
    (("strength", "nan"), "strength"),
    (("strength", "1e999"), "strength"),
    (("num_inference_steps", "101"), "num_inference_steps"),
    (("num_inference_steps", "2.5"), "num_inference_steps"),
    (("num_inference_steps", "9" * 19), "num_inference_steps"),
    (("guidance_scale", "31"), "guidance_scale"),
    (("guidance_scale", "much"), "guidance_scale"),
    (("seed", "-2"), "seed"),
    (("seed", str(2**63)), "seed"),
    (("scheduler", "Nope"), "scheduler"),
    (("n", "9"), "n"),
    (("n", "0"), "n"),
    (("n", "one"), "n"),
    (("size", "16"), "size"),
    (("size", "0x16"), "size"),
    (("size", "99999x99999"), "size"),
    (("size", "1" * 19 + "x8"), "size"),
    (("quality", "best"), "quality"),
    (("output_format", "gif"), "output_format"),
    (("output_compression", "101"), "output_compression"),
    (("output_compression", "-1"), "output_compression"),
    (("response_format", "file"), "response_format"),
    (("stream", "maybe"), "stream"),
    (("partial_images", "101"), "partial_images"),
    (("background", "transparent"), "background"),
    (("negative_prompt", "x" * 4097), "negative_prompt"),
    (("image", png()), "image"),
    (("image[]", png()), "image"),
    (("mask", png()), "mask"),
    (("loras", "[]"), "loras"),
    (("fidelity", "best"), "fidelity"),
    (("fidelity", "200dB"), "fidelity"),
    (("controls", "canny"), "control_image"),
    (("control_image", png()), "controls"),  # not of this model
    (("controls", "canny:0.5,"), "controls"),
    (("controls", "[1"), "controls"),
    (("controls", '{"model": "canny"}'), "controls"),
    (("controls", "[1]"), "controls[0]"),
    (("controls", '[{"net": "canny"}]'), "controls[0].net"),
    (("controls", '[{"model": 1, "image": "asset:1"}]'), "controls[0].model"),
    (("controls", '[{"model": "canny", "image": ["asset:1"]}]'), "controls[0].image"),
    (("controls", '[{"model": "canny", "image": "asset:1", "scale": "much"}]'), "controls[0].scale"),
    (("controls", '[{"model": "canny", "image": "asset:1", "start": true}]'), "controls[0].start"),
    (("controls", '[{"model": "canny", "image": "asset:1", "start": 1}]'), "controls"),  # not of this model
    (("input_fidelity", "high"), "input_fidelity"),
    (("nonsense", "1"), "nonsense"),
    (("prompt", "another"), "prompt"),
]


@pytest.mark.parametrize(("field", "param"), WRONG, ids=[f"{field[0]}={str(field[1])[:12]}" for field, _ in WRONG])
def test_a_wrong_field_is_named(server: RunningServer, pipeline: FakePipeline, field: tuple[str, Any], param: str) -> None:
    done = len(pipeline.prepared)
    answer = ask(server, EDITS, ("prompt", "a lake"), ("model", "m"), field)
    error = answer.error
    assert (answer.status, error["type"], error["code"], error["param"]) == (400, "invalid_request_error", "INVALID_FIELD", param)
    assert error["message"].startswith(f"{param}: ")
    assert answer.headers["x-should-retry"] == "false"
    assert len(pipeline.prepared) == done, "nothing is computed for it"


def test_missing_required_fields_are_named(server: RunningServer) -> None:
    assert ask(server, EDITS, ("prompt", "a lake"), image=None).error["param"] == "image"
    assert ask(server, EDITS, image=png()).error["param"] == "prompt"
    assert ask(server, EDITS, ("prompt", "a lake"), image=b"no image").error["param"] == "image"
    text = form(("prompt", "a lake")).replace(b"a lake", b"\xff\xfe")
    assert send(server, "POST", EDITS, text, typed()).error["param"] == "prompt"


FAILURES = [
    ("fail denoise", 500, "MODEL_FAILED", "server_error"),
    ("full denoise", 429, "OUT_OF_MEMORY", "rate_limit_error"),
]


@pytest.mark.parametrize(("prompt", "status", "code", "kind"), FAILURES)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_failures_are_reported_once(server: RunningServer, prompt: str, status: int, code: str, kind: str, stream: str) -> None:
    answer = ask(server, EDITS, ("prompt", prompt), ("model", "m"), ("stream", stream))
    if stream == "true":
        name, data = answer.events[-1]
        assert (answer.status, name) == (200, "error")
        assert (data["error"]["code"], data["error"]["type"]) == (code, kind)
    else:
        assert (answer.status, answer.error["code"], answer.error["type"]) == (status, code, kind)
        assert answer.headers["x-should-retry"] == "false"


def test_a_failed_stream_raises_in_openais_client(client: openai.OpenAI) -> None:
    with (
        pytest.raises(openai.APIError) as caught,
        client.images.edit(image=png(), prompt="fail denoise", model="m", stream=True) as stream,
    ):
        list(stream)
    assert caught.value.code == "MODEL_FAILED"


def test_errors_match_grpcs(server: RunningServer, native: ImageToImageServiceStub) -> None:
    """The same request is refused in the same words by both fronts: there is one check of each field."""
    m = pb.ModelReference(path="m")
    for fields, message in [
        ({"strength": "2"}, request(model=m, strength=2)),
        ({"num_inference_steps": "0"}, request(model=m, num_inference_steps=0)),
        ({"scheduler": "no"}, request(model=m, scheduler="no")),
        ({"model": "nope"}, request(model=pb.ModelReference(path="nope"))),
    ]:
        answer = ask(server, EDITS, ("prompt", "a lake"), *{"model": "m", **fields}.items())
        _, found = failure(lambda message=message: native.Transform(message))  # type: ignore[misc]
        assert (answer.error["code"], answer.error["message"]) == (found["reason"], found["message"])


def test_unmeetable_deadline_is_refused(server: RunningServer) -> None:
    answer = ask(server, EDITS, ("prompt", "a lake"), ("model", "m"), headers={"x-request-timeout": "0.000001"})
    assert (answer.status, answer.error["type"]) == (504, "server_error")
    assert answer.error["code"] in ("DEADLINE_UNMEETABLE", "DEADLINE_EXPIRED")
    for wrong in ("0", "-1", "soon", "nan", "inf", ""):
        error = ask(server, EDITS, ("prompt", "a lake"), ("model", "m"), headers={"x-request-timeout": wrong}).error
        assert (error["param"], error["code"]) == ("x-request-timeout", "INVALID_FIELD")


def test_unknown_paths_methods_and_content_types_are_errors(server: RunningServer) -> None:
    assert get(server, "/health").json == {"status": "ok"}
    assert get(server, "/ready").json == {"status": "ready"}
    assert (get(server, "/v1/nope").status, get(server, "/v1/nope").error["code"]) == (404, "PATH_NOT_FOUND")
    answer = get(server, EDITS)
    assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "POST", "METHOD_NOT_ALLOWED")
    assert send(server, "HEAD", "/health", None, {}).status == 200
    answer = send(server, "POST", EDITS, b"{}", {"Content-Type": "application/json"})
    assert (answer.status, answer.error["code"]) == (400, "MALFORMED_MESSAGE")
    assert "multipart/form-data" in answer.error["message"]


def test_the_openapi_document_has_every_field_and_the_page_shows_it(server: RunningServer) -> None:
    found = get(server, "/openapi.json").json
    assert found == document()
    for path in (EDITS, VARIATIONS):
        schema = found["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert schema["properties"].keys() == {"image", "mask", "control_image", "prompt_image", *(one.name for one in FIELDS)}
    page = get(server, "/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = page.body.decode()
    assert all(f"<code>{one.name}</code>" in text for one in FIELDS)
    assert not re.search(r"(src|href)=\"?https?:", text), "it loads nothing from elsewhere"


async def test_the_asynchronous_client_works_too(server: RunningServer) -> None:
    assert server.server.http_port is not None
    base = f"http://localhost:{server.server.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        stream = await client.images.edit(image=io.BytesIO(png()), prompt="a lake", model="m", stream=True, partial_images=1)
        kinds = [str(event.type) async for event in stream]
    assert kinds[-1] == "image_edit.completed"
    assert kinds.count("image_edit.partial_image") == 1
