"""Pools of codec processes: jobs are queued fairly, run in processes, and are killed if their callers leave.

`ImageMemory` accounts for the memory of images: messages, uploads, fetched files and decoding.
"""

import asyncio
import logging
import mmap
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from img2img_server.codecs.jobs import (
    Encode,
    Inspect,
    Inspected,
    Job,
    Loaded,
    LoadImage,
    LoadMask,
    LoadReference,
    file_of,
)
from img2img_server.codecs.process import CodecProcess, ProcessDied
from img2img_server.errors import ImageMemoryFull, InvalidField, ServerError, ShuttingDown
from img2img_server.images import WriteFormat, paste
from img2img_server.support.call import Call, current
from img2img_server.support.fair_queue import FairSlots, FairThreads

_RETRY = 1.0
"""Retry delay in seconds, since decoding and receiving end soon."""


class ImageMemory:
    """A memory `budget` in bytes, of which `held` are in use; `refused` counts refusals. One client may use half of it at most.
    Used on one event loop; the numbers can be read on any thread."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.refused = 0
        self.held = 0
        self._of_calls: Counter[int] = Counter()
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def hold(self, call: Call, size: int) -> Iterator[None]:
        """Accounts for `size` bytes of `call` within the block. Raises ImageMemoryFull if too few are free.

        A limit does not apply to a call if no other call uses that share: otherwise large images could never be processed.
        """
        if not size:
            yield
            return
        own, mine = self._of_calls[id(call)], self._of_clients[call.client]
        if (self.held > own and self.held + size > self.budget) or (mine > own and mine + size > self.budget // 2):
            self.refused += 1
            raise ImageMemoryFull(f"not enough memory for {size} more bytes of images: try again later", _RETRY)
        self._add(call, size)
        try:
            yield
        finally:
            self._add(call, -size)

    def _add(self, call: Call, size: int) -> None:
        self.held += size
        self._of_calls[id(call)] += size
        self._of_clients[call.client] += size
        if not self._of_calls[id(call)]:
            del self._of_calls[id(call)]
        if not self._of_clients[call.client]:
            del self._of_clients[call.client]


_log = logging.getLogger(__name__)

_T = TypeVar("_T")

Pack = Callable[[], Awaitable[int]]
"""Creates a file and returns its descriptor."""
Unpack = Callable[[object, int | None], Awaitable[_T]]
"""Reads a job's result and closes its file."""

