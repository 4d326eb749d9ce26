"""The queue's order equals a full sort of the waiting requests after any arrivals, departures and changes; its sums are exact."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from fakes import make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.engine.forecasts import Backlog, group_sums
from img2img_server.engine.policy import Job, in_order
from img2img_server.engine.queue import Queue
from img2img_server.engine.ranked import NO_LINE, Line, LineSums, RampSum, Rank, RankedList
from img2img_server.engine.request import Plan, Ticket

CLIENTS = ["", "a", "b", "c"]


def make_job(number: int, steps: int, client: str = "", **settings: object) -> Job:
    values: dict[str, object] = {"pixels": 64, "rows": 1, "deadline": None, "step_seconds": 1.0, "setup": 0.0, "ending": 0.0}
    return Job(number=number, group=("m", 0), steps_left=steps, client=client, **{**values, **settings})  # type: ignore[arg-type]


def ticket_of(job: Job) -> Ticket:
    request = make_request(client=job.client, background=job.background, deadline=job.deadline)
    return Ticket(request, Plan(0, 64, 1, int(job.steps_left)), lambda event: None, job.number, 0.0)


@dataclass(slots=True)
class Sorted:
    """The waiting requests, of clients with active ones or without, in a queue and in a list."""

    queue: Queue = field(default_factory=lambda: Queue(Backlog(lambda job, rows: 1.0)))
    tickets: dict[int, Ticket] = field(default_factory=dict)
    jobs: dict[int, Job] = field(default_factory=dict)
    active: list[Job] = field(default_factory=list)

    def add(self, job: Job, now: float) -> None:
        self.tickets[job.number], self.jobs[job.number] = ticket_of(job), job
        self.queue.add(self.tickets[job.number], replace(job), now)

    def remove(self, number: int) -> None:
        self.queue.remove(self.tickets.pop(number))
        del self.jobs[number]

    def admit(self, number: int) -> None:
        self.active.append(self.jobs[number])
        self.remove(number)
        self.queue.activate(self.active[-1].client)

    def end(self, index: int) -> None:
        self.queue.deactivate(self.active.pop(index).client)

    def order(self, now: float) -> list[int]:
        return [ticket.number for ticket in self.queue.in_order(now, self.ahead(now))]

    def ahead(self, now: float):  # type: ignore[no-untyped-def]
        def ahead(job: Job) -> float:
            mine = [other for other in self.active if other.client == job.client]
            return sum(other.seconds_left for other in mine if other.rank(now) < job.rank(now))

        return ahead

    def expected(self, now: float) -> list[int]:
        """All waiting and active requests sorted by the policy; those of clients without an active one first."""
        served = {job.client for job in self.active} - {""}
        line = [job for job in in_order([*self.active, *self.jobs.values()], {}, now) if job.number in self.jobs]
        return [job.number for job in sorted(line, key=lambda job: (job.background, job.client in served))]


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 60), st.booleans())
def test_queue_order_equals_a_full_sort(source: random.Random, count: int, deadlines: bool) -> None:
    """Without usage, and with deadlines that are urgent only for requests without a client: the queue keeps a client's line
    together if a deadline of it is no longer urgent because of the requests ahead."""
    now, it = 0.0, Sorted()
    for number in range(count):
        background = source.random() < 0.1
        client = "" if background else source.choice(CLIENTS)
        deadline = source.choice([None, 20.0, 50.0, 1000.0]) if deadlines and not client else None
        it.add(make_job(number, source.randrange(1, 20), client, deadline=deadline, background=background), now)
        what = source.random()
        if what < 0.2 and it.jobs:
            it.remove(source.choice(list(it.jobs)))
        elif what < 0.5 and it.jobs:
            it.admit(source.choice(list(it.jobs)))
        elif what < 0.6 and it.active:
            it.end(source.randrange(len(it.active)))
        now += source.random()
        for ticket in it.queue.expired(now):
            it.remove(ticket.number)
        assert it.order(now) == it.expected(now), (it.jobs, it.active)
        assert it.queue.seconds == pytest.approx(sum(job.seconds_left for job in it.jobs.values()))
    for number in list(it.jobs):
        it.remove(number)
    assert (len(it.queue), it.queue.seconds, it.order(now)) == (0, 0.0, [])


def test_urgent_deadlines_move_to_the_front_and_passed_ones_expire() -> None:
    it = Sorted()
    for number, deadline in enumerate([None, 100.0, 90.0]):
        it.add(make_job(number, 10 - number, deadline=deadline), 0.0)
    assert it.order(0.0) == [2, 1, 0]
    assert it.queue.expired(63.0) == []
    assert it.order(63.0) == [2, 1, 0], "the shortest first; 4 x 9 s before 100 s the other becomes urgent"
    it.add(make_job(3, 1), 65.0)
    assert it.queue.expired(65.0) == []
    assert it.order(65.0) == [2, 1, 3, 0], "both are urgent, the earlier deadline first"
    assert [ticket.number for ticket in it.queue.expired(90.0)] == [2]


def test_equal_requests_keep_the_order_of_arrival_while_their_costs_drift() -> None:
    it, source = Sorted(), random.Random(1)
    for number in range(300):
        it.add(make_job(number, 20, step_seconds=source.uniform(0.9, 1.09)), 0.0)
    assert it.order(0.0) == list(range(300))


def test_requests_with_changed_costs_are_reordered() -> None:
    it = Sorted()
    for number in range(10):
        it.add(make_job(number, 5), 0.0)
    it.add(make_job(10, 5, step_seconds=0.1), 0.0)
    assert it.order(0.0)[0] == 10, "of what was known before"
    for ticket in it.queue.forecast_before(0.0, 100):
        it.queue.update(ticket, make_job(ticket.number, 5, step_seconds=0.1), 1.0)
    assert it.order(0.0) == list(range(11))
    assert it.queue.forecast_before(0.5, 100) == []


@pytest.mark.parametrize(
    "clients", [[""], ["a"], [f"client {number}" for number in range(400)]], ids=["none", "one", "a client each"]
)
def test_position_is_exact_for_one_client_and_for_first_requests(clients: Sequence[str]) -> None:
    it, source = Sorted(), random.Random(2)
    for number in range(300):
        it.add(make_job(number, source.randrange(1, 20), clients[number % len(clients)]), 0.0)
    order = it.order(0.0)
    for number in source.sample(range(300), 30):
        count, seconds, _ = it.queue.ahead_of(it.jobs[number], 0.0)
        before = order[: order.index(number)]
        assert count == len(before)
        assert seconds == pytest.approx(sum(it.jobs[other].seconds_left for other in before))


@pytest.mark.parametrize("active", [0, 2, 10])
def test_position_among_many_clients_is_approximate(active: int) -> None:
    """Admission over time: the first request of the order is admitted, and then counts as active."""
    it, source = Sorted(), random.Random(3)
    for number in range(400):
        it.add(make_job(number, source.randrange(1, 20), f"client {source.randrange(10)}"), 0.0)
    for client in range(active):
        it.admit(next(number for number, job in it.jobs.items() if job.client == f"client {client}"))
    told = {number: it.queue.ahead_of(job, 0.0)[0] for number, job in it.jobs.items()}
    for position in itertools.count():
        if not it.jobs:
            break
        number = it.order(0.0)[0]
        it.admit(number)
        assert abs(told[number] - position) < 80, "of 400"


RANKS = st.tuples(st.booleans(), st.floats(0, 10), st.floats(0, 10), st.integers(0, 10**6))


@settings(deadline=None)
@given(st.lists(RANKS, unique=True, max_size=400), st.randoms(use_true_random=False))
def test_ranked_list_is_a_sorted_list(ranks: list[Rank], source: random.Random) -> None:
    ranked: RankedList[Rank] = RankedList()
    for rank in ranks:
        ranked.add(rank, rank[1], rank)
    left = sorted(ranks)
    while left:
        assert list(ranked) == left
        assert [rank for rank, _ in ranked.ranks] == left
        rank = source.choice(left)
        count, seconds = ranked.before(rank)
        assert count == left.index(rank)
        assert seconds == pytest.approx(sum(other[1] for other in left[:count]))
        assert ranked.seconds == pytest.approx(sum(other[1] for other in left))
        for other in source.sample(left, min(len(left), 150)):
            ranked.remove(other)
            left.remove(other)
    assert (len(ranked), ranked.seconds) == (0, 0.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 100), st.floats(0, 10)), max_size=20), st.floats(0, 300))
def test_ramp_sum_approximates_the_sum_of_its_ramps(ramps: list[tuple[float, float, float]], x: float) -> None:
    total = RampSum()
    for begin, length, height in ramps:
        total.add(begin, begin + length, height)
    exact = sum(min(height, height * max(0.0, x - begin) / length) for begin, length, height in ramps)
    near = sum(height for begin, length, height in ramps if x / 1.3 - 0.01 < begin + length and begin < 1.3 * x + 0.01)
    assert total.at(x) == pytest.approx(exact, abs=near + 1e-6)
    assert total.at(x, [(begin, begin + length, height) for begin, length, height in ramps]) == pytest.approx(0.0, abs=1e-6)
    for begin, length, height in ramps:
        total.remove(begin, begin + length, height)
    assert total.at(x) == 0.0


def test_line_sums_equal_the_sum_of_their_lines() -> None:
    lines = [Line(2.0, 30.0, 7, 0), Line(3.0, 60.0, 10, 1), Line(5.0, 5.0, 1, 1)]
    sums = LineSums()
    for line in lines:
        sums.add(line)
    assert sums.done(1000.0, NO_LINE) == pytest.approx((7 + 9, 30.0 + 57.0))
    assert sums.done(1000.0, lines[1]) == pytest.approx((7, 30.0))
    assert sums.done(0.0, NO_LINE) == pytest.approx((0.0, 0.0))
    sums.remove(lines[1])
    assert 3 < sums.done(12.0, NO_LINE)[0] < 5, "the first ones take less than a seventh each"
    assert sums.done(12.0, NO_LINE)[1] == pytest.approx(12.0)
    assert sums.done(12.0, lines[0]) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_backlog_counts_shared_calls_once() -> None:
    """Two rows in a call take as long as one."""
    backlog = Backlog(lambda job, rows: 1.0 if rows == 1 else 0.5)
    jobs = [make_job(0, 10), make_job(1, 10), make_job(2, 4, setup=1.0, ending=2.0)]
    other = replace(make_job(3, 8), group=("m", 1))
    backlog.add(jobs[0])
    assert backlog.seconds({}) == 10.0
    backlog.add(jobs[1])
    backlog.add(other)
    assert backlog.seconds({}) == 10.0 + 8.0
    assert backlog.seconds(group_sums([jobs[2]])) == 12.0 + 3.0 + 8.0
    assert backlog.seconds(group_sums([replace(other, group=("m", 2))])) == 10.0 + 8.0 + 8.0
    for job in (jobs[0], other, jobs[1]):
        backlog.remove(job)
    assert backlog.seconds({}) == 0.0
