"""The cost model of calls, warm-up, the timeline and the cache, without a real model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import Caller, Clock, FakePipeline, FakeState, run_out
from hypothesis import given
from hypothesis import strategies as st
from img2img_server.engine.cache import Cache
from img2img_server.engine.costs import Costs
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Plan, Request
from img2img_server.engine.warmup import WarmUp
from img2img_server.errors import OutOfMemory
from img2img_server.support.device_lock import is_measuring, records_at_once
from img2img_server.telemetry.timeline import Trace
from running import running, store

GROUP = ("m", (64, 64))


def costs_of(times: dict[int, float], pixels: int = 4096) -> Costs:
    costs = Costs()
    for rows, seconds in times.items():
        costs.measured("denoise", GROUP, pixels, rows, seconds)
    return costs


def test_costs_are_unknown_before_the_first_call() -> None:
    costs = Costs()
    assert costs.seconds("denoise", GROUP, 4096, 2) is None
    assert costs.cap(GROUP, 4096, 16) == 16


def test_cost_is_interpolated_between_batch_sizes() -> None:
    costs = costs_of({2: 1.0, 4: 3.0})
    assert costs.seconds("denoise", GROUP, 4096, 3) == 2.0
    assert costs.seconds("denoise", GROUP, 4096, 6) == 5.0
    assert costs.seconds("denoise", GROUP, 4096, 1) == 0.5


def test_cost_of_an_unmeasured_shape_scales_with_its_pixels() -> None:
    costs = costs_of({1: 1.0, 2: 1.5})
    assert costs.seconds("denoise", ("m", (128, 64)), 8192, 2) == 3.0
    assert costs.seconds("denoise", ("other", (64, 64)), 4096, 2) is None


def test_costs_ignore_one_outlier_but_follow_a_lasting_change() -> None:
    costs = costs_of({2: 1.0, 4: 1.8})
    costs.record("denoise", GROUP, 4096, 2, 50.0)
    assert (costs.seconds("denoise", GROUP, 4096, 2) or 0) < 1.3
    for _ in range(40):
        costs.record("denoise", GROUP, 4096, 2, 1.5)
    assert costs.seconds("denoise", GROUP, 4096, 2) == pytest.approx(1.5, rel=0.05)
    assert costs.seconds("denoise", GROUP, 4096, 4) == pytest.approx(2.7, rel=0.25), "the others are slower too, most likely"


def test_one_measurement_is_extrapolated_by_the_curve_of_another_shape() -> None:
    costs = costs_of({1: 1.0, 2: 1.5, 4: 2.5})
    costs.measured("denoise", ("m", "large"), 16384, 2, 9.0)
    assert costs.seconds("denoise", ("m", "large"), 16384, 4) == pytest.approx(15.0)


@given(st.lists(st.floats(0.9, 1.1), min_size=60, max_size=60))
def test_running_mean_stays_near_the_recorded_times(times: list[float]) -> None:
    costs = Costs()
    for seconds in times:
        costs.record("denoise", GROUP, 4096, 2, seconds)
    assert 0.9 <= (costs.seconds("denoise", GROUP, 4096, 2) or 0) <= 1.1


@pytest.mark.parametrize(
    ("times", "cap"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1),
        ({1: 1.0, 2: 1.2, 4: 2.4, 8: 4.8}, 2),
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 16),
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 3.0}, 4),
    ],
)
def test_batch_limit_grows_while_time_per_row_falls(times: dict[int, float], cap: int) -> None:
    assert costs_of(times).cap(GROUP, 4096, 16) == cap


def test_warm_up_measures_rows_and_pixels_and_releases_every_state() -> None:
    clock, costs = Clock(), Costs()
    pipeline = FakePipeline(clock, seconds=lambda rows: 0.1 + 0.01 * rows, codec_seconds=0.05)
    costs.adopt("m", WarmUp(8, 60.0, clock).measure("m", pipeline))
    for rows in (1, 2, 4, 8):
        assert costs.seconds("denoise", ("m", (16, 16)), 256, rows) == pytest.approx(0.1 + 0.01 * rows)
    assert costs.seconds("prepare", ("m", (16, 16)), 256, 1) == pytest.approx(0.05)
    assert costs.seconds("finish", ("m", (16, 16)), 256, 1) == pytest.approx(0.05)
    assert costs.seconds("denoise", ("m", (8, 8)), 64, 1) == pytest.approx(0.11), "at half the size too"
    assert set(pipeline.released) == set(pipeline.prepared)
    assert len(costs.describe("m", 8)) == 2


def test_warm_up_stays_within_its_budget() -> None:
    clock, costs = Clock(), Costs()
    costs.adopt("m", WarmUp(1024, 60.0, clock).measure("m", FakePipeline(clock, seconds=lambda rows: 1.0 * rows)))
    assert clock.now < 60
    before = clock.now
    costs.adopt("m", WarmUp(8, 0.0, clock).measure("m", FakePipeline(clock)))
    costs.adopt("m", WarmUp(8, 60.0, clock).measure("m", FakePipeline(clock, max_rows=1)))
    assert clock.now == before


def test_graphs_that_calls_need_are_opened_before_they_are_measured() -> None:
    """The graphs of both sizes are opened before the first call, and all calls are measured."""
    events: list[str] = []

    class Opening(FakePipeline):
        def plan(self, request: Request) -> Plan:
            events.append(f"plan {request.image.width}")
            return super().plan(request)

    pipeline = Opening(clock := Clock())
    pipeline.before_call = lambda: events.append(f"call {is_measuring()}")
    WarmUp(4, 60.0, clock).measure("m", pipeline)
    assert events[:2] == ["plan 16", "plan 8"]
    assert "call True" in events
    assert "call False" not in events
    assert not is_measuring()


def test_a_model_whose_costs_are_known_is_tried_with_a_guided_request() -> None:
    """A guided trial opens the graphs that most requests need, and no others."""
    pipeline = FakePipeline(clock := Clock())
    WarmUp(4, 60.0, clock).check("m", pipeline)
    (state,) = pipeline.prepared
    assert state.request.guidance_scale > 1


def padded_costs(times: dict[int, float]) -> Costs:
    costs = Costs()
    costs.pad("m", (1, 2, 4, 8, 16))
    for rows, seconds in times.items():
        costs.measured("denoise", GROUP, 4096, rows, seconds)
    return costs


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (3, 4), (4, 4), (5, 8), (9, 16), (16, 16), (17, 17), (24, 24), (27, 32)])
def test_padded_call_costs_as_much_as_its_bucket(rows: int, bucket: int) -> None:
    """More rows than the largest bucket are computed in parts of that many, and a rest."""
    costs = padded_costs({rows: rows / 10 for rows in (1, 2, 4, 8, 16)})
    assert costs.seconds("denoise", GROUP, 4096, rows) == pytest.approx(bucket / 10)


def test_padded_call_updates_the_cost_of_its_bucket() -> None:
    costs = padded_costs({})
    costs.record("denoise", GROUP, 4096, 5, 2.0)
    costs.record("denoise", GROUP, 4096, 2, 1.0)
    assert costs.seconds("denoise", GROUP, 4096, 7) == costs.seconds("denoise", GROUP, 4096, 8)
    assert any("2: " in line and "8: " in line and "5: " not in line for line in costs.describe("m", 16))


def test_out_of_memory_in_a_padded_call_limits_the_bucket() -> None:
    costs = padded_costs({})
    costs.forbid("m", 4096, 9)
    assert costs.fitting_rows("denoise", "m", 4096) == 8, "all of 9 to 16 rows take as much"
    costs.forbid("m", 4096, 8, largest=7)
    assert costs.fitting_rows("denoise", "m", 4096) == 4


def test_batches_fill_rows_that_would_be_padding() -> None:
    """A model whose calls take as long as their padded rows: alone, three rows take as long as four."""
    clock = Clock()
    pipeline = FakePipeline(clock, seconds=lambda rows: 1.0 * next(bucket for bucket in (1, 2, 4, 8, 16) if rows <= bucket))
    sizes = {}
    for buckets in ((), (1, 2, 4, 8, 16)):
        pipeline.row_buckets = buckets
        engine = Engine({"m": pipeline}, clock=clock)
        engine.costs.adopt("m", WarmUp(16, 100.0, clock).measure("m", pipeline))
        pipeline.batches.clear()
        for seeds, steps in (((0, 1, 2), 2), ((0,), 10)):
            Caller(engine).submit(seeds=seeds, num_inference_steps=steps)
        run_out(engine)
        sizes[buckets] = [sum(len(state.request.seeds) for state in batch) for batch in pipeline.batches]
    assert sizes[()][:2] == [3, 3]
    assert sizes[1, 2, 4, 8, 16][:2] == [4, 4]


def test_padded_calls_are_recorded_per_bucket_before_measurement() -> None:
    clock = Clock()
    pipeline = FakePipeline(clock)
    pipeline.row_buckets = (1, 2, 4, 8, 16)
    at_once: list[bool] = []
    pipeline.before_call = lambda: at_once.append(records_at_once())
    WarmUp(12, 60.0, clock).measure("m", pipeline)
    recorded = [batch for batch, at in zip(pipeline.batches, at_once, strict=True) if at]
    assert at_once.index(False) == len(recorded), "first"
    sizes = [state.request.image.size for batch in recorded for state in batch[:1]]
    assert [len(batch) for batch in recorded] == [1, 2, 4, 8, 12] * 2
    assert sizes == [(16, 16)] * 5 + [(8, 8)] * 5
    assert set(pipeline.released) == set(pipeline.prepared)
    before = len(pipeline.batches)
    WarmUp(12, 0.0, clock).record("m", pipeline)
    assert len(pipeline.batches) == before, "no budget"


def test_bucket_that_exceeds_memory_is_not_recorded_but_smaller_ones_are(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FakePipeline(Clock())
    pipeline.row_buckets, pipeline.memory = (1, 2, 4, 8, 16), 1024
    WarmUp(16, 60.0, Clock()).record("m", pipeline)
    fitting = [1, 2, 4, 1, 2, 4, 8, 16]
    assert [len(batch) for batch in pipeline.batches] == fitting * 2, "all again: they may be dropped"
    assert "calls of 8 rows of 16 x 16 are not recorded: the fake ran out of memory" in caplog.text
    pipeline.refused.clear()
    measured = WarmUp(16, 60.0, Clock()).measure("m", pipeline)
    assert pipeline.refused == [("denoise", 8)], "it is not tried again"
    assert measured.full == ((256, 8),)
    pipeline.memory = 1
    with pytest.raises(OutOfMemory):
        WarmUp(16, 60.0, Clock()).record("m", pipeline)


def test_configured_sizes_are_recorded_unless_they_exceed_memory(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FakePipeline(Clock())
    pipeline.row_buckets, pipeline.memory = (1, 2, 4), 2048
    sizes = [(16, 16), (33, 24), (64, 64)]
    WarmUp(4, 60.0, Clock(), sizes=sizes).record("m", pipeline)
    made = [(batch[0].request.image.size, len(batch)) for batch in pipeline.batches]
    fitting = [((side, side), rows) for side in (16, 8) for rows in (1, 2, 4)] + [((32, 24), rows) for rows in (1, 2)]
    assert made == fitting * 2, "a size is rounded down to one that can be drawn, and is recorded once"
    assert "calls of 4 rows of 32 x 24 are not recorded" in caplog.text
    assert "calls of 1 rows of 64 x 64 are not recorded" in caplog.text


class Cramped(FakePipeline):
    """Has room for 1024 pixels in a call."""

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        if sum(state.request.image.width * state.request.image.height for state in states) > 1024:
            raise MemoryError
        return super().denoise(states)


def test_batch_sizes_that_exceed_memory_are_not_retried() -> None:
    clock, costs = Clock(), Costs()
    costs.adopt("m", WarmUp(16, 1000.0, clock).measure("m", Cramped(clock)))
    assert costs.cap(("m", (16, 16)), 256, 16) == 7, "between the four that went and the eight that did not"
    assert costs.cap(("m", (32, 32)), 1024, 16) == 1
    assert costs.cap(("m", (8, 8)), 64, 16) == 16


def test_cache_evicts_least_recently_used_entries() -> None:
    cache = Cache(100)
    for key in "abc":
        cache.put(key, key.upper(), 40)
    assert cache.get("a") is None
    assert cache.get("b") == "B"
    cache.put("d", "D", 40)
    assert (cache.get("c"), cache.get("b"), cache.get("d")) == (None, "B", "D")
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.entries, stats.bytes) == (3, 2, 2, 2, 80)


def test_cache_without_budget_is_off_and_oversized_entries_are_not_stored() -> None:
    off, small = Cache(0), Cache(10)
    off.put("a", 1, 1)
    small.put("a", 1, 5)
    small.put("a", 2, 11)
    assert off.get("a") is None
    assert small.get("a") is None
    assert small.stats.bytes == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30))))
def test_a_cache_never_holds_more_than_its_budget(entries: list[tuple[int, int]]) -> None:
    cache, sizes = Cache(50), dict[int, int]()
    for key, size in entries:
        cache.put(key, key, size)
        sizes[key] = size
        assert cache.stats.bytes <= 50
        assert cache.stats.bytes == sum(sizes[held] for held in range(10) if cache.get(held) is not None)


def test_timeline_is_in_chrome_trace_format(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.observe(Span("denoise", "m", 2, 4, 1.5, 0.25))
    trace.close(caches={"hits": 3})
    first, caches, *_ = json.loads((tmp_path / "trace.json").read_text())
    assert (first["name"], first["ph"], first["ts"], first["dur"]) == ("denoise", "X", 1.5e6, 0.25e6)
    assert first["args"] == {"model": "m", "requests": 2, "rows": 4}
    assert (caches["name"], caches["args"]) == ("caches", {"hits": 3})


def test_closed_timeline_ignores_further_events(tmp_path: Path) -> None:
    """A second signal ends a server that is ending, while the engine may still be in a call."""
    trace = Trace(tmp_path / "trace.json")
    trace.observe(Span("denoise", "m", 2, 4, 1.5, 0.25))
    trace.close(caches={"hits": 3})
    whole = (tmp_path / "trace.json").read_text()
    trace.observe(Span("finish", "m", 2, 4, 2.5, 0.25))
    trace.close(caches={"hits": 4})
    assert (tmp_path / "trace.json").read_text() == whole


def test_a_server_with_a_trace_can_be_stopped_twice(tmp_path: Path) -> None:
    with running(lambda: store(m=FakePipeline()), trace=tmp_path / "trace.json") as server:
        server.stop().result(60)
        server.stop().result(60)
    assert json.loads((tmp_path / "trace.json").read_text())[-1]["name"] == "end"


def test_costs_of_request_shapes_are_evicted_but_not_warm_up_costs() -> None:
    costs = costs_of({1: 1.0, 2: 1.5, 4: 2.5})
    for pixels in range(5000, 6000):
        costs.record("denoise", ("m", pixels), pixels, 1, 1.0)
    lines = costs.describe("m", 16)
    assert len(lines) <= 256
    assert lines[0].startswith("a step at 4096 pixels, by rows: 1: 1000.0 ms, 2: 1500.0 ms, 4: 2500.0 ms")
    assert lines[-1].startswith("a step at 5999 pixels")
    for rows in (1, 2):
        for pixels in range(6000, 7000):
            costs.record("denoise", ("m", pixels), pixels, rows, 1.0)
    assert len(costs.describe("m", 16)) <= 256


def test_full_disk_ends_only_the_timeline(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(Path("/dev/full"))
    engine = Engine({"m": FakePipeline()}, observe=trace.observe)
    callers = [Caller(engine).submit(num_inference_steps=50) for _ in range(5)]
    run_out(engine)
    for number in range(1000):
        trace.observe(Span("denoise", "m", 1, 1, float(number), 1.0))
    trace.close(caches={})
    assert [caller.error for caller in callers] == [None] * 5
    assert caplog.text.count("the timeline is incomplete") == 1
