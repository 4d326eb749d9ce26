"""`scripts/gpu_check` on CUDA's provider: all of it with tiny models, over fake libraries that compute nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import FakeGpu
from gpu_check import __main__ as command
from gpu_check.results import read

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_every_section_runs_and_records(tmp_path: Path, gpu: FakeGpu) -> None:
    out = tmp_path / "result.jsonl"
    words = ["--tiny", "--no-compile", "--no-values", "--seconds", "0", "--threads", "1", "--budget", "800", "--out", str(out)]
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_check", *words],
        env=os.environ | {"PYTHON": sys.executable, "FAKECUDA_SUMMARY": str(tmp_path / "summary-%p.json")},
        capture_output=True,
        text=True,
    )
    lines = read(out)
    assert [line for line in lines if line.passed is False] == [], out.with_suffix(".log").read_text()
    assert done.returncode == 0
    started = [word for word in done.stderr.split() if word != "..."]
    wanted = [section.name for section in command.SECTIONS if not section.name.startswith("compile")]
    assert [name for name in started if not name.startswith(("make", "fill"))] == wanted
    found = {(line.section, line.name): line for line in lines}
    assert found["preflight", "UNet, recorded"].note == "replayed"
    assert found["preflight", "a tiny bundle opens"].note == "onnx:cuda, rows recorded: 1, 2, 4, 8, 16"
    replays = [line for line in lines if line.section.endswith("recorded") and line.name.endswith(" rows")]
    assert all(line.note.startswith("recorded in") for line in replays), replays
    assert len(replays) == 5
    assert {"cuDNN attention", "flash attention", "plain graph"} <= {line.name for line in lines}
    assert found["memory", "a request that does not fit"].note
    assert [line.note for line in lines if "after it" in line.name] == ["drawn"] * 3
    assert found["memory", "kept by the failed request"].value == 0


def test_without_a_library_preflight_names_it_in_one_line(tmp_path: Path) -> None:
    """As where cuDNN was not installed."""
    libraries = tmp_path / "lib"
    libraries.mkdir()
    for folder in os.environ["LD_LIBRARY_PATH"].split(os.pathsep):
        for path in Path(folder).glob("*"):
            if "cudnn" not in path.name and not (libraries / path.name).exists():
                (libraries / path.name).symlink_to(path)
    out = tmp_path / "result.jsonl"
    words = ["--tiny", "--no-values", "--threads", "1", "--only", "preflight,switch", "--out", str(out)]
    environment = os.environ | {"PYTHON": sys.executable, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([ROOT / "scripts" / "gpu_check", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (failed,) = [line for line in read(out) if line.passed is False]
    assert failed.section == "preflight"
    assert "libcudnn" in failed.note
    assert "\n" not in failed.note
