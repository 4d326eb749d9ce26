"""How large batches may be: measured on a machine that is disturbed, learnt afterwards, and kept for the next start."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from covering import nightly_but
from fakes import Clock, FakePipeline, FakeState
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.engine.costs import Costs, Measured
from img2img_server.engine.engine import Engine
from img2img_server.engine.warmup import WarmUp
from img2img_server.models.cost_store import CostStore
from img2img_server.models.loader import Preparation
from img2img_server.models.registry import ModelRegistry
from model_folder import make_bundle

GROUP = ("m", (16, 16))
MOST = 16
CURVES: dict[str, tuple[Callable[[int], float], int]] = {
    "larger always pays": (lambda rows: 0.1 + 0.01 * rows, 16),
    "larger never pays": (lambda rows: 0.1 * rows, 1),
    "up to 4": (lambda rows: 0.1 * max(rows, 4), 4),
}
"""Seconds of a call by its rows, and the cap that is right."""


class Noisy(FakePipeline):
    """A pipeline whose calls take `noise(number of the call)` times as long as they should."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float], noise: Callable[[int], float]) -> None:
        super().__init__(clock, seconds)
        self.calls = 0
        self._noise, self._true = noise, seconds

    def denoise(self, states: Sequence[FakeState]) -> Sequence[int]:
        self.calls += 1
        before = self._clock.now
        noises = super().denoise(states)
        self._clock.now = before + self._true(len(states)) * self._noise(self.calls)
        return noises


def measured_cap(seconds: Callable[[int], float], noise: Callable[[int], float], budget: float = 1e6) -> int:
    clock, costs = Clock(), Costs()
    costs.adopt("m", WarmUp(MOST, budget, clock).measure("m", Noisy(clock, seconds, noise)))
    return costs.cap(GROUP, 256, MOST)


@pytest.mark.parametrize("curve", nightly_but(CURVES, "up to 4"))
@settings(deadline=None)
@given(slow=st.integers(1, 82), factor=st.floats(1.0, 1000.0))
def test_one_slow_call_anywhere_changes_no_batch_limit(curve: str, slow: int, factor: float) -> None:
    seconds, cap = CURVES[curve]
    assert measured_cap(seconds, lambda call: factor if call == slow else 1.0) == cap


@pytest.mark.parametrize("curve", nightly_but(CURVES, "up to 4"))
@settings(deadline=None)
@given(factor=st.floats(0.1, 50.0))
def test_constant_load_does_not_change_the_batch_limit(curve: str, factor: float) -> None:
    seconds, cap = CURVES[curve]
    assert measured_cap(seconds, lambda call: factor) == cap


@pytest.mark.parametrize("curve", nightly_but(CURVES, "up to 4"))
@settings(deadline=None)
@given(first=st.integers(0, 7), factor=st.floats(1.0, 50.0))
def test_load_changes_between_rounds_do_not_change_the_batch_limit(curve: str, first: int, factor: float) -> None:
    """Ten calls, five batches at two sizes, are a round; twelve come before the rounds."""
    seconds, cap = CURVES[curve]
    assert measured_cap(seconds, lambda call: factor if call > 12 + 10 * first else 1.0) == cap
    assert measured_cap(seconds, lambda call: factor if call <= 12 + 10 * first else 1.0) == cap


@pytest.mark.parametrize("curve", nightly_but(CURVES, "up to 4"))
@settings(deadline=None)
@given(
    outliers=st.dictionaries(st.integers(0, 9), st.sets(st.integers(0, 6), max_size=3)),
    factor=st.floats(1.0, 100.0),
    jitter=st.lists(st.floats(1.0, 1.01), min_size=90, max_size=90),
)
def test_outliers_in_less_than_half_of_the_rounds_change_no_batch_limit(
    curve: str, outliers: dict[int, set[int]], factor: float, jitter: list[float]
) -> None:
    """`outliers` are the rounds in which the batch of a place is held up, which differ from batch to batch. Twelve calls come
    before the rounds: five batches at two sizes, and the first of each size twice."""
    seconds, cap = CURVES[curve]

    def noise(call: int) -> float:
        number, place = divmod(call - 13, 10)
        place = 9 - place if number % 2 else place
        return (factor if call > 12 and number in outliers.get(place, ()) else 1.0) * jitter[call - 1]

    assert measured_cap(seconds, noise) == cap


