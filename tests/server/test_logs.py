"""The log: a line is a line, it names the call it belongs to by the id that the caller has, and prompts are not in it."""

import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server.api.interceptors import cancelled_status
from img2img_server.support.call import Call, answering
from img2img_server.telemetry.logs import ACCESS, CallFilter, JsonFormatter, TextFormatter, configure
from messages import request
from running import running, store

CALL = Call("/img2img.v1.ModelService/ListModels", "r-17", client="studio")


class Lines(logging.Handler):
    """Keeps the formatted records, from DEBUG on."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.addFilter(CallFilter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """Every line that is logged in the test, as read from JSON."""

    class Read(list[dict[str, Any]]):
        pass

    handler, read = Lines(JsonFormatter()), Read()
    handler.emit = lambda record: read.append(json.loads(handler.format(record)))  # type: ignore[method-assign]
    loggers = [logging.getLogger(), logging.getLogger(ACCESS)]
    before = [logger.level for logger in loggers]
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger(ACCESS).setLevel(logging.DEBUG)
    yield read
    logging.getLogger().removeHandler(handler)
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def access(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["logger"] == ACCESS]


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("img2img_server.x", logging.INFO, __file__, 1, message, arguments, None)
    made.__dict__.update(extra)
    return made


def raised(text: str) -> logging.LogRecord:
    try:
        raise RuntimeError(text)
    except RuntimeError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
        return made


@given(st.text())
def test_any_message_is_one_line_of_text(text: str) -> None:
    line = TextFormatter().format(record("%s", text))
    assert len(line.splitlines()) == 1
    assert all(char.isprintable() or char not in map(chr, (*range(32), *range(127, 160))) for char in line)


@given(st.text())
def test_any_message_is_one_json_object(text: str) -> None:
    line = JsonFormatter().format(record("%s", text))
    assert len(line.splitlines()) == 1
    assert line.isascii()
    assert "\x7f" not in line
    assert json.loads(line)["message"] == text


@given(st.text())
def test_traceback_lines_are_indented_and_cannot_forge_log_lines(text: str) -> None:
    first, *rest = TextFormatter().format(raised(f"{text}\n2026-11-22 10:00:00,000 INFO    img2img.access: forged")).splitlines()
    assert first.endswith("it failed")
    assert rest
    assert all(line.startswith("    ") for line in rest)


def test_traceback_formatted_by_another_handler_is_indented() -> None:
    made = raised("on fire")
    logging.Formatter().format(made)
    assert all(line.startswith("    ") for line in TextFormatter().format(made).splitlines()[1:])


def test_text_format_has_time_level_logger_and_message() -> None:
    line = TextFormatter().format(record("serving on %s:%d", "localhost", 50051))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    img2img_server\.x: serving on localhost:50051", line)


def test_json_format_has_the_exception_as_a_string() -> None:
    line = json.loads(JsonFormatter().format(raised("on fire")))
    assert (line["message"], line["level"], line["logger"]) == ("it failed", "INFO", "img2img_server.x")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("RuntimeError: on fire")
    told = datetime.fromisoformat(line["time"])
    assert line["time"].endswith("Z")
    assert abs(datetime.now(UTC) - told) < timedelta(minutes=5)


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_only_lines_of_a_call_have_its_request_id(formatter: logging.Formatter) -> None:
    handler = Lines(formatter)
    handler.handle(record("before"))
    with answering(CALL):
        handler.handle(record("within"))
    handler.handle(record("on the engine's thread", request_id="r-18"))
    before, within, engine = handler.lines
    assert "r-17" not in before
    assert "r-17" in within
    assert "r-18" in engine
    if isinstance(formatter, JsonFormatter):
        line = json.loads(within)
        assert (line["request_id"], line["client"], line["method"]) == ("r-17", "studio", CALL.method)
        assert "request_id" not in json.loads(before)


@pytest.mark.parametrize(("log_format", "first"), [("text", "2"), ("json", "{")])
def test_repeated_configuration_logs_each_line_once(log_format: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure("text")
        configure(log_format)
        logging.getLogger("img2img_server.x").info("hello")
        logging.getLogger("img2img_server.x").debug("not this")
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(first)
    assert "hello" in line


def test_each_call_logs_one_line_with_the_callers_request_id(lines: list[dict[str, Any]]) -> None:
    with running(lambda: store(m=FakePipeline())) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        _, call = stub.Transform.with_call(request())
        stream = stub.TransformStream(pb.TransformStreamRequest(request=request()), metadata=(("x-request-id", "my-own.1"),))
        list(stream)
    got = dict(call.initial_metadata())["x-request-id"], dict(stream.initial_metadata())["x-request-id"]
    one, other = access(lines)
    assert (one["request_id"], other["request_id"]) == got == (one["request_id"], "my-own.1")
    assert one["method"] == "/img2img.v1.ImageToImageService/Transform"
    assert (one["status"], one["level"], one["model"], one["client"]) == ("OK", "INFO", "m", one["client"])
    assert one["client"].startswith("ipv")
    assert one["seconds"] > 0
    assert "reason" not in one


def test_error_is_logged_with_the_callers_request_id(lines: list[dict[str, Any]]) -> None:
    """In the trailing metadata, in the ErrorInfo, in the log line of the call, and in that of the engine's thread about the
    cause."""
    with (
        running(lambda: store(m=FakePipeline())) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        ImageToImageServiceStub(channel).Transform(request(prompt="fail denoise"))
    error: Any = caught.value
    request_id = dict(error.trailing_metadata())["x-request-id"]
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.metadata["request_id"] == request_id
    (line,) = access(lines)
    assert (line["request_id"], line["status"], line["reason"]) == (request_id, "INTERNAL", "MODEL_FAILED")
    (cause,) = [line for line in lines if "exception" in line]
    assert cause["request_id"] == request_id
    assert "told to fail in denoise" in cause["exception"]


def test_unexpected_errors_are_logged_with_the_request_id(lines: list[dict[str, Any]]) -> None:
    pipeline = FakePipeline()
    pipeline.plan = lambda request: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with (
        running(lambda: store(m=pipeline)) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        ImageToImageServiceStub(channel).Transform(request())
    error: Any = caught.value
    (cause,) = [line for line in lines if "exception" in line]
    assert "ZeroDivisionError" in cause["exception"]
    assert cause["request_id"] == dict(error.trailing_metadata())["x-request-id"]


def test_cancelled_calls_are_logged_as_cancelled(lines: list[dict[str, Any]]) -> None:
    pipeline, inside, leave = FakePipeline(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        leave.wait(60)

    pipeline.before_call = hold
    with running(lambda: store(m=pipeline)) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        call = ImageToImageServiceStub(channel).Transform.future(request(), timeout=100)
        assert inside.wait(60)
        call.cancel()
        leave.set()
    assert [line["status"] for line in access(lines)] == ["CANCELLED"]


@pytest.mark.parametrize(
    ("left", "status"), [(None, "CANCELLED"), (5.0, "CANCELLED"), (0.01, "DEADLINE_EXCEEDED"), (0.0, "DEADLINE_EXCEEDED")]
)
def test_call_cancelled_at_its_deadline_is_deadline_exceeded(left: float | None, status: str) -> None:
    assert cancelled_status(left) == status


def test_unsafe_request_id_is_replaced(lines: list[dict[str, Any]]) -> None:
    with running(lambda: store(m=FakePipeline())) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        metadata = (("x-request-id", "a b [c] INFO forged"),)
        _, call = ImageToImageServiceStub(channel).Transform.with_call(request(), metadata=metadata)
    (line,) = access(lines)
    assert line["request_id"] == dict(call.initial_metadata())["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])


def test_health_checks_are_logged_at_debug_level(lines: list[dict[str, Any]]) -> None:
    with running(lambda: store(m=FakePipeline())) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        health.Check(health_pb2.HealthCheckRequest())
    (line,) = access(lines)
    assert (line["level"], line["method"]) == ("DEBUG", "/grpc.health.v1.Health/Check")


def test_prompts_are_never_logged(lines: list[dict[str, Any]]) -> None:
    with running(lambda: store(m=FakePipeline())) as server, grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        stub.Transform(request(prompt="a very secret prompt", negative_prompt="a secret too"))
        for trouble in ("fail prepare", "fail denoise", "fail finish", "full denoise"):
            with pytest.raises(grpc.RpcError):
                stub.Transform(request(prompt=f"a very secret prompt, {trouble}", negative_prompt="a secret too"))
        for wrong in ({"strength": 2.0}, {"negative_prompt": "a secret too" * 1000}, {"prompt": "a very secret prompt" * 1000}):
            with pytest.raises(grpc.RpcError):
                stub.Transform(request(**{"prompt": "a very secret prompt", **wrong}))
    assert len(access(lines)) == 8
    assert not any("secret" in json.dumps(line) for line in lines)
