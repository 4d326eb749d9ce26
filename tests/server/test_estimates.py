"""Accuracy of estimates: over a mixed load, on a device whose calls take the times of their rows, on a manual clock."""

import random
import statistics
from dataclasses import dataclass

import pytest
from fakes import Clock, FakePipeline, make_request
from img2img_server.engine.engine import Engine
from img2img_server.engine.request import Completed, Event, Request
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.engine.warmup import WarmUp
from PIL import Image

SHAPES = [Image.new("RGB", size) for size in ((8, 8), (16, 8))]
FLAT = {1: 0.012, 2: 0.018, 4: 0.034, 8: 0.064, 16: 0.120}
"""Seconds of a call by rows: measured of the demo model on two cores."""
STEEP = {1: 0.0051, 2: 0.0051, 4: 0.0057, 8: 0.0125, 16: 0.0249}
"""Roughly the published times of an H200."""


@dataclass(slots=True)
class Arrival:
    at: float
    request: Request
    eta: float | None = None
    took: float = 0.0


def arrivals(rate: float, count: int, seed: int) -> list[Arrival]:
    source, now, made = random.Random(seed), 0.0, []
    for _ in range(count):
        now += source.expovariate(rate)
        made.append(
            Arrival(
                now,
                make_request(
                    image=source.choice(SHAPES),
                    num_inference_steps=source.choice([4, 8, 12, 20, 25, 30, 50]),
                    strength=source.uniform(0.3, 1.0),
                    seeds=(0, 1) if source.random() < 0.8 else (0,),
                ),
            )
        )
    return made


def drive(expected: list[Arrival], curve: dict[int, float]) -> None:
    """Submits each request when it is due, and records its estimate and its duration."""
    clock = Clock()
    pipeline = FakePipeline(clock, lambda rows: curve[min(size for size in curve if size >= rows)], codec_seconds=0.01)
    engine = Engine({"m": pipeline}, QueueLimits(), clock)
    engine.costs.adopt("m", WarmUp(16, 100.0, clock).measure("m", pipeline))
    start = clock.now
    for arrival in expected:
        while clock.now < start + arrival.at:
            if not engine.step():
                clock.now = start + arrival.at

        def listen(event: Event, arrival: Arrival = arrival, came: float = clock.now) -> None:
            if isinstance(event, Completed):
                arrival.took = clock.now - came

        arrival.eta = engine.submit(arrival.request, listen).eta
    while engine.step():
        pass


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_half_of_the_estimates_are_within_a_fifth(load: float, curve: dict[int, float]) -> None:
    alone = statistics.mean(
        0.02 + int(job.request.num_inference_steps * job.request.strength) * curve[2] for job in arrivals(1.0, 300, 1)
    )
    jobs = arrivals(load / alone, 400, 2)
    drive(jobs, curve)
    wrong = [abs(job.eta - job.took) / job.took for job in jobs if job.eta is not None]
    assert len(wrong) == len(jobs), "warmed up, it always has an estimate"
    print(f"median {statistics.median(wrong):.3f}")
    assert statistics.median(wrong) < 0.2
