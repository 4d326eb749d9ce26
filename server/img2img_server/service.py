"""gRPC's side of a transform: proto -> request, events -> proto, and nothing else."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import image_to_image_pb2_grpc as pb_grpc

from img2img_server import images
from img2img_server.config import (
    DEFAULT_GUIDANCE,
    DEFAULT_PROMPT,
    DEFAULT_STEPS,
    DEFAULT_STRENGTH,
    MAX_GUIDANCE,
    MAX_PROMPT,
    ServerConfig,
)
from img2img_server.engine.engine import Accepted, Engine
from img2img_server.engine.request import Completed, Event, Failed, Progress, Request, Started
from img2img_server.errors import InvalidField, NotSupported
from img2img_server.model_service import reference_from
from img2img_server.models import Model, ModelStore

_FORMATS: dict[int, images.WriteFormat] = {
    pb.OUTPUT_FORMAT_UNSPECIFIED: "PNG",
    pb.OUTPUT_FORMAT_PNG: "PNG",
    pb.OUTPUT_FORMAT_JPEG: "JPEG",
    pb.OUTPUT_FORMAT_WEBP: "WEBP",
}
_DEFAULT_QUALITY = 90
_MAX_SEED = 2**63 - 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Job:
    """A request on its way through the service: what the engine gets, and how to answer. `arrival` is in seconds."""

    model: Model
    request: Request
    file_format: images.WriteFormat
    quality: int
    arrival: float


class ImageToImageService(pb_grpc.ImageToImageServiceServicer):
    """Transform and TransformStream. Picture codecs run on `executor`, models on the engine, nothing on the event loop."""

    def __init__(self, config: ServerConfig, models: ModelStore, engine: Engine, executor: Executor) -> None:
        self._config = config
        self._models = models
        self._engine = engine
        self._executor = executor

    async def Transform(self, request: pb.TransformRequest, context: Any) -> pb.TransformResponse:
        """Runs one transform and answers when it is done."""
        job = await self._parse(request, context.time_remaining())
        async with aclosing(self._follow(job.request, progress=False)) as events:
            async for event in events:
                if isinstance(event, Completed):
                    return await self._response(job, event)
        raise AssertionError("the engine ends every request")

    async def TransformStream(
        self, request: pb.TransformStreamRequest, context: Any
    ) -> AsyncGenerator[pb.TransformStreamResponse, None]:
        """Runs one transform and tells each of its events."""
        job = await self._parse(request.request, context.time_remaining())
        async with aclosing(self._follow(job.request, progress=True)) as events:
            async for event in events:
                yield await self._told(job, event)

    async def _follow(self, request: Request, progress: bool) -> AsyncGenerator[Accepted | Event, None]:
        """Submits a request and gives its events in order; raises its error. Leaving early cancels it."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
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
        if isinstance(event, Accepted):
            return pb.TransformStreamResponse(queued=pb.Queued(position=event.position, eta_seconds=event.eta))
        if isinstance(event, Started):
            return pb.TransformStreamResponse(started=pb.Started(seed=job.request.seeds[0], engine=_engine_of(job)))
        if isinstance(event, Progress):
            return pb.TransformStreamResponse(progress=pb.Progress(step=event.step, step_count=event.step_count))
        assert isinstance(event, Completed), "a failure was raised"
        return pb.TransformStreamResponse(completed=await self._response(job, event))

    async def _response(self, job: Job, completed: Completed) -> pb.TransformResponse:
        encoded = await asyncio.gather(
            *(self._in_background(partial(images.encode, image, job.file_format, job.quality)) for image in completed.images)
        )
        timings = completed.timings
        assert job.model.manifest is not None, "a model that runs has a manifest"
        return pb.TransformResponse(
            images=[
                pb.ImageResult(data=data, format=_format_of(job), width=image.width, height=image.height, seed=seed)
                for data, image, seed in zip(encoded, completed.images, job.request.seeds, strict=True)
            ],
            model_id=job.model.id,
            model_revision=job.model.manifest.source.revision or "",
            engine=_engine_of(job),
            timings=pb.Timings(
                queue_ms=timings.queue * 1e3,
                encode_ms=timings.encode * 1e3,
                denoise_ms=timings.denoise * 1e3,
                decode_ms=timings.decode * 1e3,
                total_ms=(time.perf_counter() - job.arrival) * 1e3,
            ),
        )

    async def _parse(self, message: pb.TransformRequest, seconds_left: float | None) -> Job:
        """Checks a message and fills in its defaults. Raises the error that names the first wrong field."""
        arrival = time.perf_counter()
        deadline = None if seconds_left is None else self._engine.clock() + seconds_left
        model = self._models.resolve(reference_from(message.model))
        assert model.pipeline is not None, "resolve gives models that can run"
        prompt, negative_prompt = _prompts(message)
        strength, steps, guidance = self._numbers(message)
        seeds = self._seeds(message)
        file_format, quality = _output(message)
        data = self._picture(message.image)
        field = "image.uri" if message.image.WhichOneof("source") == "uri" else "image.data"
        limits = self._config.image_limits
        source = await self._in_background(lambda: images.decode(data, limits, field))
        size = images.target_size(
            source.size,
            message.width if message.HasField("width") else None,
            message.height if message.HasField("height") else None,
            model.pipeline.size_multiple,
            limits,
        )
        request = Request(
            model=model.id,
            image=await self._in_background(lambda: images.resize(source, size)),
            prompt=prompt,
            negative_prompt=negative_prompt,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seeds=seeds,
            deadline=deadline,
        )
        return Job(model, request, file_format, quality, arrival)

    def _numbers(self, message: pb.TransformRequest) -> tuple[float, int, float]:
        strength = message.strength if message.HasField("strength") else DEFAULT_STRENGTH
        _check("strength", 0 < strength <= 1, f"{strength} is not in (0, 1]")
        steps = message.num_inference_steps if message.HasField("num_inference_steps") else DEFAULT_STEPS
        most = self._config.max_steps
        _check("num_inference_steps", 1 <= steps <= most, f"{steps} is not in 1 to {most}")
        _check("strength", int(steps * strength) >= 1, f"strength {strength} of {steps} steps is less than one step")
        guidance = message.guidance_scale if message.HasField("guidance_scale") else DEFAULT_GUIDANCE
        _check("guidance_scale", 0 <= guidance <= MAX_GUIDANCE, f"{guidance} is not in 0 to {MAX_GUIDANCE:g}")
        return strength, steps, guidance

    def _seeds(self, message: pb.TransformRequest) -> tuple[int, ...]:
        count = message.image_count if message.HasField("image_count") else 1
        most = self._config.max_image_count
        _check("image_count", 1 <= count <= most, f"{count} is not in 1 to {most}")
        first = message.seed if message.HasField("seed") else -1
        _check("seed", -1 <= first <= _MAX_SEED - count + 1, f"{first} is not -1, for a random one, or in 0 to 2^63 - 1")
        if first == -1:
            first = secrets.randbelow(2**32)
        return tuple(range(first, first + count))

    def _picture(self, source: pb.ImageSource) -> bytes:
        kind = source.WhichOneof("source")
        if kind == "data":
            return source.data
        if kind == "asset_id":
            raise NotSupported("image.asset_id: this server keeps no assets yet; send the picture as data")
        if kind is None:
            raise InvalidField("image", "a source picture is required")
        if not source.uri.startswith("data:"):
            raise InvalidField("image.uri", "only data: URIs are allowed on this server; or send the picture as data")
        return images.decode_data_uri(source.uri, self._config.image_limits, "image.uri")

    async def _in_background(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _prompts(message: pb.TransformRequest) -> tuple[str, str | None]:
    for field in ("prompt", "negative_prompt"):
        length = len(getattr(message, field))
        _check(field, length <= MAX_PROMPT, f"it has {length} characters, the most is {MAX_PROMPT}")
    return (
        message.prompt if message.HasField("prompt") else DEFAULT_PROMPT,
        message.negative_prompt if message.HasField("negative_prompt") else None,
    )


def _output(message: pb.TransformRequest) -> tuple[images.WriteFormat, int]:
    output = message.output
    if output.as_asset:
        raise NotSupported("output.as_asset: this server keeps no assets yet")
    _check("output.format", output.format in _FORMATS, f"{output.format} is no known format")
    quality = output.quality if output.HasField("quality") else _DEFAULT_QUALITY
    _check("output.quality", 1 <= quality <= 100, f"{quality} is not in 1 to 100")
    return _FORMATS[output.format], quality


def _check(field: str, holds: bool, description: str) -> None:
    if not holds:
        raise InvalidField(field, description)


def _engine_of(job: Job) -> str:
    assert job.model.pipeline is not None, "a model that runs has a pipeline"
    return job.model.pipeline.engine


def _format_of(job: Job) -> pb.OutputFormat.ValueType:
    return pb.OutputFormat.Value(f"OUTPUT_FORMAT_{job.file_format}")
