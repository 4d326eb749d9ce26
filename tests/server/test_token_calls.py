"""Tokens at a real server: which calls need one, and how long a call counts."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from google.protobuf.message import Message
from granting import bearing, grant, rest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server.access.tokens import editing
from messages import failure, request
from running import running, store

TRANSFORM = "/img2img.v1.ImageToImageService/Transform"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


@contextlib.contextmanager
def connected(path: Path, pipeline: FakePipeline, **settings: Any) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with (
        running(lambda: store(m=pipeline), tokens=path, **settings) as server,
        grpc.insecure_channel(f"localhost:{server.port}", options) as channel,
    ):
        yield channel


def test_without_a_token_only_health_checks_are_answered(path: Path) -> None:
    secret = grant(path, "alice")
    with connected(path, FakePipeline()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        images, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        calls: list[Callable[[Any], object]] = [
            lambda metadata: images.Transform(request(), metadata=metadata),
            lambda metadata: list(images.TransformStream(pb.TransformStreamRequest(request=request()), metadata=metadata)),
            lambda metadata: models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata),
            lambda metadata: list(reflect.ServerReflectionInfo(iter([question]), metadata=metadata)),
        ]
        for call in calls:
            code, details = failure(lambda call=call: call(()))  # type: ignore[misc]
            assert (code, details["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
            call(bearing(secret))


def test_only_an_admin_loads_and_unloads(path: Path) -> None:
    secret = grant(path, "alice")
    with connected(path, FakePipeline()) as channel:
        models = ModelServiceStub(channel)
        for call in (
            lambda: models.LoadModel(model_pb2.LoadModelRequest(id="m"), metadata=bearing(secret)),
            lambda: models.UnloadModel(model_pb2.UnloadModelRequest(id="m"), metadata=bearing(secret)),
        ):
            code, details = failure(call)
            assert (code, details["reason"]) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


class Blocked:
    """A pipeline whose calls wait until `go`."""

    def __init__(self) -> None:
        self.pipeline, self.called, self.go = FakePipeline(), threading.Event(), threading.Event()
        self.pipeline.before_call = self._wait

    def _wait(self) -> None:
        self.called.set()
        assert self.go.wait(60)


def stream(channel: grpc.Channel, secret: str, prompt: str, timeout: float) -> tuple[Any, Callable[[], object]]:
    """A call that has begun, and what waits for its end."""
    message = pb.TransformStreamRequest(request=request(prompt=prompt))
    call = ImageToImageServiceStub(channel).TransformStream(message, metadata=bearing(secret), timeout=timeout)
    return call, lambda: list(call)


def unary(channel: grpc.Channel, secret: str, prompt: str, timeout: float) -> tuple[Any, Callable[[], object]]:
    message = request(prompt=prompt)
    call = ImageToImageServiceStub(channel).Transform.future(message, metadata=bearing(secret), timeout=timeout)
    return call, call.result


@pytest.mark.parametrize("start", [stream, unary])
@pytest.mark.parametrize("ending", ["cancel", "finish", "fail", "deadline"])
def test_call_counts_towards_concurrency_until_it_ends_in_any_way(
    start: Callable[[grpc.Channel, str, str, float], tuple[Any, Callable[[], object]]], ending: str, path: Path
) -> None:
    secret = grant(path, "alice", concurrency=1)
    blocked = Blocked()
    with connected(path, blocked.pipeline) as channel:
        models = ModelServiceStub(channel)
        call, wait = start(channel, secret, "fail advance" if ending == "fail" else "", 3 if ending == "deadline" else 60)
        assert blocked.called.wait(120)
        code, details = failure(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(secret)))
        assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_QUEUE_FULL")
        assert float(str(details["retry"])) > 0
        if ending == "cancel":
            call.cancel()
        if ending in ("finish", "fail"):
            blocked.go.set()
        with contextlib.nullcontext() if ending == "finish" else pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            wait()
        # After the caller has left, the slot is free while the model still finishes its call.
        listed = _until_admitted(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(secret)))
        assert isinstance(listed, Message)
        blocked.go.set()


def _until_admitted(call: Callable[[], object]) -> object:
    """The server notices a cancellation a moment after its caller, so this retries until the slot is free."""
    for _ in range(2000):
        try:
            return call()
        except grpc.RpcError as error:
            caught: Any = error
            assert caught.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    raise AssertionError("the place was never freed")


def test_messages_of_refused_calls_are_not_read(path: Path) -> None:
    """Its image, up to 33 MB, is not even parsed; otherwise the call would fail as a malformed message."""
    secret = grant(path, "alice", concurrency=1, requests_per_minute=6)
    with connected(path, FakePipeline()) as channel:
        garbage = channel.unary_unary(TRANSFORM, request_serializer=bytes, response_deserializer=bytes)
        code, _ = failure(lambda: garbage(b"\xff" * 30_000_000, timeout=60))
        assert code == grpc.StatusCode.UNAUTHENTICATED
        ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), metadata=bearing(secret))
        code, details = failure(lambda: garbage(b"\xff" * 30_000_000, metadata=bearing(secret), timeout=60))
        assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert 9 < float(str(details["retry"])) <= 10


def test_call_counts_before_its_message_is_received(path: Path) -> None:
    """Otherwise a token with one concurrent call could make the server hold a thousand images."""
    secret = grant(path, "alice", concurrency=1)
    gone = threading.Event()

    def nothing() -> Iterator[bytes]:
        gone.wait(60)
        yield from ()

    with connected(path, FakePipeline()) as channel:
        slow = channel.stream_stream(TRANSFORM, request_serializer=bytes, response_deserializer=bytes)
        models = ModelServiceStub(channel)
        first = _held(
            lambda: slow(nothing(), metadata=bearing(secret), timeout=60),
            lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(secret)),
        )
        second = slow(nothing(), metadata=bearing(secret), timeout=60)
        assert second.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        _until_admitted(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(secret)))
        third = slow(nothing(), metadata=bearing(secret), timeout=60)
        gone.set()
        assert third.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_token_changes_apply_to_a_running_server(path: Path) -> None:
    """Added and taken away while it serves."""
    grant(path, "alice")
    with connected(path, FakePipeline()) as channel:
        models = ModelServiceStub(channel)
        bob = grant(path, "bob")
        allowed = _poll(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(bob)))
        assert [model.id for model in allowed.models] == ["m"]
        with editing(path) as known:
            del known["bob"]
        rest(path)
        code = _poll_refusal(lambda: models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing(bob)))
        assert code == grpc.StatusCode.UNAUTHENTICATED


def _poll(call: Callable[[], Any]) -> Any:
    while True:  # the test's own time limit ends it
        with contextlib.suppress(grpc.RpcError):
            return call()
        threading.Event().wait(0.05)


def _held(begin: Callable[[], Any], probe: Callable[[], object]) -> Any:
    """A call that has the only slot, so `probe` is refused. A call that arrived during a probe was refused, so another is
    made."""
    for _ in range(100):
        call = begin()
        while call.is_active():
            try:
                probe()
            except grpc.RpcError as error:
                caught: Any = error
                assert caught.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                if call.is_active():
                    return call
            threading.Event().wait(0.05)
    raise AssertionError("no call was ever let in")


def _poll_refusal(call: Callable[[], object]) -> grpc.StatusCode:
    while True:
        try:
            call()
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        threading.Event().wait(0.05)


def test_missing_token_file_is_an_error_before_models_are_loaded(path: Path) -> None:
    loaded = []

    def load() -> Any:
        loaded.append(1)
        return store(m=FakePipeline())

    with pytest.raises(ValueError, match=r"tokens: .* cannot be read"), running(load, tokens=path):
        raise AssertionError("it must not start")
    assert not loaded
