"""Codecs as the services use them: jobs wait fairly, run in processes, and end with their callers.

`ImageMemory` accounts for the memory of images: messages, uploads, fetched files and what decoding needs.
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

from img2img_server.codecs.jobs import Encode, Inspect, Inspected, Job, Loaded, LoadImage, file_of
from img2img_server.codecs.process import CodecProcess, ProcessDied
from img2img_server.errors import ImageMemoryFull, InvalidField, ServerError, ShuttingDown
from img2img_server.images import WriteFormat
from img2img_server.support.call import Call, current
from img2img_server.support.fair_queue import FairSlots, FairThreads

_RETRY = 1.0
"""Seconds after which to come back: decoding and receiving end soon."""


class ImageMemory:
    """A budget of bytes, of which `held` are accounted for now, and how many times some were `refused`. One client has half of it
    at most, so that others find some left. Used on one event loop; the numbers can be read anywhere."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.refused = 0
        self.held = 0
        self._of_calls: Counter[int] = Counter()
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def hold(self, call: Call, size: int) -> Iterator[None]:
        """Accounts for `size` bytes of `call` within the block. Raises ImageMemoryFull if there are fewer.

        What a call needs beside nothing else's of its client, or of anybody, it may always have: else a large image never could.
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
"""Makes a file, and gives its descriptor."""
Unpack = Callable[[object, int | None], Awaitable[_T]]
"""Reads a job's result and closes its file."""

_GRACE = 1.0
"""Seconds that a job whose caller has left goes on before its process is ended: a new process costs more than an ordinary job."""
_LONGEST = 60.0
"""Seconds after which a process is ended, whatever it does. Its limit of processor time comes first, unless it does not run."""
_COPYING = 4
"""Threads that copy large images to and from the processes."""
_QUICK = 2**20
"""Bytes that are copied on the event loop: in 0.3 ms."""


@dataclass(frozen=True, slots=True)
class StageStats:
    """Jobs of a stage that are in progress and that wait."""

    running: int
    waiting: int


