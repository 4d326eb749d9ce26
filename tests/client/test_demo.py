"""scripts/demo makes its images and leaves no process.

Its bundle is the one that the session's tests share, so that it is not exported once more: that the command exports the demo's
model is what the nightly part of tests/test_readme.py shows.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageStat

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".demo"


@pytest.fixture(scope="module", autouse=True)
def exported(bundle: Callable[[str], Path]) -> None:
    """Puts the bundle where the demo looks for it, which asks whether it is up to date."""
    if not (WORK / "models" / "demo").exists():
        shutil.copytree(bundle("demo"), WORK / "models" / "demo")


def redness(path: Path) -> float:
    """How much redder than blue an image is on average, in levels of 255."""
    with Image.open(path) as image:
        red, _, blue = ImageStat.Stat(image.convert("RGB")).mean
    return red - blue


def server_process(line: str) -> int:
    """The server's process id, from the demo's output."""
    found = re.search(r"serving on port \d+, process (\d+)", line)
    assert found, line
    return int(found[1])


def assert_gone(process: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_demo_turns_noon_into_sunset_and_stops_its_server() -> None:
    for name in ("after.png", "before-after.png"):
        (WORK / name).unlink(missing_ok=True)
    done = subprocess.run(["scripts/demo"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_gone(server_process(done.stderr))
    assert all(word in done.stdout for word in (".demo/after.png", ".demo/before-after.png", "engine", "server start", "denoise"))
    before = ROOT / "demo/images/noon-lake.png"
    with Image.open(before) as source, Image.open(WORK / "after.png") as after, Image.open(WORK / "before-after.png") as sheet:
        assert after.size == source.size
        assert sheet.width > 2 * 384
    assert redness(WORK / "after.png") > redness(before) + 20


@pytest.mark.nightly
def test_interrupted_demo_leaves_no_process_running() -> None:
    with subprocess.Popen(["scripts/demo"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        line = next(line for line in demo.stderr if line.startswith("serving on port"))
        demo.terminate()
        demo.stderr.read()
    assert demo.returncode == 128 + signal.SIGTERM
    assert_gone(server_process(line))
