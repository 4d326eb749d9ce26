"""ImageToImageService: submits requests to the engine and sends its events to the caller."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import image_to_image_pb2_grpc as pb_grpc
from PIL import Image

from img2img_server.access.access import Access
from img2img_server.api.companions import CompanionLease
from img2img_server.api.fidelity import used_message
from img2img_server.api.interceptors import to_status
from img2img_server.api.models import reference_from
from img2img_server.api.parsing import AS_WRITTEN, ParsedRequest, Parser, Reading
from img2img_server.api.provenance import Provenance
from img2img_server.api.request_stream import RequestStream
from img2img_server.assets.files import owner_of
from img2img_server.assets.index import Reservation
from img2img_server.assets.store import AssetStore
from img2img_server.backends.base import Models
from img2img_server.codecs.pool import Codecs
from img2img_server.engine.admission import Slot
from img2img_server.engine.interface import Accepted, EngineInterface
from img2img_server.engine.request import Completed, Event, Failed, Progress, Queued, Request, Started, UsedSpeedup
from img2img_server.errors import ServerError
from img2img_server.models.registry import ModelRegistry
from img2img_server.support.call import current
from img2img_server.support.client_limit import ClientLimit
from img2img_server.telemetry.telemetry import Telemetry

MAX_POSITIONS, MAX_STEPS, MAX_PREVIEWS = 16, 128, 32
"""Maximum unread events: queue positions, steps, and steps with their preview. The oldest are dropped."""


class Outbox:
    """A bounded queue of events that drops the oldest unread ones. Used on the event loop only."""

    def __init__(self) -> None:
        self._events: deque[Accepted | Event] = deque()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Accepted | Event) -> None:
        """Adds an event and drops the oldest ones beyond the limits."""
        self._events.append(event)
        if isinstance(event, Queued | Progress):
            self._bound(type(event), MAX_POSITIONS if isinstance(event, Queued) else MAX_STEPS)
        self._changed.set()

    async def get(self) -> Accepted | Event:
        """Waits for the next event."""
        while not self._events:
            self._changed.clear()
            await self._changed.wait()
        return self._events.popleft()

    def _bound(self, kind: type[Queued | Progress], most: int) -> None:
        found = [index for index, event in enumerate(self._events) if isinstance(event, kind)]
        if len(found) > most:
            del self._events[found[0]]
        drawn = [(index, event) for index, event in enumerate(self._events) if isinstance(event, Progress) and event.preview]
        if len(drawn) > MAX_PREVIEWS:
            index, event = drawn[0]
            self._events[index] = replace(event, preview=None)


def is_last(event: Accepted | Event) -> bool:
    """Whether an event ends its request."""
    return isinstance(event, Completed | Failed)


_PREVIEW_QUALITY = 80
"""JPEG quality of previews."""
_BYTES_PER_PIXEL, _BYTES_PER_FILE = 4, 4096
"""Upper bound of an encoded image's size, for any format and content."""

_TRANSFORM = "/img2img.v1.ImageToImageService/Transform"
_BATCH_IN_PROGRESS = 16
"""Requests of one TransformBatch that are in progress: a few device batches. Each holds its message, up to 33 MiB."""
_MAX_BATCHES, _MAX_CLIENT_BATCHES = 64, 8
"""TransformBatch calls in progress, in total and of one client: their requests wait, and are not refused."""
_BATCH_RETRY = 5.0


