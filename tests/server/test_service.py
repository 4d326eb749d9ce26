"""The service over a real channel and a fake pipeline: the engine gets the requested values, and errors name wrong fields."""

import base64
import io
import math
import threading
from collections.abc import Iterator

import grpc
import pytest
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2, model_pb2_grpc
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.config import DEFAULT_PROMPT
from img2img_server.engine.request import RequestWarning
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.images import ImageLimits
from img2img_server.models.registry import Model, ModelRegistry
from messages import failure, png, request
from PIL import Image
from running import running, store

LIMITS = ImageLimits(max_bytes=100_000, max_source_pixels=100_000, max_pixels=64 * 64)


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def channel(pipeline: FakePipeline) -> Iterator[grpc.Channel]:
    load = lambda: store(m=pipeline, other=FakePipeline())  # noqa: E731
    limits = QueueLimits(max_active=1, max_waiting=1)
    with (
        running(load, image_limits=LIMITS, limits=limits) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> ImageToImageServiceStub:
    return ImageToImageServiceStub(channel)


def test_unset_fields_take_their_defaults(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    response = stub.Transform(pb.TransformRequest(image=pb.ImageSource(data=png())))
    (state,) = pipeline.prepared
    asked = state.request
    assert (asked.prompt, asked.negative_prompt) == (DEFAULT_PROMPT, None)
    assert (asked.strength, asked.num_inference_steps, asked.guidance_scale) == (0.8, 25, 7.5)
    assert asked.image.size == (24, 16)
    assert response.images[0].seed == asked.seeds[0] >= 0
    assert (response.images[0].width, response.images[0].height) == (24, 16)
    assert (response.model_id, response.model_revision, response.engine) == ("m", "r1", "fake:cpu")
    assert response.timings.total_ms > 0


def test_fields_set_to_zero_are_kept(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    stub.Transform(
        request(
            prompt="", negative_prompt="", strength=0.7, num_inference_steps=10, guidance_scale=0.0, seed=0, image_count=3,
            width=33, height=16, model=pb.ModelReference(path="m"),
        )
    )  # fmt: skip
    asked = pipeline.prepared[0].request
    assert (asked.prompt, asked.negative_prompt, asked.guidance_scale) == ("", "", 0.0)
    assert asked.seeds == (0, 1, 2)
    assert asked.image.size == (32, 16)
    # int(10 * 0.7) is 7 as diffusers counts, and would be 6 had strength travelled as a float of 32 bits.
    assert pipeline.prepared[0].step_count == 7


@pytest.mark.parametrize(("asked", "format_"), [(0, "PNG"), (1, "PNG"), (2, "JPEG"), (3, "WEBP")])
def test_results_are_in_the_requested_format(stub: ImageToImageServiceStub, asked: int, format_: str) -> None:
    output = pb.OutputOptions(format=asked, quality=50)  # type: ignore[arg-type]
    response = stub.Transform(request(output=output))
    assert Image.open(io.BytesIO(response.images[0].data)).format == format_
    assert pb.OutputFormat.Name(response.images[0].format) == f"OUTPUT_FORMAT_{format_}"


def test_a_data_uri_is_a_source(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png((8, 32))).decode()
    stub.Transform(request(image=pb.ImageSource(uri=uri)))
    assert pipeline.prepared[0].request.image.size == (8, 32)


def test_stream_sends_each_event_once_and_in_order(stub: ImageToImageServiceStub) -> None:
    events = list(stub.TransformStream(pb.TransformStreamRequest(request=request(num_inference_steps=5, strength=1.0))))
    assert [event.WhichOneof("event") for event in events] == ["queued", "started", *["progress"] * 5, "completed"]
    assert events[0].queued.position == 0
    assert (events[1].started.seed, events[1].started.engine) == (5, "fake:cpu")
    assert [(event.progress.step, event.progress.step_count) for event in events[2:7]] == [(step, 5) for step in range(1, 6)]
    assert events[-1].completed.images[0].seed == 5


def test_random_seeds_differ(stub: ImageToImageServiceStub) -> None:
    seeds = {stub.Transform(request(seed=-1)).images[0].seed for _ in range(5)}
    assert len(seeds) == 5


NATIVE = pb.Fit(native_area=pb.NativeArea())
BAD: dict[str, tuple[dict[str, object], str]] = {
    "no image": ({"image": None}, "image"),
    "an empty source": ({"image": pb.ImageSource()}, "image"),
    "an empty image": ({"image": pb.ImageSource(data=b"")}, "image.data"),
    "an undecodable image": ({"image": pb.ImageSource(data=b"not an image")}, "image.data"),
    "a truncated image": ({"image": pb.ImageSource(data=png()[:60])}, "image.data"),
    "an image of too many bytes": ({"image": pb.ImageSource(data=bytes(100_001))}, "image.data"),
    "an image of too many pixels": ({"image": pb.ImageSource(data=png((500, 500)))}, "image.data"),
    "a result of too many pixels": ({"image": pb.ImageSource(data=png((128, 128)))}, "image"),
    "too many pixels of a result, by the header of a damaged image": (
        {"image": pb.ImageSource(data=png((128, 128))[:60])},
        "image",
    ),
    "an image smaller than the multiple": ({"image": pb.ImageSource(data=png((4, 4)))}, "image"),
    "an undecodable uri": ({"image": pb.ImageSource(uri="data:image/png;base64,%%%")}, "image.uri"),
    "no image in a uri": ({"image": pb.ImageSource(uri="data:,hello")}, "image.uri"),
    "an http uri": ({"image": pb.ImageSource(uri="http://localhost/a.png")}, "image.uri"),
    "a file uri": ({"image": pb.ImageSource(uri="file:///etc/passwd")}, "image.uri"),
    "a prompt of a book's length": ({"prompt": "a" * 4097}, "prompt"),
    "a negative prompt of a book's length": ({"negative_prompt": "a" * 4097}, "negative_prompt"),
    "strength 0": ({"strength": 0.0}, "strength"),
    "strength above 1": ({"strength": 1.01}, "strength"),
    "strength below 0": ({"strength": -0.5}, "strength"),
    "strength NaN": ({"strength": math.nan}, "strength"),
    "strength infinite": ({"strength": math.inf}, "strength"),
    "less than one step": ({"strength": 0.1, "num_inference_steps": 9}, "strength"),
    "zero steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "too many steps": ({"num_inference_steps": 101}, "num_inference_steps"),
    "guidance below 0": ({"guidance_scale": -0.1}, "guidance_scale"),
    "guidance above 30": ({"guidance_scale": 30.5}, "guidance_scale"),
    "guidance NaN": ({"guidance_scale": math.nan}, "guidance_scale"),
    "a seed below -1": ({"seed": -2}, "seed"),
    "seeds beyond 64 bits": ({"seed": 2**63 - 1, "image_count": 2}, "seed"),
    "no images": ({"image_count": 0}, "image_count"),
    "too many images": ({"image_count": 9}, "image_count"),
    "an unknown format": ({"output": pb.OutputOptions(format=99)}, "output.format"),  # type: ignore[arg-type]
    "quality 0": ({"output": pb.OutputOptions(quality=0)}, "output.quality"),
    "quality above 100": ({"output": pb.OutputOptions(quality=101)}, "output.quality"),
    "a width of 0": ({"width": 0}, "width"),
    "a negative height": ({"height": -64}, "height"),
    "a huge width": ({"width": 2**30}, "width"),
    "an unknown level": ({"fidelity": pb.Fidelity(level=99)}, "fidelity.level"),  # type: ignore[arg-type]
    "a negative level": ({"fidelity": pb.Fidelity(level=-1)}, "fidelity.level"),  # type: ignore[arg-type]
    "a PSNR below 0": ({"fidelity": pb.Fidelity(min_psnr_db=-0.1)}, "fidelity.min_psnr_db"),
    "a PSNR above 100": ({"fidelity": pb.Fidelity(min_psnr_db=100.5)}, "fidelity.min_psnr_db"),
    "a PSNR of NaN": ({"fidelity": pb.Fidelity(min_psnr_db=math.nan)}, "fidelity.min_psnr_db"),
    "an SSIM below 0": ({"fidelity": pb.Fidelity(min_ssim=-0.1)}, "fidelity.min_ssim"),
    "an SSIM above 1": ({"fidelity": pb.Fidelity(min_ssim=1.01)}, "fidelity.min_ssim"),
    "fit without a rule": ({"fit": pb.Fit()}, "fit"),
    "fit beside a width": ({"fit": NATIVE, "width": 16}, "fit"),
    "fit beside a height": ({"fit": pb.Fit(longest_side=16), "height": 16}, "fit"),
    "a longest side of 0": ({"fit": pb.Fit(longest_side=0)}, "fit.longest_side"),
    "a negative longest side": ({"fit": pb.Fit(longest_side=-64)}, "fit.longest_side"),
    "a longest side below the model's multiple": ({"fit": pb.Fit(longest_side=7)}, "fit.longest_side"),
    "a huge longest side": ({"fit": pb.Fit(longest_side=2**31 - 1)}, "fit.longest_side"),
    "a longest side that makes too many pixels": ({"fit": pb.Fit(longest_side=128)}, "fit.longest_side"),
    "an unknown scheduler": ({"scheduler": "EulerDiscrete"}, "scheduler"),
    "previews before the first step": ({"preview_interval": -1}, "preview_interval"),
    "a preview after more steps than there may be": ({"preview_interval": 101}, "preview_interval"),
    "an ambiguous model": ({"model": pb.ModelReference(revision="r1")}, "model"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_its_field(stub: ImageToImageServiceStub, pipeline: FakePipeline, name: str, streamed: bool) -> None:
    fields, field = BAD[name]
    asked = request(**fields)
    call = (lambda: list(stub.TransformStream(pb.TransformStreamRequest(request=asked)))) if streamed else lambda: stub.Transform(asked)  # fmt: skip  # noqa: E501
    code, details = failure(call)
    assert (code, details["field"], details["reason"]) == (grpc.StatusCode.INVALID_ARGUMENT, field, "INVALID_FIELD")
    assert details["message"] == f"{field}: {details['description']}"
    assert pipeline.prepared == [], "nothing computes for a wrong request"


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [((300, 200), NATIVE, (16, 8)), ((4, 4), NATIVE, (16, 16)), ((300, 200), pb.Fit(longest_side=64), (64, 40)),
     ((20, 30), pb.Fit(longest_side=64), (40, 64))],
)  # fmt: skip
def test_source_is_fitted_by_the_requested_rule(
    stub: ImageToImageServiceStub, pipeline: FakePipeline, size: tuple[int, int], fit: pb.Fit, expected: tuple[int, int]
) -> None:
    response = stub.Transform(request(image=pb.ImageSource(data=png(size)), fit=fit))
    assert pipeline.prepared[0].request.image.size == expected
    assert (response.images[0].width, response.images[0].height) == expected


def test_oversized_image_error_suggests_fit(stub: ImageToImageServiceStub) -> None:
    code, details = failure(lambda: stub.Transform(request(image=pb.ImageSource(data=png((300, 200))))))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "image")
    assert "set fit" in str(details["description"])


WARNING = RequestWarning("prompt", "it was too long", "PROMPT_TRUNCATED")


@pytest.mark.parametrize("streamed", [False, True])
def test_warnings_are_returned_with_the_result(stub: ImageToImageServiceStub, pipeline: FakePipeline, streamed: bool) -> None:
    def run() -> pb.TransformResponse:
        if not streamed:
            return stub.Transform(request())
        *_, last = stub.TransformStream(pb.TransformStreamRequest(request=request()))
        return last.completed

    assert list(run().warnings) == []
    pipeline.warnings = (WARNING,)
    (warning,) = run().warnings
    assert (warning.field, warning.description, warning.code) == ("prompt", "it was too long", "PROMPT_TRUNCATED")


@pytest.mark.parametrize(
    ("size", "asked"), [((64, 64), {"width": 16384, "height": 8}), ((16384, 8), {}), ((8, 16384), {}), ((8, 65504), {})]
)
def test_result_too_large_for_its_format_is_refused_before_generation(size: tuple[int, int], asked: dict[str, int]) -> None:
    pipeline = FakePipeline()
    format_ = pb.OUTPUT_FORMAT_JPEG if max(size) > 65500 else pb.OUTPUT_FORMAT_WEBP
    with running(lambda: store(m=pipeline)) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        wrong = request(image=pb.ImageSource(data=png(size)), output=pb.OutputOptions(format=format_), **asked)
        code, details = failure(lambda: stub.Transform(wrong))
        assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "output.format")
        assert pipeline.prepared == []
        right = request(image=pb.ImageSource(data=png(size)), preview_interval=1, **asked)
        events = list(stub.TransformStream(pb.TransformStreamRequest(request=right)))
        previews = [event.progress.HasField("preview") for event in events if event.HasField("progress")]
        assert any(previews) == (max(size) <= 65500), "a preview is a JPEG"
        assert events[-1].HasField("completed")


@pytest.mark.parametrize(("seed", "count"), [(2**63 - 1, 2), (2**63 - 7, 8)])
def test_seed_too_large_for_image_count_names_both_fields(stub: ImageToImageServiceStub, seed: int, count: int) -> None:
    _, details = failure(lambda: stub.Transform(request(seed=seed, image_count=count)))
    description = str(details["description"])
    assert str(seed) in description
    assert f"image_count {count}" in description
    assert f"the maximum seed is {2**63 - count}" in description
    stub.Transform(request(seed=2**63 - count, image_count=count))


@pytest.mark.parametrize(
    "reference",
    [{"path": "nope"}, {"repo_id": "acme/nope"}, {"path": "m", "revision": "r2"}, {"path": "m", "variant": "bf16"},
     {"path": "../m"}, {"path": "m", "allow_patterns": ["*.bin"]}, {"path": "m", "ignore_patterns": ["*.txt"]}],
)  # fmt: skip
def test_unknown_model_error_lists_the_available_models(stub: ImageToImageServiceStub, reference: dict[str, str]) -> None:
    code, details = failure(lambda: stub.Transform(request(model=pb.ModelReference(**reference))))
    assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "available: m, other" in str(details["message"])


@pytest.mark.parametrize(
    "reference",
    [{}, {"path": "m"}, {"repo_id": "acme/m"}, {"repo_id": "acme/m", "revision": "r1", "variant": "fp16"},
     {"path": "m", "allow_patterns": ["*.json"]}],
)  # fmt: skip
def test_matching_model_reference_finds_the_model(stub: ImageToImageServiceStub, reference: dict[str, str]) -> None:
    assert stub.Transform(request(model=pb.ModelReference(**reference))).model_id == "m"


def test_several_models_without_default_need_a_name() -> None:
    load = lambda: store(a=FakePipeline(), b=FakePipeline())  # noqa: E731
    with running(load) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        code, details = failure(lambda: ImageToImageServiceStub(channel).Transform(request()))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "model")


def test_failed_model_is_listed_but_refused() -> None:
    load = lambda: ModelRegistry([Model("broken", problem="checksums"), *store(m=FakePipeline())], "m")  # noqa: E731
    with running(load) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        listed = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
        asked = request(model=pb.ModelReference(path="broken"))
        code, details = failure(lambda: ImageToImageServiceStub(channel).Transform(asked))
    assert [(model.id, model.state) for model in listed] == [("broken", model_pb2.MODEL_STATE_FAILED), ("m", 3)]
    assert (code, details["reason"]) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNAVAILABLE")


def test_models_are_listed_and_described(channel: grpc.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    listed = stub.ListModels(model_pb2.ListModelsRequest()).models
    assert [model.id for model in listed] == ["m", "other"]
    described = stub.GetModel(model_pb2.GetModelRequest(id="m")).model
    assert described == listed[0]
    assert (described.source.repo_id, described.engine, described.is_default) == ("acme/m", "fake:cpu", True)
    assert described.schedulers == ["EulerDiscreteScheduler", "DDIMScheduler"]
    code, _ = failure(lambda: stub.GetModel(model_pb2.GetModelRequest(id="nope")))
    assert code == grpc.StatusCode.NOT_FOUND


def test_model_failure_reveals_no_internal_message(stub: ImageToImageServiceStub, caplog: pytest.LogCaptureFixture) -> None:
    code, details = failure(lambda: stub.Transform(request(prompt="fail denoise")))
    assert (code, details["reason"]) == (grpc.StatusCode.INTERNAL, "MODEL_FAILED")
    assert "told to fail" not in str(details["message"])
    assert "told to fail" in caplog.text, "the operator sees the cause"


def test_cancelled_stream_frees_the_device(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    asked = pb.TransformStreamRequest(request=request(num_inference_steps=100, strength=1.0))
    go, called = threading.Event(), threading.Event()

    def wait() -> None:
        called.set()
        assert go.wait(120)

    pipeline.before_call = wait
    call = stub.TransformStream(asked)
    assert called.wait(120)
    call.cancel()
    # Another request is served only after the first has left: there is one place. Once it is queued, the server has seen
    # the cancellation, which was sent before it.
    following = stub.TransformStream(pb.TransformStreamRequest(request=request(num_inference_steps=1, strength=1.0)))
    assert next(following).WhichOneof("event") == "queued"
    go.set()
    assert list(following)[-1].WhichOneof("event") == "completed"
    assert [state.request.num_inference_steps for state in pipeline.released] == [100, 1]
    assert pipeline.released[0].step < 100


def test_deadline_cancels_the_request(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    go = threading.Event()
    pipeline.before_call = lambda: go.wait(120)
    code, _ = failure(lambda: stub.Transform(request(num_inference_steps=100, strength=1.0), timeout=0.3))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    go.set()
    stub.Transform(request(num_inference_steps=1, strength=1.0))
    assert pipeline.released[0].step < 100


def test_queue_full_is_immediate_and_has_a_retry_delay(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    go, called = threading.Event(), threading.Event()

    def wait() -> None:
        called.set()
        assert go.wait(120)

    pipeline.before_call = wait
    running_call = stub.Transform.future(request())
    assert called.wait(120)
    waiting = stub.TransformStream(pb.TransformStreamRequest(request=request()))
    assert next(waiting).queued.position == 0
    code, details = failure(lambda: stub.Transform(request()))
    assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert float(str(details["retry"])) >= 1
    go.set()
    assert running_call.result(120).images
    assert list(waiting)[-1].WhichOneof("event") == "completed"
