"""Clients cannot flood the log: repeated lines are suppressed and counted, and metrics count every call."""

import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fakes import Clock, FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api.grpc_extensions import free_failed_batches
from img2img_server.config import TelemetrySettings
from img2img_server.telemetry.logs import INTERVAL, MOST, Repeats, TextFormatter, _Handler, configure
from messages import failure, request
from running import running, store
from scraping import settled, value
from soak_parts.hostile import WATCH, unread, watch_of


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The output of the server's own handler."""
    written, handler = io.StringIO(), _Handler(TextFormatter())
    handler.setStream(written)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield written
    root.removeHandler(handler)
    handler.close()
    root.setLevel(before)


def of(message: str, line: int = 1, kind: object = "") -> logging.LogRecord:
    record = logging.LogRecord("x", logging.WARNING, __file__, line, message, ("value",), None)
    record.kind = kind
    return record


def test_repeated_lines_are_suppressed_and_summarized() -> None:
    clock = Clock()
    repeats = Repeats(clock)
    assert [repeats.passes(of("a %s")) for _ in range(MOST + 50)] == [True] * MOST + [False] * 50
    assert repeats.passes(of("b %s", line=2)), "another kind is not concerned"
    assert repeats.due() == []
    clock.now += INTERVAL
    (line,) = repeats.due()
    assert line.getMessage() == "50 similar lines suppressed in 10 s, the last: a value"
    assert repeats.passes(of("a %s")), "a new interval"
    clock.now += INTERVAL
    assert repeats.due() == []


def test_repeated_log_lines_are_limited_per_kind() -> None:
    repeats = Repeats(Clock())
    assert sum(repeats.passes(of("a %s", kind=number)) for number in range(1, 100_000)) < 2000
    assert all(repeats.passes(of("a %s", kind=None)) for _ in range(5000))


def test_refused_calls_are_counted_in_metrics_and_few_of_them_in_the_log(log: io.StringIO) -> None:
    telemetry = TelemetrySettings(metrics_port=0)
    calls = 300
    with (
        running(lambda: store(m=FakePipeline()), telemetry=telemetry) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        for future in [stub.Transform.future(request(strength=7.0)) for _ in range(calls)]:
            assert failure(future.result)[0] == grpc.StatusCode.INVALID_ARGUMENT
        assert stub.Transform(request(model=pb.ModelReference(path="m"))).images
        port = server.server.metrics_port
        assert port is not None
        samples = settled(port)
    counted = value(samples, "img2img_requests_total", method="ImageToImageService/Transform", status="INVALID_ARGUMENT")
    assert counted == calls
    lines = log.getvalue().splitlines()
    assert sum("INVALID_ARGUMENT" in line for line in lines) <= 3 * MOST
    assert any("Transform OK" in line for line in lines), "a call that did work has its own line"


def test_watchers_that_leave_without_reading_cause_no_traceback(log: io.StringIO) -> None:
    with running(lambda: store(m=FakePipeline())) as server:
        for _ in range(3):
            with unread(server.port, *[(WATCH, watch_of(""))] * 50, *[(WATCH, b"\xff")] * 50):
                pass
    assert "Traceback" not in log.getvalue()


def test_python_warnings_go_through_the_log_and_are_counted(tmp_path: Path) -> None:
    script = tmp_path / "warns.py"
    script.write_text(
        "import warnings\nfrom img2img_server.telemetry import logs\nlogs.configure('json')\nwarnings.simplefilter('always')\n"
        "for number in range(20000): warnings.warn(f'bad tag {number}')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert 0 < len(lines) <= MOST + 2
    assert all(line.startswith("{") for line in lines)
    assert f"{20000 - MOST} similar lines suppressed" in lines[-1]


def test_configure_captures_warnings_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers = list(root.handlers)
    configure("text")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("from a library", UserWarning, stacklevel=1)
    finally:
        logging.captureWarnings(False)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
    written = capsys.readouterr().err
    assert len(written.splitlines()) == 1
    assert "from a library" in written
    assert "py.warnings" in written


def test_disconnect_while_sending_the_status_logs_no_error(caplog: pytest.LogCaptureFixture) -> None:
    free_failed_batches()
    logger = logging.getLogger("grpc._cython.cygrpc")
    logger.error("ExecuteBatchError raised in core by servicer method [%s]", "/a.B/C")
    logger.error("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
