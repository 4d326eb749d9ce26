"""Fair queueing between clients: latency of one request beside another client's many, on a device with a manual clock."""

import random
from collections.abc import Sequence

import pytest
from fakes import Caller, Clock, FakePipeline, make_engine, make_request, run_out
from img2img_server.engine.costs import Costs
from img2img_server.engine.engine import Engine
from img2img_server.engine.policy import Job, Policy, charge, in_order
from img2img_server.engine.request import Completed, Event
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp

CURVE = {1: 0.0051, 2: 0.0051, 4: 0.0057, 8: 0.0125, 16: 0.0249}
"""Seconds of a call by rows: roughly the published times of an H200."""


class Device:
    """An engine on a simulated device, and a client that keeps `flood` requests in it."""

    def __init__(
        self, flood: int, steps: Sequence[int], deadline: float | None = None, max_rows: int | None = None, **limits: int
    ) -> None:
        self.flood, self.steps, self.deadline = flood, steps, deadline
        self.alive, self.clock, self.source = 0, Clock(), random.Random(1)
        pipeline = FakePipeline(self.clock, lambda rows: CURVE[min(size for size in CURVE if size >= rows)], max_rows)
        self.engine = Engine({"m": pipeline}, QueueLimits(max_client_waiting=1000, **limits), self.clock)
        self.engine.costs.adopt("m", WarmUp(16, 100.0, self.clock).measure("m", pipeline))

    def top_up(self) -> None:
        """Has the flood at its full height."""
        while self.alive < self.flood:
            self.alive += 1
            deadline = None if self.deadline is None else self.clock.now + self.deadline
            steps = self.source.choice(self.steps)
            request = make_request(num_inference_steps=steps, seeds=(0, 1), client="flood", deadline=deadline)
            self.engine.submit(request, self._ended)

    def _ended(self, event: Event) -> None:
        self.alive -= type(event).__name__ in ("Completed", "Failed")

    def seconds(self, steps: int) -> float:
        """The duration of another client's request during the flood."""
        came, done = self.clock.now, list[float]()

        def listen(event: Event) -> None:
            if isinstance(event, Completed):
                done.append(self.clock.now - came)

        self.engine.submit(make_request(num_inference_steps=steps, seeds=(0, 1), client="small"), listen)
        for _ in range(20_000):
            if done:
                return done[0]
            self.top_up()
            self.engine.step()
        return float("inf")


@pytest.mark.parametrize(("steps", "of_flood"), [(20, (20,)), (50, (4, 8, 20, 50)), (50, (4,)), (4, (50,))])
@pytest.mark.parametrize("max_rows", [None, 2])
def test_latency_does_not_depend_on_another_clients_flood(steps: int, of_flood: tuple[int, ...], max_rows: int | None) -> None:
    took = []
    for flood in (10, 100, 200):
        device = Device(flood, of_flood, max_rows=max_rows)
        device.top_up()
        for _ in range(30):
            device.engine.step()
            device.top_up()
        took.append([device.seconds(steps) for _ in range(5)])
    few, many, more = (max(times) for times in took)
    assert max(many, more) <= 2 * few + 0.5, "ten or twenty times as many requests do not take it longer"
    # Half of a device whose calls it may have alone, after it gets a slot.
    assert more <= 6 * steps * CURVE[2] + 50 * CURVE[16], "and it has its share of the device"


def test_starved_requests_do_not_take_another_clients_turn() -> None:
    flood = [Job(number, ("m", "large"), 1, 1, 50, None, 1.0, 0.0, 0.0, passed_over=100, client="flood") for number in range(10)]
    small = Job(10, ("m", "small"), 1, 1, 4, None, 1.0, 0.0, 0.0, client="small")
    policy = Policy(Costs(), 16)
    while small.steps_left:
        assert policy.next_batch([*flood, small], 0, {"m": None}, 0.0) == [small]
        small.steps_left -= 1


def test_heavy_client_joins_anothers_batch_only_if_that_is_cheap() -> None:
    costs, group = Costs(), ("m", "shape")
    for rows in range(1, 17):
        costs.measured("denoise", group, 1, rows, 0.9 + 0.1 * rows)
    flood = [Job(number, group, 1, 1, 50, None, 1.0, 0.0, 0.0, client="flood") for number in range(15)]
    small, policy = Job(15, group, 1, 1, 4, None, 1.0, 0.0, 0.0, client="small"), Policy(costs, 16)
    together = policy.next_batch([*flood, small], 0, {"m": None}, 0.0)
    assert len(together) > 12, "nobody had more than another"
    for _ in range(5):
        policy.next_batch(flood, 0, {"m": None}, 0.0)
    batch = policy.next_batch([*flood, small], 0, {"m": None}, 0.0)
    assert batch[0] == small
    assert len(batch) == 6, "a call of six takes half as long again as one alone"


