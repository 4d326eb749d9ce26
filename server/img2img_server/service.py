"""gRPC's side of a transform: what is asked goes to the engine, and what the engine tells goes to the caller."""

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any

from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import image_to_image_pb2_grpc as pb_grpc
from PIL import Image

from img2img_server import images
from img2img_server.engine.engine import Accepted, Engine
from img2img_server.engine.request import Completed, Event, Failed, Progress, Queued, Request, Started
from img2img_server.model_service import reference_from
from img2img_server.models import ModelStore
from img2img_server.parsing import Job, Parser
from img2img_server.residency import Residency
from img2img_server.telemetry import Telemetry

_PREVIEW_QUALITY = 80
"""Of a preview's JPEG: it is looked at for a second."""


class ImageToImageService(pb_grpc.ImageToImageServiceServicer):
    """Transform and TransformStream. Picture codecs run on `executor`, models on the engine, nothing on the event loop."""

    def __init__(
        self, parser: Parser, models: ModelStore, residency: Residency, engine: Engine, executor: Executor, telemetry: Telemetry
    ) -> None:
        self._parser = parser
        self._models = models
        self._residency = residency
        self._engine = engine
        self._executor = executor
        self._telemetry = telemetry

    async def Transform(self, request: pb.TransformRequest, context: Any) -> pb.TransformResponse:
        """Runs one transform and answers when it is done."""
        async with self._residency.using(reference_from(request.model)) as model:
            job = await self._parser.parse(request, model, context.time_remaining(), previews=False)
            async with aclosing(self._follow(job.request, progress=False)) as events:
                async for event in events:
                    if isinstance(event, Completed):
                        return await self._response(job, event)
        raise AssertionError("the engine ends every request")

    async def TransformStream(
        self, request: pb.TransformStreamRequest, context: Any
    ) -> AsyncGenerator[pb.TransformStreamResponse, None]:
        """Runs one transform and tells each of its events."""
        async with self._residency.using(reference_from(request.request.model)) as model:
            job = await self._parser.parse(request.request, model, context.time_remaining(), previews=True)
            async with aclosing(self._follow(job.request, progress=True)) as events:
                async for event in events:
                    yield await self._told(job, event)

    async def _follow(self, request: Request, progress: bool) -> AsyncGenerator[Accepted | Event, None]:
        """Submits a request and gives its events in order; raises its error. Leaving early cancels it."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        trail = self._telemetry.trail(request)

        def listen(event: Event) -> None:
            trail.tell(event)
            if progress or isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        accepted = self._engine.submit(request, listen)
        try:
            yield accepted
            while True:
                event = await queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Completed):
                    return
        finally:
            accepted.ticket.cancel()

    async def _told(self, job: Job, event: Accepted | Event) -> pb.TransformStreamResponse:
        if isinstance(event, Accepted | Queued):
            return pb.TransformStreamResponse(queued=pb.Queued(position=event.position, eta_seconds=event.eta))
        if isinstance(event, Started):
            return pb.TransformStreamResponse(started=pb.Started(seed=job.request.seeds[0], engine=self._engine_of(job)))
        if isinstance(event, Progress):
            return pb.TransformStreamResponse(progress=await self._progress(event))
        assert isinstance(event, Completed), "a failure was raised"
        return pb.TransformStreamResponse(completed=await self._response(job, event))

    async def _progress(self, event: Progress) -> pb.Progress:
        preview = None if event.preview is None else await self._encode(event.preview, "JPEG", _PREVIEW_QUALITY)
        return pb.Progress(step=event.step, step_count=event.step_count, preview=preview, eta_seconds=event.eta)

    async def _response(self, job: Job, completed: Completed) -> pb.TransformResponse:
        encoded = await asyncio.gather(*(self._encode(image, job.file_format, job.quality) for image in completed.images))
        timings = completed.timings
        assert job.model.manifest is not None, "a model that runs has a manifest"
        return pb.TransformResponse(
            images=[
                pb.ImageResult(data=data, format=_format_of(job), width=image.width, height=image.height, seed=seed)
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
        )

    async def _encode(self, image: Image.Image, file_format: images.WriteFormat, quality: int) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._executor, images.encode, image, file_format, quality)

    def _engine_of(self, job: Job) -> str:
        """What runs the model now: another engine may have taken over since the request came."""
        pipeline = self._models.get(job.model.id).pipeline
        assert pipeline is not None, "a model that runs has a pipeline"
        return pipeline.engine


def _format_of(job: Job) -> pb.OutputFormat.ValueType:
    return pb.OutputFormat.Value(f"OUTPUT_FORMAT_{job.file_format}")
