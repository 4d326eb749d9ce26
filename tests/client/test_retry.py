"""The calls that both clients retry. Closing the client, or Ctrl-C, ends every wait."""

import hashlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import PATIENCE, FakeServer, FakeService
from fake_statuses import error_info, queue_full, rich_status, unavailable, wrong_field
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import model_pb2
from img2img_client import (
    Cancelled,
    Client,
    Completed,
    Img2ImgError,
    Overloaded,
    Queued,
    RetryPolicy,
    Started,
    Unavailable,
)


def transform(client: Client) -> object:
    return client.transform(b"file")


def stream(client: Client) -> object:
    return list(client.transform_stream(b"file"))


KEPT = hashlib.sha256(b"file").hexdigest()
CALLS: dict[str, Callable[[Client], object]] = {
    "transform": transform,
    "transform_stream": stream,
    "models": lambda client: client.models(),
    "load_model": lambda client: client.load_model("demo"),
    "upload": lambda client: client.upload(b"file"),
    "download": lambda client: client.download(KEPT),
}
ONCE: dict[str, Callable[[Client], object]] = {
    "unload_model": lambda client: client.unload_model("demo"),
    "delete_asset": lambda client: client.delete_asset("1f"),
}


@pytest.mark.parametrize("name", CALLS)
def test_transient_errors_are_retried_transparently(
    patient: Client, server: FakeServer, retry_log: list[tuple[int, str, float]], name: str
) -> None:
    server.service.models = [model_pb2.Model(id="demo")]
    server.assets.files[KEPT] = b"file"
    server.service.failures = [unavailable(), queue_full(0.005), unavailable()]
    server.assets.failures = list(server.service.failures)
    assert CALLS[name](patient) is not None
    assert len(server.service.metadata) + len(server.assets.metadata) == 4
    assert [attempt for attempt, _, _ in retry_log] == [1, 2, 3]
    assert [status for _, status, _ in retry_log] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNAVAILABLE"]
    assert retry_log[1][2] >= 0.005


@pytest.mark.parametrize("name", CALLS)
def test_call_fails_after_the_last_attempt(patient: Client, server: FakeServer, name: str) -> None:
    server.service.failure = server.assets.failure = unavailable()
    with pytest.raises(Unavailable, match="shutting down"):
        CALLS[name](patient)
    assert len(server.service.metadata) + len(server.assets.metadata) == 4


UNSAFE = {
    "wrong": wrong_field("strength", "too much"),
    "internal": rich_status(code_pb2.INTERNAL, "failed", error_info("MODEL_FAILED")),
    "memory": rich_status(code_pb2.RESOURCE_EXHAUSTED, "too large", error_info("OUT_OF_MEMORY")),
    "late": rich_status(code_pb2.DEADLINE_EXCEEDED, "late", error_info("DEADLINE_UNMEETABLE", estimate_seconds="9")),
    "missing": rich_status(code_pb2.NOT_FOUND, "none", error_info("MODEL_NOT_FOUND")),
    "cancelled": rich_status(code_pb2.CANCELLED, "gone", error_info("CANCELLED")),
    "unknown": rich_status(code_pb2.UNKNOWN, "what"),
    "denied": rich_status(code_pb2.UNAUTHENTICATED, "who", error_info("UNAUTHENTICATED")),
    "later": queue_full(3600),
}


@pytest.mark.parametrize("failure", UNSAFE)
@pytest.mark.parametrize("name", ["transform", "transform_stream", "upload", "models"])
def test_permanent_errors_are_not_retried(
    patient: Client, server: FakeServer, retry_log: list[tuple[int, str, float]], name: str, failure: str
) -> None:
    server.service.failure = server.assets.failure = UNSAFE[failure]
    with pytest.raises(Img2ImgError):
        CALLS[name](patient)
    assert len(server.service.metadata) + len(server.assets.metadata) == 1
    assert retry_log == []


@pytest.mark.parametrize("name", ONCE)
def test_non_idempotent_calls_are_not_retried(patient: Client, server: FakeServer, name: str) -> None:
    server.service.failure = server.assets.failure = unavailable()
    with pytest.raises(Unavailable):
        ONCE[name](patient)
    assert len(server.service.metadata) + len(server.assets.metadata) == 1


def test_retries_can_be_switched_off(client: Client, service: FakeService) -> None:
    service.failure = queue_full(0.001)
    with pytest.raises(Overloaded):
        client.transform(b"file")
    assert len(service.requests) == 1