class ImageToImageService(pb_grpc.ImageToImageServiceServicer):
    """Transform, TransformStream and TransformBatch. `codecs` decode and encode images, `engine` runs the models."""

    def __init__(
        self,
        parser: Parser,
        models: ModelRegistry,
        residency: Models,
        engine: EngineInterface,
        codecs: Codecs,
        telemetry: Telemetry,
        assets: AssetStore,
        provenance: Provenance,
        access: Access,
    ) -> None:
        self._parser = parser
        self._models = models
        self._residency = residency
        self._engine = engine
        self._codecs = codecs
        self._telemetry = telemetry
        self._assets = assets
        self._provenance = provenance
        self._access = access
        self._batches = ClientLimit("TransformBatch calls in progress", _MAX_BATCHES, _MAX_CLIENT_BATCHES, _BATCH_RETRY)
        self._tasks: set[asyncio.Task[None]] = set()

    async def Transform(self, request: pb.TransformRequest, context: Any) -> pb.TransformResponse:
        """Runs one transform and returns its result."""
        return await self.transform(request, context, lambda accepted: None)

    async def transform(
        self,
        request: pb.TransformRequest,
        context: Any,
        accept: Callable[[Accepted], object],
        reading: Reading = AS_WRITTEN,
    ) -> pb.TransformResponse:
        """Transform for any API, which reads its messages as `reading` says. `accept` is called when the request is in the
        queue."""
        with self._engine.reserve(current().client) as slot:
            async with AsyncExitStack() as lease:
                job = await self._parse(request, context, lease, previews=False, reading=reading)
                async with (
                    self._reserve(job) as reserved,
                    aclosing(self._follow(job.request, slot, lease, progress=False)) as events,
                ):
                    async for event in events:
                        if isinstance(event, Accepted):
                            accept(event)
                        elif isinstance(event, Completed):
                            return await self._response(job, event, reserved)
        raise AssertionError("the engine ends every request")

    async def TransformStream(
        self, request: pb.TransformStreamRequest, context: Any, reading: Reading = AS_WRITTEN
    ) -> AsyncGenerator[pb.TransformStreamResponse, None]:
        """Runs one transform and yields its events. `reading` as for `transform`."""
        with self._engine.reserve(current().client) as slot:
            async with AsyncExitStack() as lease:
                job = await self._parse(request.request, context, lease, previews=True, reading=reading)
                async with (
                    self._reserve(job) as reserved,
                    aclosing(self._follow(job.request, slot, lease, progress=True)) as events,
                ):
                    async for event in events:
                        yield await self._message(job, event, reserved)

    async def TransformBatch(
        self, requests: AsyncIterator[pb.TransformBatchRequest], context: Any
    ) -> AsyncGenerator[pb.TransformBatchResponse, None]:
        """Runs many transforms and yields their outcomes as they finish."""

        async def respond(request: pb.TransformBatchRequest, index: int) -> AsyncGenerator[tuple[Any, bool], None]:
            response = await self.Transform(request.request, context)
            yield pb.TransformBatchResponse(index=index, response=response), True

        stream = RequestStream(
            _TRANSFORM,
            respond,
            _failed,
            self._access,
            self._telemetry,
            context,
            in_progress=_BATCH_IN_PROGRESS,
            memory=self._codecs.memory,
        )
        with self._batches.held(current().client):
            async with aclosing(stream.responses(requests)) as responses:
                async for response in responses:
                    yield response

    async def _parse(
        self, message: pb.TransformRequest, context: Any, lease: AsyncExitStack, previews: bool, reading: Reading
    ) -> ParsedRequest:
        """Parses a message. The model stays in memory until `lease` is closed."""
        model = await lease.enter_async_context(self._residency.using(reference_from(message.model)))
        companions = CompanionLease(self._models, self._residency, model, lease)
        return await self._parser.parse(message, model, context.time_remaining(), previews, reading, companions)

    async def _follow(
        self, request: Request, slot: Slot, lease: AsyncExitStack, progress: bool
    ) -> AsyncGenerator[Accepted | Event, None]:
        """Submits a request and yields its events in order. Raises its error. Closing the generator cancels the request.

        Closes `lease` when the engine has finished, whether or not the events are read. Few unread events are kept.
        """
        loop = asyncio.get_running_loop()
        outbox = Outbox()
        trace = self._telemetry.trace(request)

        def take(event: Event) -> None:
            outbox.put(event)
            if is_last(event):
                self._spawn(lease.aclose())

        def listen(event: Event) -> None:
            trace.record(event)
            if progress or is_last(event):
                loop.call_soon_threadsafe(take, event)

        accepted = self._engine.submit(request, listen, slot)
        trace.record(accepted)
        try:
            yield accepted
            while True:
                event = await outbox.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Completed):
                    return
        finally:
            accepted.ticket.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio keeps only weak references
        task.add_done_callback(self._tasks.discard)

    async def _message(
        self, job: ParsedRequest, event: Accepted | Event, reserved: Reservation | None
    ) -> pb.TransformStreamResponse:
        if isinstance(event, Accepted | Queued):
            return pb.TransformStreamResponse(queued=pb.Queued(position=event.position, eta_seconds=event.eta))
        if isinstance(event, Started):
            return pb.TransformStreamResponse(started=pb.Started(seed=job.request.seeds[0], engine=self._engine_of(job)))
        if isinstance(event, Progress):
            return pb.TransformStreamResponse(progress=await self._progress(event))
        assert isinstance(event, Completed), "failures are raised by _follow"
        return pb.TransformStreamResponse(completed=await self._response(job, event, reserved))

    async def _progress(self, event: Progress) -> pb.Progress:
        preview = None if event.preview is None else await self._codecs.encode(event.preview, "JPEG", _PREVIEW_QUALITY)
        return pb.Progress(step=event.step, step_count=event.step_count, preview=preview, eta_seconds=event.eta)

    async def _response(self, job: ParsedRequest, completed: Completed, reserved: Reservation | None) -> pb.TransformResponse:
        pairs = zip(completed.images, job.request.seeds, strict=True)
        encoding = [self._encode(job, image, seed, completed.speedup) for image, seed in pairs]
        # One image needs no task of its own, which would wake the event loop two more times.
        encoded = [await encoding[0]] if len(encoding) == 1 else await asyncio.gather(*encoding)
        timings = completed.timings
        assert job.model.manifest is not None, "loaded models have a manifest"
        return pb.TransformResponse(
            images=[
                pb.ImageResult(
                    **await self._content(data, reserved),
                    format=_format_of(job),
                    width=image.width,
                    height=image.height,
                    seed=seed,
                )
                for data, image, seed in zip(encoded, completed.images, job.request.seeds, strict=True)
            ],
            model_id=job.model.id,
            model_revision=job.model.manifest.source.revision or "",
            engine=self._engine_of(job),
            timings=pb.Timings(
                queue_ms=timings.queue * 1e3,
                encode_ms=timings.encode * 1e3,
                denoise_ms=timings.denoise * 1e3,
                decode_ms=timings.decode * 1e3,
                total_ms=(time.perf_counter() - job.arrival) * 1e3,
            ),
            warnings=[
                pb.Warning(field=warning.field, description=warning.description, code=warning.code)
                for warning in completed.warnings
            ],
            speedup=used_message(completed.speedup),
        )

    def _reserve(self, job: ParsedRequest) -> AbstractAsyncContextManager[Reservation | None]:
        """Reserves asset quota for a request's images if they are to be stored, so that it fails before the device works."""
        if not job.as_asset:
            return nullcontext()
        width, height = job.request.result_size
        size = len(job.request.seeds) * (width * height * _BYTES_PER_PIXEL + _BYTES_PER_FILE)
        return self._assets.reserve(owner_of(current()), size)

    async def _content(self, data: bytes, reserved: Reservation | None) -> dict[str, Any]:
        """The ImageResult fields of an encoded image: its data, or the id of the asset it is stored as."""
        if reserved is None:
            return {"data": data}
        return {"asset_id": (await self._assets.put(owner_of(current()), data, reserved)).id}

    async def _encode(self, job: ParsedRequest, image: Image.Image, seed: int, speedup: UsedSpeedup | None) -> bytes:
        """Encodes a result, with its provenance record. Returns the file's bytes."""
        output = job.file_format, job.quality
        record = self._provenance.record(job, self._engine_of(job), seed, speedup)
        mask = job.request.mask
        overlay = None if mask is None or not mask.paste else (job.request.image, mask.image)
        return await self._provenance.sign(await self._codecs.encode(image, *output, record, overlay), job.file_format)

    def _engine_of(self, job: ParsedRequest) -> str:
        """The engine that runs the model now: another one may have been promoted since the request arrived."""
        pipeline = self._models.pipelines().get(job.model.id)  # None if the model was unloaded or has failed meanwhile
        return job.engine if pipeline is None else pipeline.engine


def _format_of(job: ParsedRequest) -> pb.OutputFormat.ValueType:
    return pb.OutputFormat.Value(f"OUTPUT_FORMAT_{job.file_format}")


def _failed(request: pb.TransformBatchRequest, index: int, error: ServerError, request_id: str) -> pb.TransformBatchResponse:
    return pb.TransformBatchResponse(index=index, status=to_status(error, request_id).SerializeToString())
