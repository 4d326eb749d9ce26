"""The front over scripted replicas: each request ends exactly once, also if its replica fails."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from fake_replicas import IDLE, LOST, Caller, loads, rig
from img2img_server.backends.ray.messages import Load, ReplicaLeft
from img2img_server.engine.request import Completed, Event, Failed, Progress, Queued, Started, Timings
from img2img_server.errors import (
    ClientBusy,
    DeadlineExpired,
    DeadlineUnmeetable,
    EngineStuck,
    ModelFailed,
    NoReplica,
    QueueFull,
    RequestCancelled,
    ShuttingDown,
)


def steps(events: Sequence[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Progress)]


STEPS = tuple(Progress(number, 3, None, None) for number in (1, 2, 3))
LIFE: tuple[Event, ...] = (Queued(0, 1.0), Started(3), *STEPS)
END = Completed((), Timings(0, 0, 0, 0))
"""The end of scripts: the replica returns the job's image."""


@pytest.mark.parametrize("told_before", range(len(LIFE) + 1))
@pytest.mark.parametrize("told_again", range(len(LIFE) + 1))
async def test_caller_sees_one_event_sequence_despite_lost_replicas(told_before: int, told_again: int) -> None:
    """The first dies after some events, the second after some others, the third sees it through."""
    async with rig((*LIFE[:told_before], LOST), (*LIFE[:told_again], LOST), (*LIFE, END)) as it:
        events = await it.run(seeds=(5, 6))
    assert steps(events) == [1, 2, 3]
    assert sum(isinstance(event, Started) for event in events) == 1
    kinds = [type(event) for event in events]
    assert kinds[kinds.index(Started) :] == [Started, Progress, Progress, Progress, Completed]
    assert set(kinds[: kinds.index(Started)]) == {Queued}
    assert [job.request.seeds for job in it.replicas.jobs] == [(5, 6)] * 3
    assert len({(job.request.id, job.request.prompt, job.request.image.tobytes()) for job in it.replicas.jobs}) == 1


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("end", [LOST, Failed(ShuttingDown("draining")), Failed(EngineStuck("stuck"))])
async def test_requests_of_a_lost_replica_are_retried_on_another(follow: bool, end: Exception | Failed) -> None:
    async with rig((end,), (END,)) as it:
        (*_, ending) = await it.run(follow=follow)
    assert isinstance(ending, Completed)
    assert len(it.replicas.jobs) == 2


async def test_incomplete_stream_is_retried_on_another_replica() -> None:
    async with rig(LIFE[:2], (*LIFE, END)) as it:
        assert steps(await it.run()) == [1, 2, 3]