_GRACE = 1.0
"""Seconds that a job may continue after its caller has left before its process is killed: a new process costs more than most
jobs."""
_LONGEST = 60.0
"""Seconds after which a job's process is killed. Its limit of processor time usually applies first."""
_COPYING = 4
"""Threads that copy large images to and from the processes."""
_QUICK = 2**20
"""Maximum bytes that are copied on the event loop, which takes 0.3 ms."""
_SLOW = _QUICK + 1
"""The size of an image that is pasted into its source, which takes 16 ms for 512 x 512 pixels: never on the event loop."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """The numbers of running and waiting jobs of a stage."""

    running: int
    waiting: int


class _Guard:
    """Kills the process of a job `_GRACE` seconds after the job's caller has left, and after `_LONGEST` seconds in any case. A
    timer, not a task, which would wake the event loop for each job."""

    def __init__(self) -> None:
        self._process: CodecProcess | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._left = False

    def begin(self, process: CodecProcess) -> None:
        """The job begins in a process."""
        self._process = process
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_GRACE, process.kill) if self._left else loop.call_later(_LONGEST, self._too_long, process)

    def leave(self) -> None:
        """The caller has left, perhaps before the job begins."""
        self._left = True
        if (process := self._process) is not None:
            self.end()
            self.begin(process)

    def end(self) -> None:
        """The job has ended: its process may be in another one."""
        self._process = None
        if self._timer is not None:
            self._timer.cancel()

    def _too_long(self, process: CodecProcess) -> None:
        _log.warning("a codec took more than %g s: killing its process", _LONGEST)
        process.kill()


class Processes:
    """Up to `most` codec processes, created on demand and replaced when they die."""

    def __init__(self, most: int, make: Callable[[], CodecProcess]) -> None:
        self._slots = FairSlots(most)
        self._make = make
        self._idle: list[CodecProcess] = []
        self._all: set[CodecProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def stats(self) -> StageStats:
        """The numbers of running and waiting jobs."""
        return StageStats(self._slots.running, self._slots.waiting)

    async def start(self) -> None:
        """Starts the first process, so that the first job does not wait for it. Raises ProcessDied or OSError."""
        self._idle.append(await self._started())

    async def run(self, job: Job, pack: Pack, unpack: Unpack[_T], memory: ImageMemory | None = None) -> _T:
        """Runs a job of the current call, in fair order, on the file created by `pack`. Returns the result of `unpack` for the
        job's result and file. `memory` accounts for the job's memory requests; None grants all of them.

        Raises the job's errors, ProcessDied or ShuttingDown. If the caller is cancelled, the job's process is killed after
        `_GRACE`; until then the job keeps its slot and memory.
        """
        guard = _Guard()
        try:
            return await self._slots.run(current().client, lambda: self._run(job, pack, unpack, memory, guard))
        except asyncio.CancelledError:
            guard.leave()
            raise
        except ProcessDied:
            if self._closed:
                raise ShuttingDown("the server is shutting down") from None
            raise

    def kill(self) -> None:
        """Kills all processes without waiting for them."""
        self._closed = True
        for process in self._all:
            process.kill()

    async def close(self) -> None:
        """Kills all processes and waits for their end."""
        self.kill()
        await self._slots.settle()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.close() for process in self._all))
        self._all.clear()

    async def _run(self, job: Job, pack: Pack, unpack: Unpack[_T], memory: ImageMemory | None, guard: _Guard) -> _T:
        process = self._idle_one() or await self._started()
        guard.begin(process)
        try:
            with ExitStack() as held:
                file = await pack()
                try:
                    value, answer = await process.run(job, file, lambda size: _hold(held, memory, size))
                finally:
                    os.close(file)
                return await unpack(value, answer)
        finally:
            guard.end()
            if process.alive and not self._closed:
                self._idle.append(process)
            else:
                self._replace(process)

    def _idle_one(self) -> CodecProcess | None:
        """An idle process, if any. Replaces those that were killed from outside."""
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            self._replace(process)
        return None

    async def _started(self) -> CodecProcess:
        if self._closed:
            raise ShuttingDown("the server is shutting down")
        process = self._make()
        self._all.add(process)
        try:
            await process.start()
        except BaseException:
            process.kill()
            raise
        if self._closed:  # closed while it started
            await process.close()
            raise ShuttingDown("the server is shutting down")
        return process

    def _replace(self, dead: CodecProcess) -> None:
        """Starts another process in the background, so that no job waits for it."""

        async def replace() -> None:
            await dead.close()
            self._all.discard(dead)
            if not self._closed and not self._idle:
                self._idle.append(await self._started())

        task = asyncio.create_task(replace())
        self._tasks.add(task)
        task.add_done_callback(self._replaced)

    def _replaced(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("cannot start a codec process: %s", error)


class Codecs:
    """Decodes and encodes images off the event loop, in processes that can be killed.

    Up to `decoders` processes decode and `encoders` encode. `memory` accounts for the memory of decoding. `make` creates a
    process.
    """

    def __init__(
        self, decoders: int, encoders: int, memory: ImageMemory, make: Callable[[], CodecProcess] = CodecProcess
    ) -> None:
        self.memory = memory
        self._decoders = Processes(decoders, make)
        self._encoders = Processes(encoders, make)
        self._threads = FairThreads(_COPYING, "img2img-copy")

    @property
    def stats(self) -> dict[str, StageStats]:
        """Running and waiting jobs by stage: "decode" and "encode"."""
        return {"decode": self._decoders.stats, "encode": self._encoders.stats}

    async def start(self) -> None:
        """Starts a process for each stage. Raises OSError if that fails."""
        try:
            await asyncio.gather(self._decoders.start(), self._encoders.start())
        except ProcessDied as error:
            raise OSError(f"cannot start a codec process: {error}") from error

    async def load(self, data: bytes, job: LoadImage) -> tuple[Image.Image, bytes, tuple[int, int]]:
        """Decodes a request's source. Returns the image as its model gets it, its digest, and the size of the result.

        Raises InvalidField or ImageMemoryFull.
        """
        return await self._decode(data, job, self._loaded)

    async def load_reference(self, data: bytes, job: LoadReference) -> tuple[Image.Image, bytes, tuple[int, int]]:
        """Decodes one of several images. Returns it as its model gets it, its digest, and its own size.

        Raises InvalidField or ImageMemoryFull.
        """
        return await self._decode(data, job, self._loaded)

    async def load_mask(self, data: bytes, job: LoadMask) -> tuple[Image.Image, bytes]:
        """Decodes a request's mask. Returns it in mode L, and its digest. Raises InvalidField or ImageMemoryFull."""

        async def unpack(value: object, file: int | None) -> tuple[Image.Image, bytes]:
            assert isinstance(value, bytes), "the result of LoadMask"
            assert file is not None, "a mask has pixels"
            return await self._copy(job.size[0] * job.size[1], _image_of, job.size, file, "L"), value

        return await self._decode(data, job, unpack)

    async def inspect(self, data: bytes, job: Inspect) -> Inspected:
        """Inspects an image file. Raises InvalidField or ImageMemoryFull."""
        return await self._decode(data, job, _inspected)

    async def encode(
        self,
        image: Image.Image,
        file_format: WriteFormat,
        quality: int,
        record: str = "",
        overlay: tuple[Image.Image, Image.Image] | None = None,
    ) -> bytes:
        """Encodes an RGB image, with `record` as in images.encode. Returns the file's bytes.

        `overlay` is a source and its mask, which has the image's size: the image is pasted into the source by it.
        """
        size = image.width * image.height * 3 if overlay is None else _SLOW
        job = Encode(image.size, file_format, quality, record)
        try:
            return await self._encoders.run(job, lambda: self._copy(size, _file_of_pixels, image, overlay), self._encoded)
        except ProcessDied as error:
            _log.error("an encoder failed: %s", error)
            raise ServerError("internal server error") from error

    def kill(self) -> None:
        """Kills all processes without waiting for them."""
        self._decoders.kill()
        self._encoders.kill()

    async def close(self) -> None:
        """Kills all processes and waits for their end."""
        await asyncio.gather(self._decoders.close(), self._encoders.close())
        self._threads.close()

    async def _decode(self, data: bytes, job: LoadImage | LoadReference | LoadMask | Inspect, unpack: Unpack[_T]) -> _T:
        try:
            return await self._decoders.run(job, lambda: self._copy(len(data), file_of, data), unpack, self.memory)
        except ProcessDied as error:
            raise InvalidField(job.field, _reason(error)) from None

    async def _loaded(self, value: object, file: int | None) -> tuple[Image.Image, bytes, tuple[int, int]]:
        assert isinstance(value, Loaded), "the result of LoadImage and LoadReference"
        assert file is not None, "an image has pixels"
        width, height = value.size
        return await self._copy(width * height * 3, _image_of, value.size, file), value.digest, value.other_size

    async def _encoded(self, value: object, file: int | None) -> bytes:
        assert file is not None, "a file has bytes"
        return await self._copy(os.fstat(file).st_size, _bytes_of, file)

    async def _copy(self, size: int, copy: Callable[..., _T], *arguments: object) -> _T:
        """Copies bytes, on the event loop if that is faster than on a thread."""
        return copy(*arguments) if size <= _QUICK else await self._threads.run(copy, *arguments)


