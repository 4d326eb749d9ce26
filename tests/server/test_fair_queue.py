"""Fair queueing: the order of jobs, counted and not timed."""

import asyncio
from collections.abc import Callable

import pytest
from fakes import Clock
from img2img_server.support.call import Call, answering
from img2img_server.support.fair_queue import FairSlots, FairThreads


class Stage:
    """Jobs that end on demand."""

    def __init__(self, slots: int) -> None:
        self.clock = Clock()
        self.slots = FairSlots(slots, self.clock)
        self.order: list[str] = []
        self._ends: dict[str, list[asyncio.Event]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def add(self, client: str, count: int = 1) -> None:
        for _ in range(count):
            self.tasks.append(asyncio.create_task(self.slots.run(client, lambda: self._work(client))))

    async def _work(self, client: str) -> None:
        self.order.append(client)
        end = asyncio.Event()
        self._ends.setdefault(client, []).append(end)
        await end.wait()

    async def end(self, client: str, seconds: float = 1.0) -> None:
        """Ends a client's oldest job, which took so many seconds."""
        self.clock.now += seconds
        self._ends[client].pop(0).set()
        await settle()

    async def finish(self) -> None:
        while any(not task.done() for task in self.tasks):
            for client in list(self._ends):
                if self._ends[client]:
                    await self.end(client)
            await settle()


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_client_with_few_jobs_runs_next_beside_a_greedy_one() -> None:
    stage = Stage(3)
    stage.add("greedy", 60)
    await settle()
    assert stage.order == ["greedy"] * 2, "one slot is left"
    stage.add("small")
    await settle()
    assert stage.order[2:] == ["small"], "it does not wait at all"
    for _ in range(5):
        await stage.end("small")
        stage.add("small")
        await settle()
        assert stage.order[-1] == "small"
    await stage.finish()
    assert (stage.order.count("greedy"), stage.order.count("small")) == (60, 6)


@pytest.mark.parametrize("slots", [1, 2, 4])
async def test_new_client_runs_next_beside_many_greedy_ones(slots: int) -> None:
    stage = Stage(slots)
    for number in range(6):
        stage.add(f"greedy {number}", 10)
    await settle()
    assert len(stage.order) == slots
    stage.add("small")
    await settle()
    while "small" not in stage.order:
        await stage.end(stage.order[-1], 5.0)
    before = stage.order[slots : stage.order.index("small")]
    assert all(before.count(client) == 1 for client in before), "each of the others had one more job at most"
    await stage.finish()
    assert len(stage.order) == 61


async def test_clients_share_time_equally_whatever_their_jobs_cost() -> None:
    stage = Stage(1)
    stage.add("heavy", 20)
    stage.add("light", 60)
    await settle()
    costs = {"heavy": 10.0, "light": 1.0}
    for _ in range(44):
        await stage.end(stage.order[-1], costs[stage.order[-1]])
    heavy, light = stage.order.count("heavy"), stage.order.count("light")
    assert abs(heavy * 10 - light) <= 11, "seconds are shared, not jobs"
    await stage.finish()


async def test_jobs_of_one_client_run_in_order() -> None:
    slots, order = FairSlots(2), list[int]()

    async def note(number: int) -> None:
        order.append(number)

    await asyncio.gather(*(slots.run("one", lambda number=number: note(number)) for number in range(20)))  # type: ignore[misc]
    assert order == list(range(20))
    assert (slots.running, slots.waiting) == (0, 0)
    assert not slots._used, "names of clients that have gone are forgotten"
    assert not slots._in_progress


@pytest.mark.parametrize("leave", ["waiting", "granted", "running"])
async def test_cancelled_job_returns_its_slot_exactly_once(leave: str) -> None:
    stage = Stage(1)
    stage.add("first")
    await settle()
    stage.add("leaves")
    await settle()
    if leave == "waiting":
        stage.tasks[1].cancel()
    if leave == "granted":
        stage._ends["first"][0].set()
        while stage.slots.waiting:  # noqa: ASYNC110 - it counts without an event
            await asyncio.sleep(0)
        stage.tasks[1].cancel()
    if leave == "running":
        await stage.end("first")
        stage.tasks[1].cancel()
    await settle()
    stage.add("last")
    for client in ("first", "leaves"):
        for end in stage._ends.get(client, []):
            end.set()
    await settle()
    assert stage.order[-1] == "last"
    stage._ends["last"][0].set()
    await settle()
    assert (stage.slots.running, stage.slots.waiting) == (0, 0)


async def test_threads_are_shared_fairly_between_clients() -> None:
    threads, order = FairThreads(1, "test"), list[str]()

    def work(client: str) -> Callable[[], None]:
        return lambda: order.append(client)

    tasks = []
    for client in [*["greedy"] * 5, "small"]:
        with answering(Call("", "", client=client)):
            tasks.append(asyncio.create_task(threads.run(work(client))))
    await asyncio.gather(*tasks)
    threads.close()
    assert order.index("small") <= 1