async def test_request_error_is_final_and_keeps_its_details() -> None:
    async with rig((Failed(DeadlineUnmeetable("too late", 12.5)),)) as it:
        error = await it.submit(deadline=3.0).error()
    assert isinstance(error, DeadlineUnmeetable)
    assert error.estimate == 12.5
    assert len(it.replicas.jobs) == 1
    assert it.replicas.jobs[0].seconds_left == 3.0


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("end", [LOST, Failed(EngineStuck("stuck"))])
async def test_a_request_that_crashes_three_replicas_fails_and_is_not_retried(
    end: Exception | Failed, follow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2img_server.backends.ray.front._PAUSE", 0.0)
    async with rig(*([(end,)] * 50)) as it:
        error = await it.submit(follow=follow).error()
    assert isinstance(error, ModelFailed)
    assert len(it.replicas.jobs) == 3


@pytest.mark.parametrize("end", [ReplicaLeft("nobody is there"), Failed(ShuttingDown("draining"))])
async def test_retries_on_leaving_replicas_are_bounded(end: Exception | Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.backends.ray.front._PAUSE", 0.0)
    async with rig(*([(end,)] * 50)) as it:
        error = await it.submit().error()
    assert isinstance(error, NoReplica)
    assert error.retry_after is not None
    assert 3 < len(it.replicas.jobs) < 10


async def test_deadline_bounds_retries_and_each_gets_the_remaining_time() -> None:
    async with rig((LOST,), (LOST,), (LOST,)) as it:

        async def pass_time() -> None:
            it.clock.now += 2.0

        it.replicas.before = pass_time
        assert isinstance(await it.submit(deadline=3.0).error(), DeadlineExpired)
    assert [job.seconds_left for job in it.replicas.jobs] == [3.0, 1.0]


async def test_unexpected_errors_end_the_request_without_internal_text() -> None:
    async with rig((RuntimeError("a path on our disk"),)) as it:
        error = await it.submit().error()
    assert (type(error), str(error)) == (ModelFailed, "the server failed")


@pytest.mark.parametrize("follow", [False, True])
async def test_cancelling_cancels_the_replicas_call(follow: bool) -> None:
    async with rig((*LIFE[:3], asyncio.Event())) as it:
        caller = it.submit(follow=follow)
        await it.replicas.came.wait()
        caller.accepted.ticket.cancel()
        assert isinstance(await caller.error(), RequestCancelled)
        caller.accepted.ticket.cancel()  # harmless
    assert it.replicas.cancelled == it.replicas.jobs


async def test_requests_cancelled_at_once_are_never_sent() -> None:
    async with rig() as it:
        caller = it.submit()
        caller.accepted.ticket.cancel()
        assert isinstance(await caller.error(), RequestCancelled)
    assert it.replicas.jobs == []


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    go = asyncio.Event()
    async with rig((go, END)) as it:
        caller = it.submit()
        await it.replicas.came.wait()
        assert not await it.front.drain(0)
        with pytest.raises(ShuttingDown), it.front.reserve("c"):
            pass
        go.set()
        assert await it.front.drain(60)
        assert isinstance((await caller.over())[-1], Completed)


async def test_abandoned_requests_each_get_their_own_error_object() -> None:
    async with rig((asyncio.Event(),), (asyncio.Event(),)) as it:
        callers = [it.submit(), it.submit()]
        await it.replicas.came.wait()
        error = ShuttingDown("the server stopped")
        await it.front.abandon(error)
        told = [await caller.error() for caller in callers]
        assert [str(one) for one in told] == ["the server stopped"] * 2
        assert len({id(one) for one in (*told, error)}) == 3
        with pytest.raises(ShuttingDown):
            it.submit()


async def test_without_replicas_requests_are_refused_with_a_retry_delay() -> None:
    async with rig() as it:
        loads(it)
        await it.roster.poll()
        with pytest.raises(NoReplica) as refused, it.front.reserve():
            pass
        assert refused.value.status == "UNAVAILABLE"
        assert refused.value.retry_after is not None
        assert it.serving == {"m": False}
        loads(it, IDLE)
        await it.roster.poll()
        assert it.serving == {"m": True}
        assert isinstance((await it.run())[-1], Completed)


async def test_replicas_too_busy_for_a_poll_still_get_requests() -> None:
    async with rig(max_waiting=4, max_active=1) as it:
        loads(it, Load(9.0, 3, 1, ("m",)), Load(9.0, 2, 1, ("m",)))
        await it.roster.poll()
        it.replicas.slow = {"r0", "r1"}
        it.clock.now += 5
        await it.roster.poll()
        assert it.serving == {"m": True}
        assert it.front.stats.waiting == 5
        assert isinstance((await it.run())[-1], Completed)
        it.clock.now += 61  # the time that a replica may be silent
        await it.roster.poll()
        it.front.check_replicas()
        assert it.serving == {"m": False}
        with pytest.raises(NoReplica):
            it.submit()


async def test_lost_slow_replica_is_removed_at_the_next_poll() -> None:
    async with rig() as it:
        it.replicas.slow = {"r0", "r1"}
        await it.roster.poll()
        it.replicas.looks = {}
        await it.roster.poll()
        assert it.serving == {"m": False}
        with pytest.raises(NoReplica):
            it.submit()


async def test_stuck_replica_is_not_counted() -> None:
    """Its work is infinite, so it is neither added to the others' nor used for a retry delay."""
    stuck = Load(math.inf, 0, 0, ())
    async with rig(max_waiting_seconds=10.0) as it:
        loads(it, stuck, Load(2.0, 1, 0, ("m",)))
        await it.roster.poll()
        assert (it.front.stats.work_seconds, it.front.stats.waiting) == (2.0, 1)
        loads(it, stuck)
        await it.roster.poll()
        with pytest.raises(NoReplica), it.front.reserve():
            pass
        assert it.serving == {"m": False}
        assert it.front.stats.work_seconds is None


async def test_waiting_for_a_replica_ends_with_an_error() -> None:
    async with rig((asyncio.Event(),)) as it:
        caller = it.submit()
        await it.replicas.came.wait()
        loads(it)
        await it.roster.poll()
        it.front.check_replicas()
        assert caller.events == []
        it.clock.now += 61
        await it.roster.poll()
        it.front.check_replicas()
        assert isinstance(await caller.error(), NoReplica)


async def test_total_queue_of_all_fronts_is_limited() -> None:
    """Other fronts' requests are in the replicas' reports; this front's own count at once, before the next poll."""
    async with rig(max_waiting=2, max_active=1) as it:
        loads(it, Load(9.0, 1, 1, ("m",)), Load(9.0, 2, 1, ("m",)))
        await it.roster.poll()
        with it.front.reserve("a"):
            with pytest.raises(QueueFull) as full, it.front.reserve("b"):
                pass
            assert full.value.retry_after > 0
        with it.front.reserve("b"):
            pass
        it.replicas.scripts = [(asyncio.Event(),)]
        caller = it.submit()
        with pytest.raises(QueueFull):
            it.submit()
        caller.accepted.ticket.cancel()


async def test_last_queue_slots_of_all_replicas_are_for_new_clients() -> None:
    async with rig(max_waiting=4, max_active=1) as it:
        loads(it, Load(9.0, 3, 1, ("m",)), Load(9.0, 4, 1, ("m",)))
        await it.roster.poll()
        with it.front.reserve("few"), pytest.raises(QueueFull), it.front.reserve("other"):
            pass
        loads(it, Load(9.0, 3, 1, ("m",)), Load(9.0, 3, 1, ("m",)))
        await it.roster.poll()
        with it.front.reserve("many"):
            with pytest.raises(QueueFull), it.front.reserve("many"):
                pass
            with it.front.reserve("few"):
                pass


async def test_requests_that_idle_engines_take_at_once_do_not_wait() -> None:
    async with rig(*([(asyncio.Event(),)] * 5), max_waiting=1, max_active=2) as it:
        callers = [it.submit() for _ in range(5)]
        with it.front.reserve("a"), pytest.raises(QueueFull):
            it.submit()
        for caller in callers:
            caller.accepted.ticket.cancel()


async def test_queue_is_full_if_every_replica_exceeds_the_work_limit() -> None:
    async with rig(max_waiting_seconds=10.0) as it:
        loads(it, Load(25.0, 0, 1, ("m",)), Load(9.0, 0, 1, ("m",)))
        await it.roster.poll()
        assert isinstance((await it.run())[-1], Completed)
        loads(it, Load(25.0, 0, 1, ("m",)), Load(14.0, 0, 1, ("m",)))
        await it.roster.poll()
        with pytest.raises(QueueFull, match=r"takes about 14\.0 s") as full:
            it.submit()
        assert full.value.retry_after == 4.0


async def test_client_limit_counts_requests_until_the_response_is_sent() -> None:
    async with rig(max_client_waiting=2) as it:
        with it.front.reserve("a") as place:
            caller = Caller(it.front, place, client="a")
            with it.front.reserve("a"):
                with pytest.raises(ClientBusy), it.front.reserve("a"):
                    pass
                with it.front.reserve("b"):
                    pass
            assert isinstance((await caller.over())[-1], Completed)  # it is still being sent
            with it.front.reserve("a"), pytest.raises(ClientBusy), it.front.reserve("a"):
                pass
        with it.front.reserve("a"), it.front.reserve("a"):
            pass


async def test_metrics_sum_over_all_replicas() -> None:
    async with rig() as it:
        loads(it, Load(2.0, 1, 2, ("m",)), Load(None, 3, 4, ("m",)))
        await it.roster.poll()
        with it.front.reserve():
            stats = it.front.stats
    assert (stats.waiting, stats.active, stats.work_seconds, stats.arriving) == (4, 6, 2.0, 1)
