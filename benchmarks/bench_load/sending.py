"""Sends jobs to a server and records the results: closed loops, open loops, and one client concurrent with others."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import grpc
from img2img.v1.image_to_image_pb2 import (
    ImageResult,
    ImageSource,
    TransformRequest,
    TransformResponse,
    TransformStreamRequest,
)
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub

if TYPE_CHECKING:
    from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceAsyncStub

from bench_load.images import render
from bench_load.workloads import Job

CALL_SECONDS = 300.0
"""A call that takes longer counts as failed."""
OPTIONS = (("grpc.max_receive_message_length", 64 * 2**20), ("grpc.max_send_message_length", 64 * 2**20))


@dataclass(slots=True)
class Record:
    """The result of one job. Times are seconds; `sent` counts from the start of its list."""

    role: str
    steps: int
    guidance: float | None
    size: tuple[int, int]
    units: float
    sent: float
    latency: float = 0.0
    """Seconds from sending (in an open loop: from the due time) to the complete response."""
    queue: float | None = None
    """The waiting time that the server reports."""
    estimate: float | None = None
    """The server's first estimate of the request's duration."""
    estimate_error: float | None = None
    """estimate / duration, minus 1."""
    error: str = ""
    """The status code if the request failed."""


@dataclass(slots=True)
class Sender:
    """A connection to one server, and the records of what was sent over it."""

    stub: "ImageToImageServiceAsyncStub | None"
    stream: bool = False
    """Whether to use TransformStream, which sends an estimate."""
    records: list[Record] = field(default_factory=list)
    _begun: float = field(default_factory=time.perf_counter)

    async def send(self, job: Job, role: str = "", due: float | None = None) -> bytes:
        """Sends one job, records it and returns the image, or no bytes if it failed. `due` is on time.perf_counter's clock."""
        request = message(job)
        begun = time.perf_counter() if due is None else due
        record = Record(role, job.denoising_steps, job.guidance, job.source.size, job.units, begun - self._begun)
        data = b""
        try:
            answer = await (self._streamed(request, record) if self.stream else self._called(request))
            record.queue = answer.timings.queue_ms / 1e3 if answer.HasField("timings") else None
            data = answer.images[0].data
        except grpc.aio.AioRpcError as error:
            record.error = error.code().name
        except aiohttp.ClientError as error:
            record.error = type(error).__name__
        record.latency = time.perf_counter() - begun
        self.records.append(record)
        return data

    async def _called(self, request: TransformRequest) -> TransformResponse:
        assert self.stub is not None, "HttpSender calls in another way"
        answer: TransformResponse = await self.stub.Transform(request, timeout=CALL_SECONDS)
        return answer

    async def _streamed(self, request: TransformRequest, record: Record) -> TransformResponse:
        assert self.stub is not None, "peers over HTTP have no streams"
        estimated = time.perf_counter()
        completed = TransformResponse()
        async for event in self.stub.TransformStream(TransformStreamRequest(request=request), timeout=CALL_SECONDS):
            if event.HasField("queued") and event.queued.HasField("eta_seconds"):
                estimated = time.perf_counter()
                record.estimate = event.queued.eta_seconds
            elif event.HasField("completed"):
                completed = event.completed
        took = time.perf_counter() - estimated
        if record.estimate is not None:
            record.estimate_error = record.estimate / took - 1
        return completed


class HttpSender(Sender):
    """Sends over HTTP to a peer, in the form of bench_peers/whole_requests.py."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(stub=None)
        self._session = session

    async def _called(self, request: TransformRequest) -> TransformResponse:
        body = {"messages": [base64.b64encode(request.SerializeToString()).decode()]}
        async with self._session.post("/transform", json=body) as response:
            (image,) = await response.json()
        return TransformResponse(images=[ImageResult(data=base64.b64decode(image))])


@contextlib.asynccontextmanager
async def connected(target: str, stream: bool = False) -> AsyncIterator[Sender]:
    """A Sender to the server at `target`: a host and port, or an HTTP address."""
    if target.startswith("http://"):
        timeout = aiohttp.ClientTimeout(CALL_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(target, timeout=timeout, connector=connector, raise_for_status=True) as session:
            yield HttpSender(session)
        return
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        yield Sender(ImageToImageServiceStub(channel), stream)


def message(job: Job) -> TransformRequest:
    """The request message of a job."""
    return TransformRequest(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt or None,
        image=ImageSource(data=render(job.source)),
        strength=job.strength,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        seed=job.seed,
    )


async def closed_loop(sender: Sender, jobs: Iterable[Job], concurrency: int, role: str = "") -> None:
    """`concurrency` clients take jobs in order; each sends the next when its last is answered. Returns after the last answer."""
    waiting = iter(jobs)

    async def client(waiting: Iterator[Job]) -> None:
        for job in waiting:
            await sender.send(job, role)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client(waiting))


async def open_loop(sender: Sender, jobs: Sequence[Job], times: Sequence[float]) -> None:
    """Sends each job at its time, independently of the answers. Returns after the last answer."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for job, at in zip(jobs, times, strict=True):
            await asyncio.sleep(begun + at - time.perf_counter())
            group.create_task(sender.send(job, due=begun + at))


async def among(
    sender: Sender,
    background: Iterable[Job],
    concurrency: int,
    foreground: Iterator[Job],
    pauses: Iterator[float],
    seconds: float,
) -> None:
    """Sends one client's jobs, first alone ("alone"), then concurrently with a closed loop ("foreground", "background").

    A pause before each randomizes the phase. Sends for `seconds`, but at least 4 and at most 40 jobs. Calls of the background
    that still run at the end are cancelled.
    """
    for _ in range(5):
        await sender.send(next(foreground), "alone")
    others = asyncio.create_task(closed_loop(sender, background, concurrency, "background"))
    begun = time.perf_counter()
    count = 0
    while count < 4 or (count < 40 and time.perf_counter() - begun < seconds):
        await asyncio.sleep(next(pauses))
        await sender.send(next(foreground), "foreground")
        count += 1
    others.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await others
