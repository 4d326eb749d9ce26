"""The fastest way to run a bundle is measured once, kept for the machine, versions, settings and bundle, and reported."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from img2img_server.bundle.manifest import Manifest, read_manifest
from img2img_server.errors import BundleError, OutOfMemory
from img2img_server.runtime import loader, measured_choice
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.measured_choice import fastest
from img2img_server.support.device_lock import is_measuring
from onnxruntime.capi import onnxruntime_pybind11_state as state


class Clock:
    """A clock that the fakes move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Way(str):
    """A pipeline that is nothing but its name, and notes in `closed` that it was closed."""

    closed: list[str]

    def close(self) -> None:
        self.closed.append(self)


class Bench:
    """Ways to run a bundle: each takes these seconds for an image, and is loaded and drawn with on record. One with negative
    seconds does not load, one in `broken` raises that when it draws."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, manifest: Manifest, cache: Path, **seconds: float) -> None:
        self.clock = Clock()
        self.loaded: list[str] = []
        self.drawn: list[str] = []
        self.closed: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.seconds: Mapping[str, float] = seconds
        self.execution = Execution(cache=cache)
        self._folder, self._manifest = folder, manifest
        monkeypatch.setattr(measured_choice, "run_alone", self._draw)

    def choose(self, manifest: Manifest | None = None, threads: int = 1, execution: Execution | None = None) -> Any:
        ways = {name: lambda name=name: self._load(name) for name in self.seconds}
        given = manifest or self._manifest
        return fastest(self._folder, given, execution or self.execution, threads, ways, self.clock)

    def _load(self, name: str) -> Any:
        self.loaded.append(name)
        if self.seconds[name] < 0:
            raise BundleError(f"{name} does not open")
        way = Way(name)
        way.closed = self.closed
        return way

    def _draw(self, pipeline: Any, request: object) -> None:
        assert is_measuring()  # so that graphs are open
        self.drawn.append(pipeline)
        if pipeline in self.broken:
            raise self.broken[pipeline]
        self.clock.now += self.seconds[pipeline]


@pytest.fixture
def bench(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., Bench]]:
    folder = bundle("sd1")
    with caplog.at_level(logging.INFO):
        yield lambda **seconds: Bench(monkeypatch, folder, read_manifest(folder), tmp_path / "cache", **seconds)


@pytest.mark.parametrize(
    ("seconds", "best"), [({"a": 2.0, "b": 1.0}, "b"), ({"a": 1.0, "b": 3.0}, "a"), ({"a": 3.0, "b": 2.0, "c": 9.0}, "b")]
)
def test_fastest_provider_is_chosen_and_the_comparison_logged(
    seconds: dict[str, float], best: str, bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    here = bench(**seconds)
    assert here.choose() == best
    assert here.loaded[: len(seconds)] == list(seconds)
    assert here.loaded[-1] == best
    line = next(record.getMessage() for record in caplog.records if "is the fastest here" in record.getMessage())
    assert f"{best} is the fastest here: {seconds[best]:g} s for a reference image" in line
    for name in seconds.keys() - {best}:
        assert f"{name} {seconds[name]:g} s ({seconds[name] / seconds[best]:.2f} times as long)" in line


def test_measured_choice_is_reused(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    here = bench(a=2.0, b=1.0, c=3.0)
    here.choose()
    here.loaded.clear()
    here.drawn.clear()
    assert here.choose() == "b"
    assert (here.loaded, here.drawn) == (["b"], [])
    assert "measured before" in caplog.text


@pytest.mark.parametrize("change", ["threads", "bundle", "machine", "settings", "damaged", "ways"])
def test_choice_is_measured_again_if_its_inputs_change(
    change: str, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bench(a=2.0, b=1.0)
    here.choose()
    here.drawn.clear()
    given: dict[str, Any] = {}
    if change == "threads":
        given = {"threads": 2}
    elif change == "bundle":
        given = {"manifest": replace(here._manifest, files={**here._manifest.files, "unet/model.onnx": "0" * 64})}
    elif change == "machine":
        monkeypatch.setattr(cpu, "machine", lambda: {"cpu": "another"})
    elif change == "settings":
        given = {"execution": replace(here.execution, arithmetic="fp32")}
    elif change == "damaged":
        (path,) = (here.execution.cache or Path()).glob("choices/*.json")
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "seconds": {"a": 1.0, "elsewhere": -1}}))
    else:
        here.seconds = {**here.seconds, "c": 0.5}
    here.choose(**given)
    assert set(here.drawn) == set(here.seconds)


def test_provider_that_fails_to_load_is_skipped(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    assert bench(a=2.0, b=-1.0).choose() == "a"
    assert "b cannot run it: b does not open" in caplog.text
    with pytest.raises(BundleError, match="b does not open"):
        bench(a=-1.0, b=-1.0).choose()


@pytest.mark.parametrize("error", [state.Fail("no kernel"), RuntimeError("no memory layout"), BundleError("no graph")])
@pytest.mark.parametrize("broken", ["a", "b"])
def test_provider_that_loads_but_fails_to_run_is_skipped(broken: str, error: Exception, bench: Callable[..., Bench]) -> None:
    here = bench(a=2.0, b=2.0)
    here.broken = {broken: error}
    (other,) = here.seconds.keys() - {broken}
    assert here.choose() == other
    here.loaded.clear()
    assert here.choose() == other
    assert here.loaded == [other], "which was kept"
    here.broken = dict.fromkeys(here.seconds, error)
    with pytest.raises(type(error)):
        here.choose(threads=2)


def test_every_way_but_the_one_that_serves_is_closed(bench: Callable[..., Bench]) -> None:
    here = bench(a=2.0, b=1.0, c=3.0, d=1.5)
    here.broken = {"d": RuntimeError("cannot draw")}
    assert here.choose() == "b"
    assert (here.loaded, here.closed) == (["a", "b", "c", "d", "b"], ["a", "b", "c", "d"])
    last = bench(a=2.0, b=1.0)
    assert last.choose(threads=3) == "b"
    assert last.closed == ["a"]


def test_out_of_memory_during_the_measurement_is_raised_and_not_cached(bench: Callable[..., Bench]) -> None:
    """The models beside it are evicted then, and the ways are measured once there is memory."""
    here = bench(a=2.0, b=1.0)
    here.broken = {"b": OutOfMemory("the machine ran out of memory")}
    with pytest.raises(OutOfMemory):
        here.choose()
    assert here.closed == ["a", "b"]
    here.broken = {}
    assert here.choose() == "b"


def test_remembered_choice_that_no_longer_loads_is_measured_again(
    bench: Callable[..., Bench],
) -> None:
    here = bench(a=2.0, b=1.0)
    here.choose()
    here.seconds = {"a": 2.0, "b": -1.0}
    assert here.choose() == "a"


def test_slow_providers_are_measured_with_fewer_images(bench: Callable[..., Bench]) -> None:
    here = bench(a=0.1, b=60.0)
    here.choose()
    assert (here.drawn.count("a"), here.drawn.count("b")) == (4, 2)


def test_without_reference_images_the_last_provider_is_chosen(bench: Callable[..., Bench]) -> None:
    here = bench(a=1.0, b=2.0)
    assert here.choose(replace(here._manifest, references=())) == "b"
    assert here.drawn == []


def test_unwritable_cache_folder_only_repeats_the_measurement(
    bench: Callable[..., Bench], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    here = bench(a=2.0, b=1.0)
    assert here.choose() == "b"
    assert "the next start measures again" in caplog.text


def test_pytorch_in_bfloat16_is_measured_against_fp32(
    bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    offered: list[list[str]] = []

    def first(folder: Path, manifest: Manifest, execution: Execution, threads: int, ways: measured_choice.Ways) -> Any:
        offered.append(list(ways))
        return next(iter(ways.values()))()

    folder = bundle("sana-sprint")
    monkeypatch.setattr(loader, "choose_dtype", lambda device, execution: torch.bfloat16)
    monkeypatch.setattr(measured_choice, "fastest", first)
    pipeline = load_pipeline(folder, read_manifest(folder), Execution("cpu", cache=tmp_path))
    assert pipeline.engine == "torch:cpu"
    assert offered == [["PyTorch in fp32", "PyTorch in bf16"]]
