"""scripts/bench load: its peers answer real requests, its workloads match their descriptions, and its figures are right for given
numbers."""

import argparse
import asyncio
import base64
import io
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bench_codecs
import pytest
from bench_load import servers
from bench_load.figures import Run, percentile, summarize
from bench_load.images import largest_difference, render
from bench_load.measuring import Results, Settings
from bench_load.report import figures, print_tables, write
from bench_load.sending import Record, connected
from bench_load.servers import ServerProcess, command, ending
from bench_load.trace import Call, Trace, histogram, idle_share, last_part, read_trace
from bench_load.workloads import (
    PROMPTS,
    SIZES,
    STEPS,
    STRENGTHS,
    WORKLOADS,
    Job,
    Source,
    arrivals,
    draw_different,
    draw_mixed,
    generator,
    jobs_worth,
)
from bench_peers.batching import settings as batch_settings
from bench_peers.common import Arguments
from img2img.v1.image_to_image_pb2 import TransformRequest
from PIL import Image
from rich.console import Console

JOBS = [Job("a lake at sunset", Source(size=(64, 64)), 4, 0.8, 7.5, seed) for seed in (3, 4, 5)]


@pytest.mark.nightly
async def test_paused_peer_resumes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    server = ServerProcess("pytorch", command("pytorch", tmp_path, tiny_model("sd1")), tmp_path)
    with ending([server]):
        server.spawn()
        server.wait()
        server.pause()
        server.resume()
        async with connected(server.target) as sender:
            images = await asyncio.gather(*(sender.send(job) for job in JOBS))
    assert [record.error for record in sender.records] == [""] * len(JOBS)
    assert largest_difference(images[0], images[1]) > 1, "another seed makes another image"


def test_optimum_peers_name_their_setup_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "OPTIMUM", tmp_path / "python")
    with pytest.raises(SystemExit, match="make it with scripts/oracle_setup"):
        command("lock")


@pytest.mark.parametrize("name", ["litserve", "bentoml"])
def test_peers_over_http_name_their_setup_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(servers, "PEERS", tmp_path / "python")
    with pytest.raises(SystemExit, match="make it with scripts/peers_setup"):
        command(name)


class _HttpPeer(BaseHTTPRequestHandler):
    """Answers with the source's file, or with an error if the seed is 5."""

    def do_POST(self) -> None:
        (message,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        request = TransformRequest.FromString(base64.b64decode(message))
        body = json.dumps([base64.b64encode(request.image.data).decode()]).encode()
        self.send_response(500 if request.seed == 5 else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form: str, *arguments: object) -> None:
        """Writes no log."""


async def test_jobs_are_sent_over_http_with_the_same_message() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _HttpPeer) as peer:
        thread = threading.Thread(target=peer.serve_forever)
        thread.start()
        async with connected(f"http://127.0.0.1:{peer.server_port}") as sender:
            images = [await sender.send(job) for job in JOBS]
        peer.shutdown()
        thread.join()
    assert images == [render(JOBS[0].source), render(JOBS[1].source), b""]
    assert [record.error for record in sender.records] == ["", "", "ClientResponseError"]
    assert {record.queue for record in sender.records} == {None}, "peers over HTTP do not say how long a request waited"


@pytest.mark.parametrize(
    ("change", "together"),
    [({"seed": 9}, True), ({"prompt": "b"}, True), ({"strength": 0.5}, False), ({"negative_prompt": "ugly"}, False)],
)
def test_only_requests_of_the_same_settings_are_batched(change: dict[str, object], together: bool) -> None:
    one = {"prompt": "a", "negative_prompt": None, "image": Image.new("RGB", (8, 8)), "strength": 0.8}
    one |= {"num_inference_steps": 4, "guidance_scale": 7.5, "seed": 1}
    first, second = Arguments(**one), Arguments(**{**one, **change})  # type: ignore[arg-type]
    assert (batch_settings(first) == batch_settings(second)) is together


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_deterministic_per_seed(name: str) -> None:
    draw = WORKLOADS[name].draw
    lists = [jobs_worth(draw, generator(seed, name, 0), 200.0, 4) for seed in (1, 1, 2)]
    assert lists[0] == lists[1] != lists[2]


def test_mixed_workload_covers_its_documented_values() -> None:
    drawn = jobs_worth(draw_mixed, generator(1, "mix"), 0, 2000)
    assert {job.steps for job in drawn} == set(STEPS)
    assert {job.strength for job in drawn} == set(STRENGTHS)
    assert {job.source.size for job in drawn} == set(SIZES)
    assert {job.prompt for job in drawn} == set(PROMPTS)
    assert len(PROMPTS) == 40
    assert 0.17 < sum(job.guidance == 1.0 for job in drawn) / len(drawn) < 0.23
    assert all(1 <= job.denoising_steps <= job.steps for job in drawn)


def test_distinct_jobs_have_unique_prompts_and_images() -> None:
    drawn = jobs_worth(draw_different, generator(1, "different"), 0, 60)
    assert len({render(job.source) for job in drawn}) == len({job.prompt for job in drawn}) == 60


def test_workload_length_follows_the_requested_work() -> None:
    drawn = jobs_worth(draw_mixed, generator(1, "work"), 1000.0, 4)
    assert 1000 <= sum(job.units for job in drawn) < 1000 + 1.5 * 104 + 1