class Processes:
    """Codec processes, `most` at a time, each made when it is first needed and replaced when it dies."""

    def __init__(self, most: int, make: Callable[[], CodecProcess]) -> None:
        self._slots = FairSlots(most)
        self._make = make
        self._idle: list[CodecProcess] = []
        self._all: set[CodecProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def stats(self) -> StageStats:
        """How busy they are."""
        return StageStats(self._slots.running, self._slots.waiting)

    async def start(self) -> None:
        """Makes the first process, so that the first job need not wait for it. Raises ProcessDied or OSError."""
        self._idle.append(await self._started())

    async def run(self, job: Job, pack: Pack, unpack: Unpack[_T], memory: ImageMemory | None = None) -> _T:
        """Runs a job of the current call in its turn, on the bytes that `pack` puts into a file. Returns what `unpack` makes of
        its result and its file. `memory` accounts for what the job asks for, None if it may have it.

        Raises what the job raises, ProcessDied or ShuttingDown. If the caller is cancelled, the job is ended after a moment; its
        slot and its memory are its client's until then.
        """
        left = asyncio.Event()
        try:
            return await self._slots.run(current().client, lambda: self._run(job, pack, unpack, memory, left))
        except asyncio.CancelledError:
            left.set()
            raise
        except ProcessDied:
            if self._closed:
                raise ShuttingDown("the server is shutting down") from None
            raise

    def kill(self) -> None:
        """Ends all of them at once, and waits for nothing."""
        self._closed = True
        for process in self._all:
            process.kill()

    async def close(self) -> None:
        """Ends all of them, whatever they do."""
        self.kill()
        await self._slots.settle()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.close() for process in self._all))
        self._all.clear()

    async def _run(self, job: Job, pack: Pack, unpack: Unpack[_T], memory: ImageMemory | None, left: asyncio.Event) -> _T:
        process = self._idle_one() or await self._started()
        guard = asyncio.create_task(self._guard(process, left))
        try:
            with ExitStack() as held:
                file = await pack()
                try:
                    value, answer = await process.run(job, file, lambda size: _hold(held, memory, size))
                finally:
                    os.close(file)
                return await unpack(value, answer)
        finally:
            guard.cancel()
            if process.alive and not self._closed:
                self._idle.append(process)
            else:
                self._replace(process)

    def _idle_one(self) -> CodecProcess | None:
        """A process that has nothing to do. Those that were ended from outside are replaced."""
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            self._replace(process)
        return None

    async def _guard(self, process: CodecProcess, left: asyncio.Event) -> None:
        """Ends a process if its caller has left or its job takes too long."""
        try:
            async with asyncio.timeout(_LONGEST):
                await left.wait()
            await asyncio.sleep(_GRACE)
        except TimeoutError:
            _log.warning("a codec took more than %g s: its process is ended", _LONGEST)
        process.kill()

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
        if self._closed:  # while it started
            await process.close()
            raise ShuttingDown("the server is shutting down")
        return process

    def _replace(self, dead: CodecProcess) -> None:
        """Starts another process in the background, so no job waits for it."""

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
    """Decodes and encodes images away from the event loop, in processes that can be ended.

    There are `decoders` processes for decoding and `encoders` for encoding. `memory` accounts for what decoding takes.
    `make` gives a process. Clients are those of FairSlots.
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
        """How busy each stage is, by its name."""
        return {"decode": self._decoders.stats, "encode": self._encoders.stats}

    async def start(self) -> None:
        """Starts a process for each stage. Raises OSError if that fails."""
        try:
            await asyncio.gather(self._decoders.start(), self._encoders.start())
        except ProcessDied as error:
            raise OSError(f"cannot start a codec process: {error}") from error

    async def load(self, data: bytes, job: LoadImage) -> tuple[Image.Image, bytes]:
        """The source image of a request, decoded and resized, and its digest. Raises InvalidField or ImageMemoryFull."""
        return await self._decode(data, job, self._loaded)

    async def inspect(self, data: bytes, job: Inspect) -> Inspected:
        """What an image file is. Raises InvalidField or ImageMemoryFull."""
        return await self._decode(data, job, _inspected)

    async def encode(self, image: Image.Image, file_format: WriteFormat, quality: int, record: str = "") -> bytes:
        """The file of an RGB image, with its `record` in it as images.encode has it."""
        size = image.width * image.height * 3
        job = Encode(image.size, file_format, quality, record)
        try:
            return await self._encoders.run(job, lambda: self._copy(size, _file_of_pixels, image), self._encoded)
        except ProcessDied as error:
            _log.error("an encoder failed: %s", error)
            raise ServerError("internal server error") from error

    def kill(self) -> None:
        """Ends all processes at once, and waits for nothing."""
        self._decoders.kill()
        self._encoders.kill()

    async def close(self) -> None:
        """Ends all processes, whatever they do."""
        await asyncio.gather(self._decoders.close(), self._encoders.close())
        self._threads.close()

    async def _decode(self, data: bytes, job: LoadImage | Inspect, unpack: Unpack[_T]) -> _T:
        try:
            return await self._decoders.run(job, lambda: self._copy(len(data), file_of, data), unpack, self.memory)
        except ProcessDied as error:
            raise InvalidField(job.field, _reason(error)) from None

    async def _loaded(self, value: object, file: int | None) -> tuple[Image.Image, bytes]:
        assert isinstance(value, Loaded), "the result of Load"
        assert file is not None, "an image has pixels"
        width, height = value.size
        return await self._copy(width * height * 3, _image_of, value.size, file), value.digest

    async def _encoded(self, value: object, file: int | None) -> bytes:
        assert file is not None, "a file has bytes"
        return await self._copy(os.fstat(file).st_size, _bytes_of, file)

    async def _copy(self, size: int, copy: Callable[..., _T], *arguments: object) -> _T:
        """Copies bytes: at once if that is quicker than going to a thread."""
        return copy(*arguments) if size <= _QUICK else await self._threads.run(copy, *arguments)


async def _inspected(value: object, file: int | None) -> Inspected:
    assert isinstance(value, Inspected), "the result of Inspect"
    return value


def _hold(held: ExitStack, memory: ImageMemory | None, size: int) -> Exception | None:
    """Accounts for what a job asks for until `held` is closed. Returns why it cannot have that, None if it can."""
    try:
        if memory is not None:
            held.enter_context(memory.hold(current(), size))
    except ImageMemoryFull as error:
        return error
    return None


def _reason(error: ProcessDied) -> str:
    """What a caller hears of a process that ended in the middle of its image."""
    if error.signal == signal.SIGPROF:
        return "decoding the image takes more processor time than its size allows"
    _log.error("a decoder failed: %s", error)
    if error.signal == signal.SIGKILL:
        return "decoding the image takes too much time or memory"
    return "the image cannot be decoded: it is damaged"


def _image_of(size: tuple[int, int], file: int) -> Image.Image:
    """The image whose raw RGB pixels are in a file, which is closed."""
    try:
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as pixels:
            return Image.frombytes("RGB", size, pixels)  # type: ignore[arg-type]
    finally:
        os.close(file)


def _file_of_pixels(image: Image.Image) -> int:
    """The descriptor of a file with the raw pixels of an RGB image."""
    return file_of(image.tobytes())


def _bytes_of(file: int) -> bytes:
    """The content of a file, which is closed."""
    with os.fdopen(file, "rb") as opened:
        return opened.read()
