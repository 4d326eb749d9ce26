"""Fair queueing of clients for a shared stage: decoding, encoding, fetching or reading. Used on one event loop."""

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from img2img_server.support.call import current

_T = TypeVar("_T")


class FairSlots:
    """A number of slots, each for one job at a time, shared fairly among clients.

    A free slot goes to the waiting client with the fewest jobs in progress; among equals, to the one that has used the stage the
    least since it arrived; within a client, in order of arrival. If there are at least two slots, a client can use all but one,
    so that another client's job starts at once. `running` and `waiting` count jobs and can be read on any thread. `clock` is in
    seconds.
    """

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.running = 0
        self.waiting = 0
        self._slots = slots
        self._most = max(1, slots - 1)
        self._clock = clock
        self._in_progress: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._used: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def slot(self, client: str) -> AsyncIterator[None]:
        """Waits for a slot and holds it within the block."""
        await self._acquire(client)
        began = self._clock()
        try:
            yield
        finally:
            self._release(client, self._clock() - began)

    async def run(self, client: str, work: Callable[[], Awaitable[_T]]) -> _T:
        """Runs `work` in a slot. If the caller is cancelled while it waits, it leaves the queue; work that has started keeps its
        slot to its end."""
        await self._acquire(client)
        # Not asyncio.shield: its callbacks would wake the event loop two more times for each job.
        result: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._tasks.add(asyncio.create_task(self._do(client, work, result)))
        return await result

    async def settle(self) -> None:
        """Waits until all work started by `run` has ended."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _do(self, client: str, work: Callable[[], Awaitable[_T]], result: "asyncio.Future[_T]") -> None:
        """Runs `work` in a slot, and sets its result or error unless the caller has left."""
        began = self._clock()
        try:
            value = await work()
        except asyncio.CancelledError:
            result.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            if not result.done():
                result.set_exception(error)
        else:
            if not result.done():
                result.set_result(value)
        finally:
            self._release(client, self._clock() - began)
            task = asyncio.current_task()
            assert task is not None, "run made one"
            self._tasks.discard(task)

    async def _acquire(self, client: str) -> None:
        self._used.setdefault(client, min(self._used.values(), default=0.0))
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self.waiting += 1
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(client, turn)
            else:  # granted at the same moment
                self._release(client, 0.0)
            raise

    def _release(self, client: str, seconds: float) -> None:
        self.running -= 1
        self._in_progress[client] -= 1
        self._used[client] += seconds
        self._grant()
        self._forget(client)

    def _leave(self, client: str, turn: "asyncio.Future[None]") -> None:
        if turn in self._waiting.get(client, ()):
            self._take(client, turn)
        self._forget(client)

    def _grant(self) -> None:
        """Assigns free slots to waiting jobs."""
        while self.running < self._slots:
            able = [client for client in self._waiting if self._in_progress[client] < self._most]
            if not able:
                return
            client = min(able, key=lambda client: (self._in_progress[client], self._used[client]))
            turn = self._waiting[client][0]
            self._take(client, turn)
            if not turn.done():
                self.running += 1
                self._in_progress[client] += 1
                turn.set_result(None)

    def _take(self, client: str, turn: "asyncio.Future[None]") -> None:
        """Removes a job from the queue."""
        self.waiting -= 1
        self._waiting[client].remove(turn)
        if not self._waiting[client]:
            del self._waiting[client]

    def _forget(self, client: str) -> None:
        """Removes a client without jobs: unused time is not saved for later, and its name takes no memory."""
        if not self._in_progress[client] and client not in self._waiting:
            del self._in_progress[client]
            self._used.pop(client, None)


class FairThreads:
    """Threads for short blocking work, shared fairly among clients."""

    def __init__(self, threads: int, name: str) -> None:
        self._slots = FairSlots(threads)
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)

    async def run(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Runs `work` on a thread, in the fair order of the current call's client."""
        loop = asyncio.get_running_loop()
        return await self._slots.run(current().client, lambda: loop.run_in_executor(self._threads, work, *arguments))

    def close(self) -> None:
        """Cancels queued work. Does not wait for running work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
