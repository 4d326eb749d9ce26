"""`img2img top`: rates and means of two readings, shown on any terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from fakes import FakePipeline
from hypothesis import given
from hypothesis import strategies as st
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_cli.__main__ import main
from img2img_server.config import TelemetrySettings
from img2img_server.tools.top_metrics import History, MetricsError, ModelView, Snapshot, compare, parse
from img2img_server.tools.top_view import draw
from messages import failure, request
from rich.console import Console
from running import RunningServer, running, store
from scraping import settled

_PATIENCE = 60.0
_COMMAND = [str(Path(sys.executable).parent / "img2img"), "top"]


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running(lambda: store(m=FakePipeline(), other=FakePipeline()), telemetry=TelemetrySettings(metrics_port=0)) as server:
        yield server


def url_of(server: RunningServer) -> str:
    return f"http://127.0.0.1:{server.server.metrics_port}/metrics"


def text_of(snapshot: Snapshot, problem: str = "", width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(draw(snapshot, problem))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_rates_are_computed_between_two_readings(server: RunningServer) -> None:
    history = History(url_of(server), window=60)
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        stub.Transform(request(model={"path": "other"}))
        history.read()
        stub.Transform(request(num_inference_steps=5, strength=1.0, image_count=3))
        failure(lambda: stub.Transform(request(strength=2.0)))
        settled(server.server.metrics_port or 0)
        history.read()
    snapshot = history.snapshot()
    rates = {status: rate * snapshot.seconds for status, rate in snapshot.requests_per_second.items()}
    assert rates == pytest.approx({"OK": 1, "INVALID_ARGUMENT": 1})
    assert (snapshot.active, snapshot.waiting) == (0, 0)
    assert snapshot.memory > 2**20
    assert snapshot.uptime
    assert snapshot.device_total is None
    m, other = snapshot.models
    assert (m.id, m.state, m.engine, other.id) == ("m", "ready", "fake:cpu", "other")
    assert (m.rows, m.requests) == (3, 1)
    assert m.step_seconds is not None
    assert m.step_seconds > 0
    assert m.pictures_per_second * snapshot.seconds == pytest.approx(3)
    assert all(seconds is not None for seconds in m.stages.values())
    assert (other.rows, other.step_seconds, set(other.stages.values())) == (None, None, {None}), "that was before"


COUNTED = """\
img2img_build_info{{version="0.1.0",python="3.11"}} 1
process_start_time_seconds {start}
img2img_requests_total{{method="a",status="OK",reason="",client=""}} {a}
img2img_requests_total{{method="b",status="OK",reason="",client=""}} {b}
img2img_cache_hits_total {hits}
img2img_cache_misses_total {misses}
img2img_engine_work_seconds NaN
"""


def counted(**values: float) -> str:
    return COUNTED.format(**{"start": 1.0, "a": 0, "b": 0, "hits": 0, "misses": 0, **values})


def test_rates_are_summed_over_other_labels_and_a_share_of_zero_is_unknown() -> None:
    before, now = parse(counted(a=1, b=2, hits=5, misses=5), "u"), parse(counted(a=3, b=7, hits=8, misses=6), "u")
    snapshot = compare("u", before, now, 2.0)
    assert snapshot.requests_per_second == {"OK": 3.5}
    assert snapshot.cache_hits == 0.75
    assert snapshot.work_seconds is None, "NaN is not known"
    again = compare("u", now, now, 2.0)
    assert again.cache_hits is None
    assert again.requests_per_second == {"OK": 0.0}
    assert json.loads(json.dumps(again.requests_per_second))
    bare = parse('img2img_build_info 1\nimg2img_model_state{model="m"} 1\nimg2img_model_info{model="m"} 1\n', "u")
    assert [(model.id, model.state, model.engine) for model in compare("u", bare, bare, 1.0).models] == [("m", "", "")]


def served(texts: list[str]) -> HTTPServer:
    """A server that answers with one text after the other, the last again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write((texts.pop(0) if len(texts) > 1 else texts[0]).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_restarted_server_has_no_negative_rates() -> None:
    server = served([counted(a=100), counted(a=110), counted(a=3, start=2.0)])
    try:
        history = History(f"127.0.0.1:{server.server_port}", window=60)
        for _ in range(3):
            history.read()
        assert history.snapshot().requests_per_second == {"OK": 0.0}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("text", ["", "<html>hello</html>", "up 1\n", "img2img_build_info{", "\x00\xff"])
def test_foreign_metrics_are_reported(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    server = served([text])
    try:
        assert main(["top", "--once", f"http://127.0.0.1:{server.server_port}/metrics"]) == 1
    finally:
        server.shutdown()
        server.server_close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("img2img top: ")
    assert "does not serve metrics of img2img" in err
    assert len(err.splitlines()) == 1


@given(st.text())
def test_malformed_metrics_raise_metrics_error(text: str) -> None:
    try:
        parse(text, "u")
    except MetricsError:
        return
    raise AssertionError("it took nonsense for metrics")


def test_missing_server_error_is_one_line_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["top", "--once", f"localhost:{port}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"http://localhost:{port}/metrics" in line
    assert "--metrics-port" in line


@pytest.mark.parametrize("words", [["file:///etc/passwd"], ["--interval", "0"], ["--window", "x"], ["a", "b"]])
def test_invalid_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["top", "--once", *words])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    assert status in (1, 2)
    assert "root:" not in capsys.readouterr().out


def test_once_prints_one_snapshot_without_escape_codes(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        ImageToImageServiceStub(channel).Transform(request())
    assert main(["top", "--once", "--interval", "0.05", url_of(server)]) == 0
    out = capsys.readouterr().out
    assert "OK 0.0" in out
    assert re.search(r"^m +ready +fake:cpu", out, re.MULTILINE)
    assert "0 active, 0 waiting" in out
    assert "\x1b" not in out, "it is no terminal"


def test_json_has_every_number(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--json", "--interval", "0.05", url_of(server)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == set(Snapshot.__dataclass_fields__)
    assert {model["id"] for model in told["models"]} == {"m", "other"}
    assert set(told["models"][0]) == set(ModelView.__dataclass_fields__)


def snapshot(**settings: object) -> Snapshot:
    """A busy server's."""
    stages = {"queue": 0.5, "encode": 0.25, "denoise": None, "decode": None, "total": 2.0}
    model = ModelView("sd1", "ready", "onnx:cuda", 2**31, 1.5, 0.0123, 4.5, 2.25, stages)
    values: dict[str, object] = {
        "url": "http://gpu:9464/metrics", "version": "0.1.0", "uptime": 7260.0, "seconds": 10.0, "active": 3.0, "waiting": 7.0,
        "requests_per_second": {"CANCELLED": 0.5, "OK": 2.0}, "work_seconds": 12.5, "call_seconds": 0.2, "cache_hits": 0.5,
        "cache_bytes": 2**20, "cache_budget": 2**28, "assets_bytes": 0.0, "assets_quota": 2**30, "memory": 3 * 2**30,
        "cpus": 1.5, "device_free": 2**30, "device_total": 2**33, "models": (model,),
    }  # fmt: skip
    return Snapshot(**{**values, **settings})  # type: ignore[arg-type]


def test_display_of_a_busy_server_has_its_figures() -> None:
    text = text_of(snapshot(), "it went away")
    for part in (
        "img2img 0.1.0 at http://gpu:9464/metrics, up 2 h 1 min, last 10 s",
        "it went away",
        "OK 2.0  CANCELLED 0.5",
        "3 active, 7 waiting, about 12.5 s of work, 0.2 s in the current call",
        "50% hits, 1 MiB of 256 MiB",
        "3.0 GiB, 1.5 CPUs busy",
        "7.0 GiB of 8.0 GiB",
    ):
        assert part in text
    row, stages = (line.split() for line in text.splitlines() if line.startswith("sd1"))
    assert row == ["sd1", "ready", "onnx:cuda", "2.0", "GiB", "1.5", "12.3", "4.5", "2.2"]
    assert stages == ["sd1", "0.50", "0.25", "-", "-", "2.00"]


def test_a_terminal_of_80_columns_shows_every_figure() -> None:
    text = text_of(snapshot(), width=80)
    assert "…" not in text
    assert all(figure in text for figure in ("onnx:cuda", "2.0 GiB", "12.3", "2.2", "2.00", "50% hits"))


def test_control_characters_in_names_are_escaped() -> None:
    evil = ModelView("\x1b[2Jm\x07", "ready", "[bold]x[/bold]\x1b]0;t\x07", 0, 0, None, None, None, {})
    text = text_of(snapshot(models=(evil,), url="http://h/\x1b[31m"), "\x1b[5m")
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]" in text


def read_until(terminal: int, wanted: str, seen: str = "") -> str:
    """A program's output on its terminal, up to `wanted`."""
    while wanted not in seen:
        assert select.select([terminal], [], [], _PATIENCE)[0], f"'{wanted}' never came; there was {seen!r}"
        seen += os.read(terminal, 65536).decode("utf-8", "replace")
    return seen


@pytest.mark.parametrize(
    ("term", "ending"), [("xterm-256color", "q"), ("xterm-256color", "Ctrl-C"), ("dumb", "q"), ("dumb", "Ctrl-C")]
)
def test_top_runs_until_quit_on_any_terminal(server: RunningServer, term: str, ending: str) -> None:
    """It draws again and again, ends at once, and leaves the terminal as it was."""
    terminal, own_side = pty.openpty()
    before = termios.tcgetattr(own_side)
    environment = {**os.environ, "TERM": term, "COLUMNS": "160", "LINES": "40"}
    command = [*_COMMAND, "--interval", "0.1", url_of(server)]
    process = subprocess.Popen(command, stdin=own_side, stdout=own_side, stderr=subprocess.PIPE, env=environment)
    try:
        seen = read_until(terminal, "fake:cpu")
        seen = read_until(terminal, "fake:cpu", "") + seen
        if ending == "q":
            os.write(terminal, b"xq")
        else:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=_PATIENCE)
        assert termios.tcgetattr(own_side) == before
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
        os.close(own_side)
    assert (process.returncode, errors) == (0, b"")
    assert ("\x1b" in seen) == (term != "dumb")


def test_top_waits_for_an_unreachable_server() -> None:
    """It reports the error and continues."""
    with running(lambda: store(m=FakePipeline()), telemetry=TelemetrySettings(metrics_port=0)) as server:
        command = [*_COMMAND, "--interval", "0.1", "--json", url_of(server)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["models"][0]["id"] == "m"
    try:
        assert "no metrics at" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=_PATIENCE)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