@settings(deadline=None)
@given(slow=st.integers(1, 82), factor=st.floats(1.0, 1000.0), budget=st.floats(0.5, 30.0))
def test_one_slow_call_does_not_prevent_batching(slow: int, factor: float, budget: float) -> None:
    seconds, _ = CURVES["larger always pays"]
    assert measured_cap(seconds, lambda call: factor if call == slow else 1.0, budget) > 1


@settings(deadline=None)
@given(st.floats(0.01, 60.0), st.floats(1.0, 5.0))
def test_warm_up_exceeds_its_budget_by_at_most_one_call(budget: float, factor: float) -> None:
    clock = Clock()
    pipeline = Noisy(clock, lambda rows: 0.1 * rows * factor, lambda call: 1.0)
    WarmUp(MOST, budget, clock).measure("m", pipeline)
    assert clock.now <= budget + 0.1 * factor
    assert set(pipeline.released) == set(pipeline.prepared)


@pytest.mark.parametrize("curve", nightly_but(CURVES, "up to 4"))
@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.sampled_from([2, 4, 8, 16]), st.floats(1.0, 20.0)))
def test_batch_limit_measured_too_low_is_raised_under_load(curve: str, wrong: dict[int, float]) -> None:
    """A full queue: every call has as many rows as it may."""
    seconds, right = CURVES[curve]
    costs = Costs()
    for rows in (1, 2, 4, 8, 16):
        costs.measured("denoise", GROUP, 256, rows, seconds(rows) * wrong.get(rows, 1.0))
    calls = []
    for _ in range(4000):
        calls.append(costs.cap(GROUP, 256, MOST))
        costs.record("denoise", GROUP, 256, calls[-1], seconds(calls[-1]))
    cap = sorted(calls[-200:])[100]
    assert seconds(cap) / cap <= 1.05 * seconds(right) / right, "no call takes longer for each row than it has to"
    assert sum(rows != cap for rows in calls[-1000:]) <= 50, "trials are few"


def test_batch_limit_of_one_is_raised_by_requests_of_two_rows() -> None:
    """A guided image has two rows, more than a limit of one: it is a call of its own until a larger one was tried."""
    seconds, _ = CURVES["larger always pays"]
    costs = Costs()
    for rows in (1, 2, 4, 8, 16):
        costs.measured("denoise", GROUP, 256, rows, seconds(rows) * (1.0 if rows == 1 else 10.0))
    for _ in range(2000):
        rows = max(2, costs.cap(GROUP, 256, MOST) // 2 * 2)
        costs.record("denoise", GROUP, 256, rows, seconds(rows))
    assert costs.cap(GROUP, 256, MOST) == MOST


def test_trials_stay_within_the_memory_limit() -> None:
    costs = Costs()
    for rows in (1, 2, 4, 8):
        costs.measured("denoise", GROUP, 256, rows, float(rows))
    costs.forbid("m", 256, 3)
    for _ in range(500):
        rows = costs.cap(GROUP, 256, MOST)
        assert rows <= 2
        costs.record("denoise", GROUP, 256, rows, float(rows))


# Costs that are kept.


@pytest.fixture
def store(tmp_path: Path) -> ModelRegistry:
    make_bundle(tmp_path / "models" / "m")
    return ModelRegistry.load(
        tmp_path / "models", lambda bundle, manifest: Noisy(Clock(), CURVES["up to 4"][0], lambda call: 1.0)
    )


async def start(models: ModelRegistry, costs: CostStore) -> tuple[int, Engine]:
    """Prepares the model. Returns how many calls that took, and the engine."""
    pipeline = models.pipelines()["m"]
    assert isinstance(pipeline, Noisy)
    before, engine = pipeline.calls, Engine(models.pipelines())
    await Preparation(models, engine, MOST, 1000.0, 0.0, pipeline._clock, costs).run()
    return pipeline.calls - before, engine


def known(engine: Engine) -> list[str]:
    return engine.costs.describe("m", MOST)


async def test_second_start_reuses_costs_and_makes_one_trial_call(tmp_path: Path, store: ModelRegistry) -> None:
    many, first = await start(store, CostStore(tmp_path / "costs", {"machine": "x"}))
    one, second = await start(store, CostStore(tmp_path / "costs", {"machine": "x"}))
    assert many > 50
    assert one == 1
    assert known(first) == known(second)
    assert second.costs.cap(GROUP, 256, MOST) == 4


async def test_costs_of_another_machine_version_setting_bundle_or_engine_are_not_used(
    tmp_path: Path, store: ModelRegistry
) -> None:
    root = tmp_path / "costs"
    await start(store, CostStore(root, {"machine": "x", "threads": 2}))
    for facts in ({"machine": "y", "threads": 2}, {"machine": "x", "threads": 1}, {"machine": "x"}):
        assert (await start(store, CostStore(root, facts)))[0] > 50
    store.pipelines()["m"].engine = "fake:gpu"
    assert (await start(store, CostStore(root, {"machine": "x", "threads": 2})))[0] > 50
    make_bundle(tmp_path / "models" / "m", weights=5)
    assert (await start(store, CostStore(root, {"machine": "x", "threads": 2})))[0] > 50


DAMAGE: list[Callable[[dict[str, object]], object]] = [
    lambda data: data.update(key={}),
    lambda data: data.update(timings=[]),
    lambda data: data.update(timings=[["denoise", [16, 16], 256, 1, float("nan")]]),
    lambda data: data.update(timings=[["denoise", [16, 16], 256, 1, float("inf")]]),
    lambda data: data.update(timings=[["denoise", [16, 16], 256, 1, -1.0]]),
    lambda data: data.update(timings=[["denoise", [16, 16], 256, 0, 1.0]]),
    lambda data: data.update(timings=[["denoise", [16, 16], 256, True, 1.0]]),
    lambda data: data.update(timings=[["denoise", [[16], 16], 256, 1, 1.0]]),
    lambda data: data.update(timings=[["denoise", "16", 256, 1, 1.0]]),
    lambda data: data.update(timings=[["other", [16, 16], 256, 1, 1.0]]),
    lambda data: data.update(timings=[["denoise"]]),
    lambda data: data.update(timings=7),
    lambda data: data.update(full=[[1]]),
    lambda data: data.update(full=[[-1, 1]]),
    lambda data: data.pop("full"),
]


@pytest.mark.parametrize("damage", range(len(DAMAGE)))
async def test_invalid_cost_file_is_ignored_and_rewritten(tmp_path: Path, store: ModelRegistry, damage: int) -> None:
    costs = CostStore(tmp_path / "costs", {})
    await start(store, costs)
    (file,) = (tmp_path / "costs").iterdir()
    data = json.loads(file.read_bytes())
    DAMAGE[damage](data)
    file.write_text(json.dumps(data))
    assert (await start(store, costs))[0] > 50
    assert (await start(store, costs))[0] == 1, "it is good again"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * 2_000_000, b'"x"'])
