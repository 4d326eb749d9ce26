"""`scripts/gpu_check` on CUDA's provider, with tiny models, over fake libraries that compute nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu
from gpu_check import __main__ as command
from gpu_check import weightless
from gpu_check.preflight import preflight
from gpu_check.results import Line, read
from gpu_check.sections import SECTIONS
from gpu_check.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Tiny models in fp16, plain and fused, with random weights."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for name in ("tiny-sd15", "tiny-sdxl"):
        weightless.make(name, folder / "graphs" / name, "fp16")
        weightless.fill(folder / "graphs" / name, folder / name)
    return Settings(folder, folder / "graphs", folder / "r.jsonl", tiny=True, compile=False, values=False, seconds=0.0, threads=1)


@pytest.fixture
def settings(filled: Settings, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of `scripts/gpu_check --tiny --no-values` in a section's process."""
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "scripts")))
    return filled


def _passed(lines: Iterator[Line]) -> dict[str, Line]:
    """The lines by name, none of which failed."""
    found = list(lines)
    assert [line for line in found if line.passed is False] == []
    return {line.name: line for line in found}


def test_preflight_opens_replays_and_names_the_device(settings: Settings) -> None:
    lines = _passed(preflight(settings))
    assert lines["device and libraries"].note.startswith("Fake GPU, compute capability 9.0, CUDA ")
    assert lines["a tiny bundle opens"].note == "onnx:cuda, rows recorded: 1, 2, 4, 8, 16"
    assert lines["UNet, recorded"].note == "replayed"


def test_recorded_calls_build_no_plans_when_rows_change(settings: Settings, gpu: FakeGpu) -> None:
    with gpu.counting() as switched:
        assert "4 rows after 2" in _passed(SECTIONS["switch"](settings))
    with gpu.counting() as replayed:
        lines = _passed(SECTIONS["replay"](settings))
    assert all(lines[f"{rows} rows"].note.startswith("recorded in") for rows in (1, 2, 4, 8, 16))
    assert replayed["cudaStreamBeginCapture"] == 5
    assert replayed["plan"] < switched["plan"] / 2
    assert switched["cudaGraphLaunch"] == 0


@pytest.mark.parametrize(
    ("section", "some"),
    [
        ("host", {"warm-up's recordings", "8 requests, outside the UNet's call"}),
        ("unet-sd15", {"ours", "not recorded", "cuDNN attention", "flash attention", "plain graph", "PyTorch"}),
        pytest.param("unet-sdxl", {"ours", "not recorded", "PyTorch"}, marks=pytest.mark.nightly),
        ("vae", {"ours", "PyTorch"}),
        pytest.param("image", {"ours"}, marks=pytest.mark.nightly),
        pytest.param("cold", {"process start to first image, sd15"}, marks=pytest.mark.nightly),
    ],
)
def test_a_section_runs(section: str, some: set[str], settings: Settings) -> None:
    assert some <= set(_passed(SECTIONS[section](settings)))


def test_requests_after_an_out_of_memory_succeed(settings: Settings) -> None:
    lines = _passed(SECTIONS["memory"](settings))
    assert "out of memory" in lines["a request that does not fit"].note
    assert [lines[f"request {number} after it"].note for number in (1, 2, 3)] == ["succeeded"] * 3
    assert (lines["kept by the failed request"].value or 0) < 64  # MiB; below 0: the arenas gave back more than they held before


def test_preflight_names_a_missing_library_in_one_line(filled: Settings, tmp_path: Path) -> None:
    """The library is cuDNN; the later sections are not run."""
    libraries = tmp_path / "lib"
    libraries.mkdir()
    for folder in os.environ["LD_LIBRARY_PATH"].split(os.pathsep):
        for path in Path(folder).glob("*"):
            if "cudnn" not in path.name and not (libraries / path.name).exists():
                (libraries / path.name).symlink_to(path)
    settings = replace(filled, out=tmp_path / "result.jsonl")
    environment = os.environ | {"PYTHON": sys.executable, "LD_LIBRARY_PATH": str(libraries)}
    words = ["--only", f"{command.PREFLIGHT.name},switch", *settings.words()]
    done = subprocess.run([ROOT / "scripts" / "gpu_check", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (failed,) = [line for line in read(settings.out) if line.passed is False]
    assert failed.section == "preflight"
    assert "libcudnn" in failed.note
    assert "\n" not in failed.note