def test_deadlines_on_every_request_do_not_starve_others() -> None:
    device = Device(60, (20,), deadline=4.0)
    device.top_up()
    assert device.seconds(50) < 10 * 50 * CURVE[2]


def test_eta_accounts_for_fair_queueing() -> None:
    """The ETA beside another client's flood is accurate, so the flood causes no deadline to be refused."""
    device = Device(40, (20,), max_active=64)
    device.top_up()
    for _ in range(12):
        device.engine.step()
    device.flood = 0
    eta = device.engine.submit(make_request(num_inference_steps=20, seeds=(0, 1), client="other"), lambda event: None).eta
    whole = device.engine.stats.work_seconds
    assert eta is not None
    assert whole is not None
    assert eta < whole / 2


def test_eta_beside_shorter_requests_is_accurate() -> None:
    engine, pipeline, clock = make_engine(max_rows=1)
    engine.costs.adopt("m", WarmUp(1, 100.0, clock).measure("m", pipeline))
    Caller(engine).submit(num_inference_steps=1)
    run_out(engine)
    for _ in range(10):
        Caller(engine).submit(num_inference_steps=20, client="many")
    begun, caller = clock.now, Caller(engine).submit(num_inference_steps=50, client="one")
    assert caller.ticket is not None
    while not caller.endings:
        engine.step()
    assert caller.ticket.forecast is not None
    # With all of the others' it would be 1.9 times as much. It excludes calls led by requests that were passed over often.
    assert 0.6 < caller.ticket.forecast / (clock.now - begun) < 1.4
    engine.close()


def test_client_without_running_requests_is_admitted_first() -> None:
    engine, pipeline, _ = make_engine(QueueLimits(max_active=2, max_batch_size=1, max_admitted=1))
    for steps in (3, 4):
        Caller(engine).submit(num_inference_steps=steps, client="many")
        engine.step()
    for _ in range(4):
        Caller(engine).submit(num_inference_steps=1, client="many")
    ticket = Caller(engine).submit(num_inference_steps=50, client="one", prompt="new").ticket
    assert ticket is not None
    assert ticket.position == 0
    while len(pipeline.prepared) < 3:
        engine.step()
    assert pipeline.prepared[-1].request.prompt == "new"
    engine.close()


def job(number: int, steps: int, client: str, **settings: object) -> Job:
    values: dict[str, object] = {"pixels": 64, "rows": 1, "deadline": None, "step_seconds": 1.0, "setup": 0.0, "ending": 0.0}
    return Job(number=number, group=("m", 0), steps_left=steps, client=client, **{**values, **settings})  # type: ignore[arg-type]


def order(jobs: list[Job], usage: dict[str, float] | None = None) -> list[int]:
    return [item.number for item in in_order(jobs, usage or {}, 0.0)]


@pytest.mark.parametrize("client", ["", "one"])
def test_requests_of_one_client_are_ordered_by_rank(client: str) -> None:
    source = random.Random(3)
    jobs = [
        job(
            number, source.randrange(1, 50), client, deadline=source.choice([None, 10.0, 100.0]), background=source.random() < 0.1
        )
        for number in range(50)
    ]
    assert order(jobs) == [item.number for item in sorted(jobs, key=lambda item: item.rank(0.0))]


def test_requests_of_different_clients_interleave() -> None:
    jobs = [job(1, 4, "a"), job(2, 4, "a"), job(3, 4, "a"), job(4, 7, "b"), job(5, 9, "")]
    assert order(jobs) == [1, 4, 2, 5, 3]


def test_clients_with_more_usage_are_served_later() -> None:
    assert order([job(1, 4, "a"), job(2, 7, "b")], {"a": 5.0}) == [2, 1]


def test_only_one_urgent_request_per_client_comes_first() -> None:
    jobs = [job(1, 4, "a", deadline=9.0), job(2, 4, "a", deadline=10.0), job(3, 4, "a", deadline=11.0), job(4, 6, "b")]
    assert order(jobs) == [1, 2, 4, 3]


def test_idle_clients_gain_no_credit_and_new_clients_start_last() -> None:
    a, b, c = job(1, 4, "a"), job(2, 4, "b"), job(3, 4, "c")
    usage = charge({}, [a, b], [a], 3.0)
    assert usage == {"a": 3.0, "b": 0.0}
    assert charge(usage, [a], [a], 2.0) == {"a": 4.0}, "alone it is ahead of whoever comes by one request at most"
    assert charge({}, [a], [a], 0.5) == {"a": 0.5}
    assert charge({"a": 2.0}, [c], [c], 0.5) == {"c": 0.5}, "who has left is forgotten"
    assert charge(usage, [a, b, c], [b], 2.0) == {"a": 3.0, "b": 2.0, "c": 0.0}
    assert charge({"a": 3.0, "b": 2.0}, [a, b], [a, b], 2.0) == {"a": 2.0 - 1.0, "b": 0.0}