async def test_truncated_cost_file_is_ignored_and_rewritten(tmp_path: Path, store: ModelRegistry, content: bytes) -> None:
    costs = CostStore(tmp_path / "costs", {})
    await start(store, costs)
    (file,) = (tmp_path / "costs").iterdir()
    file.write_bytes(content)
    assert (await start(store, costs))[0] > 50
    assert (await start(store, costs))[0] == 1, "it is good again"


async def test_unwritable_cost_folder_logs_a_warning_and_measures_again(
    tmp_path: Path, store: ModelRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/img2img")):
        caplog.clear()
        calls, engine = await start(store, CostStore(root, {}))
        assert calls > 50
        assert engine.costs.cap(GROUP, 256, MOST) == 4
        assert f"measured costs are not kept in {root}" in caplog.text


async def test_full_disk_leaves_no_partial_cost_file(
    tmp_path: Path, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fdopen

    def full(descriptor: int, *rest: object, **options: object) -> object:
        os.close(descriptor)
        return real(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")

    monkeypatch.setattr("img2img_server.engine.measurements.os.fdopen", full)
    assert (await start(store, CostStore(tmp_path / "costs", {})))[0] > 50
    assert list((tmp_path / "costs").iterdir()) == []
    assert "No space left on device" in caplog.text


def test_old_files_are_deleted_when_there_are_too_many(
    tmp_path: Path, store: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2img_server.engine.measurements._MOST_FILES", 3)
    clock = Clock()
    measured = WarmUp(4, 100.0, clock).measure("m", FakePipeline(clock))
    bundle = store.get("m").bundle
    for number in range(6):
        CostStore(tmp_path, {"number": number}).keep(bundle, FakePipeline(), measured)
        for file in tmp_path.glob("*.json"):
            os.utime(file, (file.stat().st_mtime - 10, file.stat().st_mtime - 10))
    found = [CostStore(tmp_path, {"number": number}).find(bundle, FakePipeline()) for number in range(6)]
    assert [one is not None for one in found] == [False, False, False, True, True, True]
    assert found[-1] == measured
    CostStore(tmp_path / "none", {}).keep(bundle, FakePipeline(), Measured())
    assert not (tmp_path / "none").exists(), "nothing was measured"