def test_arrivals_have_the_requested_rate() -> None:
    times = arrivals(generator(1, "arrivals"), 4000, 5.0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(800, rel=0.05)


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 2.5), (75, 3.25), (100, 4.0)])
def test_percentiles_are_interpolated(percent: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(value)
    assert math.isnan(percentile([], percent))


def _record(sent: float, latency: float, **more: object) -> Record:
    record = Record(role="", steps=10, guidance=7.5, size=(128, 128), units=24.0, sent=sent, latency=latency)
    return replace(record, **more)  # type: ignore[arg-type]


def test_throughput_is_responses_over_the_time_to_the_last_one() -> None:
    first = Run("ours", "saturation", 0, (_record(1, 1), _record(1, 3), _record(1, 9, error="UNAVAILABLE")), 6.0)
    second = Run("ours", "saturation", 1, (_record(0, 2, estimate=3.0, estimate_error=0.5), _record(0, 1, role="alone")), 3.0)
    made = summarize([first, second])
    assert (made.requests, made.errors) == (3, 1)
    assert made.requests_per_second == pytest.approx(3 / 5)
    assert made.cpu_per_request == pytest.approx((6.0 + 3.0) / 3)
    assert made.steps_per_second == pytest.approx(30 / 5)
    assert made.per_round == pytest.approx((2 / 3, 1 / 2))
    assert (made.p50, made.alone_p50, made.estimate_error) == pytest.approx((2.0, 1.0, 0.5))


TRACE = [
    {"name": "prepare", "ph": "X", "ts": 0, "dur": 1e6, "args": {"model": "m", "requests": 1, "rows": 1}},
    {"name": "denoise", "ph": "X", "ts": 10e6, "dur": 1e6, "args": {"model": "m", "requests": 1, "rows": 2}},
    {"name": "advance", "ph": "X", "ts": 11e6, "dur": 1e6, "args": {"model": "m", "requests": 1, "rows": 1}},
    {"name": "prepare", "ph": "X", "ts": 11.5e6, "dur": 1e6, "args": {"model": "m", "requests": 1, "rows": 1}},
    {"name": "denoise", "ph": "X", "ts": 12e6, "dur": 2e6, "args": {"model": "m", "requests": 3, "rows": 5}},
    {"name": "finish", "ph": "X", "ts": 15e6, "dur": 1e6, "args": {"model": "m", "requests": 1, "rows": 1}},
    {"name": "caches", "ph": "i", "ts": 0, "args": {"hits": 3}},
    {"name": "end", "ph": "i", "ts": 0},
]


def _trace(tmp_path: Path) -> Trace:
    (tmp_path / "trace.json").write_text(json.dumps(TRACE))
    return read_trace(tmp_path / "trace.json")


def test_timeline_yields_batch_sizes_and_idle_time(tmp_path: Path) -> None:
    trace = _trace(tmp_path)
    assert trace.caches == {"hits": 3}
    assert histogram(trace.calls, "rows") == {2: 1, 5: 1}
    assert histogram(trace.calls, "requests") == {1: 1, 3: 1}
    assert idle_share(trace.calls) == pytest.approx(0.5 / 4), "from 10 to 14 s nothing ran between 11 and 11.5"
    assert idle_share(()) == 0


def test_calls_before_a_pause_are_ignored(tmp_path: Path) -> None:
    trace = _trace(tmp_path)
    assert [call.name for call in last_part(trace.calls, 1.5)][:2] == ["denoise", "advance"]
    assert len(last_part(trace.calls, 100.0)) == len(trace.calls)
    overlapping = [Call("finish", 0, 5, 1, 1), Call("denoise", 1, 0.1, 1, 1), Call("denoise", 4, 1, 1, 1)]
    assert last_part(overlapping, 1.5) == overlapping
    assert last_part([], 1.0) == []


def test_report_is_written_even_if_all_requests_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench_load.plots import draw

    asked = Settings(("ours", "lock"), ("saturation", "short"), 1.0, 1, 1, tmp_path)
    failed = (_record(0, 1, error="UNAVAILABLE"),)
    runs = [
        Run("ours", "saturation", 0, (_record(0, 1), _record(0, 2))),
        Run("lock", "saturation", 0, failed),
        Run("ours", "short", 0, (_record(0, 1, role="alone"), _record(2, 2, role="foreground"))),
        Run("lock", "short", 0, failed),
    ]
    results = Results(1.0, 1.0, {"ours": 0, "lock": 256}, runs, _trace(tmp_path))
    table = io.StringIO()
    print_tables(results, asked, Console(width=200, file=table))
    assert "2.0 x" in table.getvalue(), "2 s among others, 1 s alone"
    write(tmp_path / "load.json", results, asked)
    told = json.loads((tmp_path / "load.json").read_text())
    assert told["figures"]["saturation"]["lock"]["p50"] is None
    assert len(told["records"]) == 6
    assert figures(runs)["saturation"]["ours"].requests == 2
    draw(tmp_path / "load.png", results, asked)
    with Image.open(tmp_path / "load.png") as image:
        assert image.width > 1000


def test_bench_codecs_compares_each_format_in_both_directions(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_codecs.run(argparse.Namespace(side=64, rounds=2)) == 0
    printed = capsys.readouterr().out
    assert all(f"{verb} {name}" in printed for verb in ("decode", "encode") for name in ("PNG", "JPEG", "WEBP"))
