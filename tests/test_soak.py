"""`scripts/soak`: it keeps a server busy among all that goes wrong, and every promise that is broken makes it fail."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from img2img.v1 import image_to_image_pb2 as pb
from soak_parts.calls import check_pictures, follow
from soak_parts.judging import MOST_GROWTH, growth_of, judge
from soak_parts.ledger import Ledger, Violated
from soak_parts.pictures import noise, png
from soak_parts.process import ROOT, ServingProcess, Vitals
from soak_parts.stand_in import FLAW
from soak_parts.traffic import KINDS
from soak_parts.watching import Checkpoint, Watch, slope

MIB = 2**20


def soak(out: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--model", "fake", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **environment}, check=False)


def test_a_short_soak_keeps_every_promise(tmp_path: Path) -> None:
    result = soak(tmp_path, "--minutes", "0.25")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["lost"] == 0
    assert figures["broken"] == []
    # Everything that comes from the mix did come, and operations ended in all the ways there are.
    drawn = {name for name, kind in KINDS.items() if kind.share}
    assert drawn <= set(figures["issued"])
    endings = {each["ending"] for each in figures["endings"]}
    assert {"picture", "refused", "invalid", "cancelled", "disconnected"} <= endings
    assert figures["run"]["exit_status"] == 0
    assert (tmp_path / "soak.md").read_text() in result.stdout


def test_a_server_that_draws_a_wrong_picture_now_and_then_fails_the_soak(tmp_path: Path) -> None:
    result = soak(tmp_path, "--minutes", "0.1", **{FLAW: "97"})
    assert result.returncode == 1, result.stdout + result.stderr
    assert "a picture is off by" in result.stdout


def watch(ledger: Ledger, sizes: list[float], descriptors: list[int] | None = None) -> Watch:
    """A watch over a run of 100 seconds that saw these sizes, in MiB, at rest."""
    seen = Watch(ServingProcess(Path(), []), 0, ledger, health_seconds=[0.001], begun=0.0)
    every = 100 / len(sizes)
    for index, size in enumerate(sizes):
        open_files = descriptors[index] if descriptors else 20
        seen.checkpoints.append(Checkpoint((index + 1) * every, Vitals(int(size * MIB), open_files, 10)))
    return seen


def broken(ledger: Ledger, seen: Watch, log: str = "") -> list[str]:
    return judge(ledger, seen, growth_of(seen, 100.0), log, 100.0)


def test_a_good_run_breaks_nothing() -> None:
    ledger = Ledger()
    ledger.end(ledger.begin("plain"), "picture")
    assert (
        broken(ledger, watch(ledger, [400.0, 500.0] + [500.0 + 0.1 * i for i in range(8)]), "INFO img2img: error_count=0") == []
    )


def test_memory_that_grows_after_warm_up_is_noticed_and_before_it_is_not() -> None:
    ledger = Ledger()
    assert broken(ledger, watch(ledger, [100.0, 400.0] + [500.0] * 8)) == []
    grown = 500.0 * (1 + MOST_GROWTH) + 1
    (line,) = broken(ledger, watch(ledger, [500.0] * 7 + [grown] * 3))
    assert "memory grew by" in line


def test_what_is_left_open_is_noticed() -> None:
    ledger = Ledger()
    (line,) = broken(ledger, watch(ledger, [500.0] * 10, [20] * 9 + [60]))
    assert "60 descriptors" in line


@pytest.mark.parametrize("line", ["2026 ERROR img2img: x", "CRITICAL: stuck", "Traceback (most recent call last):"])
def test_errors_in_the_servers_log_are_noticed(line: str) -> None:
    ledger = Ledger()
    (found,) = broken(ledger, watch(ledger, [500.0] * 10), f"INFO fine\n{line}\n")
    assert line in found


def test_an_operation_ends_once_or_the_run_has_failed() -> None:
    ledger = Ledger()
    lost, twice = ledger.begin("plain"), ledger.begin("stream")
    ledger.end(twice, "picture")
    ledger.end(twice, "cancelled")
    assert lost != twice
    assert ledger.lost == 1
    lines = broken(ledger, watch(ledger, [500.0] * 10))
    assert any("ended twice" in line for line in lines)
    assert any("1 operations never ended" in line for line in lines)


def test_the_slope_is_that_of_the_nearest_line() -> None:
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 1.0)]) == 0.0


def test_a_picture_that_is_off_is_noticed_and_rounding_is_not() -> None:
    image = noise((16, 16), 1)
    reference = png(image)

    def response(change: int) -> pb.TransformResponse:
        changed = image.copy()
        red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
        changed.putpixel((3, 3), (red, green + (change if green < 128 else -change), blue))
        return pb.TransformResponse(images=[pb.ImageResult(data=png(changed))])

    check_pictures(response(1), [reference])
    with pytest.raises(Violated, match="off by 2"):
        check_pictures(response(2), [reference])
    with pytest.raises(Violated, match="1 pictures in place of 2"):
        check_pictures(response(0), [reference, reference])


QUEUED = pb.TransformStreamResponse(queued=pb.Queued())
STARTED = pb.TransformStreamResponse(started=pb.Started())
FIRST, SECOND = (pb.TransformStreamResponse(progress=pb.Progress(step=step, step_count=2)) for step in (1, 2))
COMPLETED = pb.TransformStreamResponse(completed=pb.TransformResponse(model_id="m"))


def followed(*events: pb.TransformStreamResponse) -> pb.TransformResponse:
    async def stream() -> AsyncIterator[pb.TransformStreamResponse]:
        for event in events:
            yield event

    return asyncio.run(follow(stream()))


def test_a_stream_has_its_events_in_order_and_one_end() -> None:
    assert followed(QUEUED, QUEUED, STARTED, FIRST, SECOND, COMPLETED).model_id == "m"
    for events in (
        (QUEUED, STARTED, FIRST, SECOND),
        (QUEUED, STARTED, SECOND, COMPLETED),
        (STARTED, FIRST, COMPLETED),
        (QUEUED, STARTED, FIRST, QUEUED, SECOND, COMPLETED),
        (QUEUED, STARTED, FIRST, COMPLETED, COMPLETED),
        (QUEUED, COMPLETED),
        (),
    ):
        with pytest.raises(Violated):
            followed(*events)