async def _inspected(value: object, file: int | None) -> Inspected:
    assert isinstance(value, Inspected), "the result of Inspect"
    return value


def _hold(held: ExitStack, memory: ImageMemory | None, size: int) -> Exception | None:
    """Accounts for a job's memory request until `held` is closed. Returns the error that refuses it, None if it is granted."""
    try:
        if memory is not None:
            held.enter_context(memory.hold(current(), size))
    except ImageMemoryFull as error:
        return error
    return None


def _reason(error: ProcessDied) -> str:
    """The error text for the caller whose image killed a process."""
    if error.signal == signal.SIGPROF:
        return "decoding the image takes more processor time than its size allows"
    _log.error("a decoder failed: %s", error)
    if error.signal == signal.SIGKILL:
        return "decoding the image takes too much time or memory"
    return "the image cannot be decoded: it is damaged"


def _image_of(size: tuple[int, int], file: int, mode: str = "RGB") -> Image.Image:
    """Reads raw pixels of a mode from a file and closes it."""
    try:
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as pixels:
            return Image.frombytes(mode, size, pixels)  # type: ignore[arg-type]
    finally:
        os.close(file)


def _file_of_pixels(image: Image.Image, overlay: tuple[Image.Image, Image.Image] | None) -> int:
    """Writes an RGB image's raw pixels to a file, pasted into a source by its mask if there is an `overlay` of both. Returns its
    descriptor."""
    return file_of((image if overlay is None else paste(image, *overlay)).tobytes())


def _bytes_of(file: int) -> bytes:
    """Reads a file and closes it."""
    with os.fdopen(file, "rb") as opened:
        return opened.read()
