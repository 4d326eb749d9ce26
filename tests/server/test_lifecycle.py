"""The server's process: signals during startup, serving, draining and hanging calls, and a stuck engine."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_cli.__main__ import main
from img2img_server.api.server import Server
from messages import failure, request
from model_folder import make_bundle
from server_process import FAULTY, Process

STUCK = 70
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
MODULE = ("-m", "img2img_server", "--models")


def _events(channel: grpc.Channel, **fields: Any) -> Any:
    return ImageToImageServiceStub(channel).TransformStream(pb.TransformStreamRequest(request=request(**fields)), timeout=120)


def _drain(process: Process, channel: grpc.Channel, number: signal.Signals) -> None:
    """Sends the first signal, and returns once the server drains."""
    health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs for mypy know no methods
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    process.popen.send_signal(number)
    assert next(watch).status == NOT_SERVING


def test_second_signal_ends_running_requests_at_once(start: Callable[..., Process], bundle: Callable[[str], Path]) -> None:
    """With a real model, in the middle of a long request."""
    process = start(*MODULE, str(bundle("demo")))
    with process.channel() as channel:
        events = _events(channel, num_inference_steps=100, strength=1.0, width=256, height=256, image_count=4)
        while next(events).WhichOneof("event") != "progress":
            pass
        _drain(process, channel, signal.SIGTERM)
        while next(events).WhichOneof("event") != "progress":  # running requests continue
            pass
        process.popen.send_signal(signal.SIGINT)
        code, details = failure(lambda: list(events))
    assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert process.popen.wait(60) == 130
    assert not process.port_file.exists()
    assert "Traceback" not in process.log


def test_second_signal_ends_the_process_during_a_hanging_model_call(start: Callable[..., Process]) -> None:
    process = start(*FAULTY, "call", "--models", "m", "--watchdog", "0")
    with process.channel() as channel:
        running, waiting = _events(channel), _events(channel)
        assert [next(events).WhichOneof("event") for events in (running, waiting)] == ["queued"] * 2
        assert process.next_output() == "call"
        _drain(process, channel, signal.SIGINT)
        process.popen.send_signal(signal.SIGTERM)
        for events in (running, waiting):
            code, details = failure(lambda events=events: list(events))  # type: ignore[misc]
            assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert process.popen.wait(60) == 143
    assert not process.port_file.exists()


@pytest.mark.parametrize(
    ("draining", "grace"),
    [(False, "30"), pytest.param(True, "30", marks=pytest.mark.nightly), (True, "0")],
    ids=["serving", "draining", "grace is over"],
)
def test_stuck_engine_ends_the_process_with_its_own_exit_status(
    start: Callable[..., Process], draining: bool, grace: str
) -> None:
    process = start(*FAULTY, "call", "--models", "m", "--watchdog", "2", "--grace", grace)
    with process.channel() as channel:
        events = _events(channel)
        assert process.next_output() == "call"
        if draining:
            _drain(process, channel, signal.SIGTERM)
        code, details = failure(lambda: list(events))
    assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_STUCK")
    assert process.popen.wait(60) == STUCK
    assert not process.port_file.exists()
    assert "Thread 0x" in process.log  # where each thread was
    assert "in denoise" in process.log


def test_a_second_signal_ends_the_process_even_if_the_event_loop_is_blocked(start: Callable[..., Process]) -> None:
    process = start(*FAULTY, "end", "--models", "m", "--watchdog", "0")
    with process.channel() as channel:
        events = _events(channel)
        assert next(events).WhichOneof("event") == "queued"
        assert process.next_output() == "end"  # in a call
        _drain(process, channel, signal.SIGINT)
        process.popen.send_signal(signal.SIGTERM)
        assert process.next_output() == "end"  # in the event loop
        assert process.popen.wait(60) == 143


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_startup_ends_the_process(start: Callable[..., Process], number: signal.Signals, status: int) -> None:
    process = start(*FAULTY, "loading", "--models", "m")
    assert process.next_output() == "loading"
    process.popen.send_signal(number)
    assert process.popen.wait(60) == status
    assert "stopping before startup finished" in process.log


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("that address is open to everybody"), 2, "that address is open to everybody"),
        (OSError("cannot listen"), 1, "cannot listen"),
        (FileNotFoundError(2, "No such file", "tokens"), 1, "tokens: No such file"),
    ],
)
def test_a_startup_error_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    line: str,
) -> None:
    async def start(server: Server) -> None:
        raise error

    monkeypatch.setattr(Server, "start", start)
    assert main(["serve", "--models", str(make_bundle(tmp_path / "a"))]) == status
    assert capsys.readouterr().err == f"img2img serve: {line}\n"
