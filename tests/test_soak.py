"""`scripts/soak`: every violated guarantee makes it fail."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from soak_parts.access import issue
from soak_parts.calls import Connection, check_images, follow, upload
from soak_parts.images import noise, png
from soak_parts.judging import MOST_GROWTH, Times, growth_of, judge, judge_times
from soak_parts.ledger import Ledger, Violated
from soak_parts.process import ROOT, STAND_IN, ServingProcess, Vitals, serving
from soak_parts.stand_in import FLAW, plant
from soak_parts.strangers import strangers
from soak_parts.traffic import KINDS
from soak_parts.watching import Checkpoint, Watch, slope

MIB = 2**20


def soak(out: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--model", "fake", "--out", str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=800, env={**os.environ, **environment}, check=False)


@pytest.mark.nightly
def test_short_soak_passes_every_check(tmp_path: Path) -> None:
    result = soak(tmp_path, "--minutes", "0.25", "--kserve", "--no-hostile")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert (figures["lost"], figures["doubled"], figures["wrong"]) == (0, 0, 0)
    assert figures["broken"] == []
    # Everything that comes from the mix did come, and operations ended in all the ways there are. Whether a queue was full, and
    # requests were refused, depends on the machine's speed.
    drawn = {name for name, kind in KINDS.items() if kind.share}
    assert drawn <= set(figures["issued"])
    endings = {each["ending"] for each in figures["endings"]}
    assert {"image", "invalid", "cancelled", "disconnected"} <= endings
    assert figures["run"]["exit_status"] == 0
    assert 0 < figures["stop"]["seconds"] <= figures["stop"]["grace"] + 5
    assert (tmp_path / "soak.md").read_text() in result.stdout


@pytest.mark.nightly
def test_soak_fails_if_a_server_sometimes_returns_wrong_images(tmp_path: Path) -> None:
    result = soak(tmp_path, "--minutes", "0.1", "--no-hostile", **{FLAW: "97"})
    assert result.returncode == 1, result.stdout + result.stderr
    assert "an image differs by" in result.stdout


@pytest.mark.nightly
def test_server_survives_hostile_clients_and_stops_on_sigterm(tmp_path: Path) -> None:
    """With TLS and tokens, as in a soak: no response shows a bug, health checks succeed meanwhile, and SIGTERM ends the
    server."""
    access, flags = issue(tmp_path, tls=True, with_tokens=True)
    plant(tmp_path / "models", "m")
    words = ["--models", str(tmp_path / "models"), "--assets", str(tmp_path / "assets"), "--kserve", "--grace", "5", *flags]
    ledger = Ledger()

    async def attacked(server: ServingProcess) -> dict[str, dict[str, int]]:
        async with Connection(server.target, access) as connection:
            asset = await upload(connection, png(noise((64, 64), 1)))
            async with strangers(server.target, access, asset, True, 0) as hostile:
                for _ in range(2):
                    health: Any = health_pb2_grpc.HealthStub(connection.channel)
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    await hostile.pause()
                    hostile.resume()
                server.terminate()
                assert await asyncio.to_thread(server.wait, 60) == 0
                await hostile.end(ledger)
                return hostile.statuses

    with serving(tmp_path, [*STAND_IN, *words], {"GRPC_VERBOSITY": "NONE"}) as server:
        statuses = asyncio.run(attacked(server))
    assert ledger.violations == []
    assert set(statuses) == {
        "JPEG scan bombs",
        "marker bombs",
        "packed fields",
        "gzip messages",
        "stream resets",
        "unread answers and stalled uploads",
    }
    assert statuses["gzip messages"]["refused"]


def watch(ledger: Ledger, sizes: list[float], descriptors: list[int] | None = None, seconds: float = 100.0) -> Watch:
    """A watch over a run that saw these sizes, in MiB, at rest."""
    seen = Watch(ServingProcess(Path(), []), 0, ledger, health_seconds=[0.001], begun=0.0)
    every = seconds / len(sizes)
    for index, size in enumerate(sizes):
        open_files = descriptors[index] if descriptors else 20
        seen.checkpoints.append(Checkpoint((index + 1) * every, Vitals(int(size * MIB), open_files, 10)))
    return seen


def broken(ledger: Ledger, seen: Watch, log: str = "") -> list[str]:
    return judge(ledger, seen, growth_of(seen, 100.0), log, 100.0)


def test_good_run_passes_every_check() -> None:
    ledger = Ledger()
    ledger.end(ledger.begin("plain"), "image")
    assert (
        broken(ledger, watch(ledger, [400.0, 500.0] + [500.0 + 0.1 * i for i in range(8)]), "INFO img2img: error_count=0") == []
    )


def test_memory_growth_is_reported_only_after_warm_up() -> None:
    ledger = Ledger()
    assert broken(ledger, watch(ledger, [100.0, 400.0] + [500.0] * 8)) == []
    grown = 500.0 * (1 + MOST_GROWTH) + 1
    (line,) = broken(ledger, watch(ledger, [500.0] * 7 + [grown] * 3))
    assert "memory grew by" in line


def test_slow_memory_growth_is_reported_only_after_half_an_hour() -> None:
    ledger, rising = Ledger(), [500.0 + 0.5 * i for i in range(10)]
    before, after = watch(ledger, rising, seconds=1700), watch(ledger, rising, seconds=1800)
    assert judge(ledger, before, growth_of(before, 1700), "", 1700) == []
    (line,) = judge(ledger, after, growth_of(after, 1800), "", 1800)
    assert "per hour" in line


def test_latency_limits_are_checked_only_with_enough_samples() -> None:
    good = Times(alone=[0.1] * 20, under_load=[0.2] * 100, stop=3.0, grace=60.0)
    assert judge_times(good, [0.01] * 400) == []
    slow = Times(alone=[0.1] * 20, under_load=[0.4] * 100, stop=65.1, grace=60.0)
    health, small, stop = judge_times(slow, [0.01] * 380 + [0.3] * 20)
    assert ("health" in health, "4.0 times" in small, "65.1 s after SIGTERM" in stop) == (True, True, True)
    # Percentiles of a run of seconds are meaningless.
    assert judge_times(replace(slow, under_load=[0.4] * 99, stop=3.0), [1.0] * 399) == []


def test_leaked_descriptors_are_detected() -> None:
    ledger = Ledger()
    (line,) = broken(ledger, watch(ledger, [500.0] * 10, [20] * 9 + [60]))
    assert "60 descriptors" in line


@pytest.mark.parametrize("line", ["2026 ERROR img2img: x", "CRITICAL: stuck", "Traceback (most recent call last):"])
def test_errors_in_the_servers_log_are_noticed(line: str) -> None:
    ledger = Ledger()
    (found,) = broken(ledger, watch(ledger, [500.0] * 10), f"INFO fine\n{line}\n")
    assert line in found


def test_lost_and_doubled_operations_fail_the_run() -> None:
    ledger = Ledger()
    lost, twice = ledger.begin("plain"), ledger.begin("stream")
    ledger.end(twice, "image")
    ledger.end(twice, "cancelled")
    assert lost != twice
    assert ledger.lost == 1
    lines = broken(ledger, watch(ledger, [500.0] * 10))
    assert any("ended twice" in line for line in lines)
    assert ledger.doubled == 1
    assert any("1 operations never ended" in line for line in lines)


def test_slope_is_the_least_squares_slope() -> None:
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 1.0)]) == 0.0


def test_wrong_images_are_detected_and_rounding_is_tolerated() -> None:
    image = noise((16, 16), 1)
    reference = png(image)

    def response(change: int) -> pb.TransformResponse:
        changed = image.copy()
        red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
        changed.putpixel((3, 3), (red, green + (change if green < 128 else -change), blue))
        return pb.TransformResponse(images=[pb.ImageResult(data=png(changed))])

    check_images(response(1), [reference])
    with pytest.raises(Violated, match="differs by 2"):
        check_images(response(2), [reference])
    with pytest.raises(Violated, match="1 images instead of 2"):
        check_images(response(0), [reference, reference])


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