def test_retries_repeat_the_request_with_the_remaining_timeout(patient: Client, service: FakeService) -> None:
    service.failures = [queue_full(0.2), queue_full(0.2)]
    patient.transform(b"file", prompt="winter", request_id="mine", timeout=5)
    first, second, third = service.requests
    assert first == second == third
    assert not third.HasField("seed")
    assert [sent["x-request-id"] for sent in service.metadata] == ["mine"] * 3
    left = [seconds for seconds in service.seconds_left if seconds is not None]
    assert left[0] - 0.1 > left[1] > left[2] + 0.1  # gRPC rounds them, the more the longer


def test_call_fails_at_once_if_the_retry_delay_exceeds_the_timeout(patient: Client, service: FakeService) -> None:
    service.failure = queue_full(30)
    with pytest.raises(Overloaded) as caught:
        patient.transform(b"file", timeout=10)
    assert caught.value.retry_after == 30
    assert len(service.requests) == 1


def test_streams_are_retried_until_started(patient: Client, service: FakeService) -> None:
    service.failures = [unavailable(), unavailable()]
    kinds = [type(event) for event in patient.transform_stream(b"file")]
    assert kinds[:4] == [Queued, Queued, Queued, Started]
    assert kinds[-1] is Completed
    assert len(service.requests) == 3


@pytest.mark.parametrize("kind", [Client, Blocking])
@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 1e300, -1.0])
@pytest.mark.parametrize("name", ["transform", "transform_stream", "models"])
def test_invalid_timeout_is_a_value_error(kind: Any, server: FakeServer, name: str, seconds: float) -> None:
    with kind(server.target, timeout=seconds) as client, pytest.raises(ValueError, match="timeout is"):
        CALLS[name](client)
    with kind(server.target, timeout=1e9) as client:
        assert CALLS[name](client) is not None


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_a_stream_that_failed_has_ended(kind: Any, server: FakeServer) -> None:
    """Iterating further yields nothing: there is no attempt after the error."""
    server.service.fail_before = 1
    server.service.failures = [unavailable()]
    with kind(server.target, timeout=120, retries=None) as once:
        events = once.transform_stream(b"file")
        with pytest.raises(Unavailable):
            list(events)
        assert list(events) == []


@pytest.mark.parametrize("kind", [Client, Blocking])
@pytest.mark.parametrize(("closed", "streamed"), [("client", False), ("client", True), ("stream", True)])
def test_closing_ends_a_wait(kind: Any, server: FakeServer, closed: str, streamed: bool) -> None:
    server.service.failure = queue_full(50)
    waiting, ended = threading.Event(), threading.Event()
    client = kind(server.target, retries=RetryPolicy(on_retry=lambda *_: waiting.set()))
    server.service.fail_before = 0
    events = client.transform_stream(b"file")

    def work() -> None:
        with pytest.raises(Cancelled):
            list(events) if streamed else client.transform(b"file")
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(PATIENCE)
    assert not ended.is_set()
    events.close() if closed == "stream" else client.close()
    assert ended.wait(PATIENCE)
    thread.join(PATIENCE)
    client.__exit__(None, None, None)


def test_interrupting_ends_a_wait(server: FakeServer, tmp_path: Path) -> None:
    server.service.failure, server.service.fail_before = queue_full(50), 1
    (tmp_path / "photo.png").write_bytes(b"file")
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from img2img_cli.__main__ import main; sys.exit(main())"
    command = ["transform", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out.png"), "--target", server.target]
    with subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "retrying" in line)
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=PATIENCE)[1]
        finally:
            process.kill()
    assert line.startswith("img2img transform: the queue is full (retry after 50 s); retrying in 5")
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert len(server.service.requests) == 1


def test_client_reconnects_to_a_restarted_server(server: FakeServer) -> None:
    gone = threading.Event()
    policy = RetryPolicy(max_attempts=1000, first_backoff=0.05, most_backoff=0.05, on_retry=lambda *_: gone.set())
    results: list[object] = []
    with Client(server.target, timeout=PATIENCE, retries=policy) as client:
        client.transform(b"file")
        server.stop()
        thread = threading.Thread(target=lambda: results.append(client.transform(b"file")))
        thread.start()
        assert gone.wait(PATIENCE)
        after = FakeServer(server.port)
        after.start()
        try:
            thread.join(PATIENCE)
            assert len(results) == len(after.service.requests) == 1
        finally:
            after.stop()


def test_retries_are_on_by_default(server: FakeServer) -> None:
    server.service.failures = [queue_full(0.001)]
    with Client(server.target, timeout=PATIENCE) as client:
        client.transform(b"file")
    assert len(server.service.requests) == 2
