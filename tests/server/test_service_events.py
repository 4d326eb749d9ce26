"""Schedulers, previews and estimates through the service: the request, the engine's events and their order."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from google.rpc import error_details_pb2
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api.interceptors import to_status
from img2img_server.api.transform import ImageToImageService
from img2img_server.codecs.jobs import digest_of
from img2img_server.codecs.pool import Codecs, ImageMemory
from img2img_server.engine.admission import Slot
from img2img_server.engine.engine import Accepted
from img2img_server.engine.request import Completed, Event, Listener, Progress, Queued, Request, Started, Timings
from img2img_server.errors import DeadlineUnmeetable, ServerError
from kept_processes import KeptProcess
from messages import failure, request
from PIL import Image
from running import make_service, running, store


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def stub(pipeline: FakePipeline) -> Iterator[ImageToImageServiceStub]:
    with running(lambda: store(m=pipeline)) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        yield ImageToImageServiceStub(channel)


@pytest.fixture
async def codecs() -> AsyncIterator[Codecs]:
    made = Codecs(2, 2, ImageMemory(2**30), KeptProcess)
    await made.start()
    yield made
    await made.close()


def stream(stub: ImageToImageServiceStub, **fields: Any) -> list[pb.TransformStreamResponse]:
    return list(stub.TransformStream(pb.TransformStreamRequest(request=request(**fields))))


def file_of(image: Image.Image, image_format: str) -> pb.ImageSource:
    file = io.BytesIO()
    image.save(file, image_format)
    return pb.ImageSource(data=file.getvalue())


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, None), ("", None), ("DDIMScheduler", "DDIMScheduler"), ("eulerdiscretescheduler", "EulerDiscreteScheduler")],
)
def test_scheduler_names_are_normalized(
    stub: ImageToImageServiceStub, pipeline: FakePipeline, asked: str | None, given: str | None
) -> None:
    stub.Transform(request(scheduler=asked))
    assert pipeline.prepared[0].request.scheduler == given


def test_unknown_scheduler_error_lists_the_known_ones(
    stub: ImageToImageServiceStub, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, details = failure(lambda: stub.Transform(request(scheduler="LCM")))
    assert "known are EulerDiscreteScheduler, DDIMScheduler" in str(details["description"])
    monkeypatch.setattr(pipeline, "schedulers", ())
    _, details = failure(lambda: stub.Transform(request(scheduler="LCM")))
    assert "only its own" in str(details["description"])


def test_previews_are_sent_at_the_requested_steps(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    events = stream(stub, num_inference_steps=5, strength=1.0, preview_interval=2)
    steps = [event.progress for event in events if event.HasField("progress")]
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    shown = [step for step in steps if step.HasField("preview")]
    assert [step.step for step in shown] == [2, 4]
    with Image.open(io.BytesIO(shown[0].preview)) as preview:
        assert (preview.format, preview.mode, preview.size) == ("JPEG", "RGB", (4, 4))
    assert len(pipeline.previewed) == 2


def test_previews_are_made_only_for_clients_that_request_them(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    assert not any(event.progress.preview for event in stream(stub))
    assert not any(event.progress.preview for event in stream(stub, preview_interval=0))
    stub.Transform(request(preview_interval=1))
    assert pipeline.prepared[-1].request.preview_interval == 0
    assert pipeline.previewed == []


def test_image_digest_does_not_depend_on_the_file_format(stub: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    changed = image.copy()
    changed.putpixel((3, 5), (1, 2, 3))
    sources = [file_of(image, "PNG"), file_of(image, "BMP"), file_of(changed, "PNG"), file_of(image.rotate(180), "PNG")]
    for source in sources:
        stub.Transform(request(image=source))
    stub.Transform(request(image=sources[0], width=16))
    first, same, *others = [state.request.image_digest for state in pipeline.prepared]
    assert len(first) == 16
    assert first == same
    assert len({first, *others}) == 4


def test_images_of_other_sizes_have_other_digests() -> None:
    assert digest_of((8, 4), bytes(96)) != digest_of((4, 8), bytes(96))


class ScriptedEngine:
    """Accepts every request and sends it the events of `script` at once, or raises the given error."""

    def __init__(self, *script: Event, error: ServerError | None = None) -> None:
        self.script, self.error = script, error
        self.cancelled = asyncio.Event()

    def clock(self) -> float:
        return 0.0

    def reserve(self, client: str) -> AbstractContextManager[Slot]:
        return nullcontext(Slot(client))

    def submit(self, request: Request, listener: Listener, place: Slot) -> Accepted:
        if self.error is not None:
            raise self.error
        for event in self.script:
            listener(event)
        ticket: Any = SimpleNamespace(cancel=self.cancelled.set)
        return Accepted(ticket, 3, 9.0)


def served_by(engine: ScriptedEngine, codecs: Codecs) -> ImageToImageService:
    anything: Any = engine
    return make_service(store(m=FakePipeline()), anything, codecs)


async def test_events_are_sent_in_order(codecs: Codecs) -> None:
    large, small = Image.effect_noise((512, 512), 80).convert("RGB"), Image.new("RGB", (4, 4), "teal")
    engine = ScriptedEngine(
        Queued(2, 8.0),
        Queued(1, None),
        Started(3),
        Progress(1, 3, 4.0, large),
        Progress(2, 3, 2.5),
        Progress(3, 3, None, small),
        Completed((small,), Timings(1, 2, 3, 4)),
    )
    asked = pb.TransformStreamRequest(request=request(preview_interval=2))
    context = SimpleNamespace(time_remaining=lambda: None)
    told = [event async for event in served_by(engine, codecs).TransformStream(asked, context)]
    assert [event.WhichOneof("event") for event in told] == [*["queued"] * 3, "started", *["progress"] * 3, "completed"]
    queued, steps = [event.queued for event in told[:3]], [event.progress for event in told[4:7]]
    assert [(place.position, place.eta_seconds) for place in queued] == [(3, 9.0), (2, 8.0), (1, 0.0)]
    assert [place.HasField("eta_seconds") for place in queued] == [True, True, False]
    assert [(step.step, step.eta_seconds) for step in steps] == [(1, 4.0), (2, 2.5), (3, 0.0)]
    assert [step.HasField("eta_seconds") for step in steps] == [True, True, False]
    sizes = [Image.open(io.BytesIO(step.preview)).size if step.HasField("preview") else None for step in steps]
    assert sizes == [(512, 512), None, (4, 4)]
    assert engine.cancelled.is_set()


@pytest.mark.parametrize("streamed", [False, True])
async def test_refused_request_raises_the_engines_error(codecs: Codecs, streamed: bool) -> None:
    service = served_by(ScriptedEngine(error=DeadlineUnmeetable("too late", 12.5)), codecs)
    context = SimpleNamespace(time_remaining=lambda: 1.0)
    asked = pb.TransformStreamRequest(request=request())
    call = anext(service.TransformStream(asked, context)) if streamed else service.Transform(request(), context)
    with pytest.raises(DeadlineUnmeetable):
        await call


def test_unmeetable_deadline_error_has_the_estimate() -> None:
    status = to_status(DeadlineUnmeetable("it would take about 12.5 s", 12.5))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, info.reason, dict(info.metadata)) == (4, "DEADLINE_UNMEETABLE", {"estimate_seconds": "12.500"})
