"""Untrusted clients cannot exhaust connections, escape the model store, or learn internals."""

import asyncio
import contextlib
import itertools
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_codecs import FakeProcess
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from img2img.v1 import image_to_image_pb2 as pb
from img2img.v1 import model_pb2
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img.v1.model_pb2_grpc import ModelServiceStub
from img2img_server import images
from img2img_server.api import server as server_module
from img2img_server.api import transport
from img2img_server.bundle.manifest import write_manifest
from img2img_server.codecs.pool import Codecs
from img2img_server.config import ServerConfig
from img2img_server.models.registry import ModelRegistry
from messages import failure, request
from running import RunningServer, manifest, running, store
from soak_parts import raw_http2
from soak_parts.raw_http2 import RawConnection, settings_of

CHECK = "/grpc.health.v1.Health/Check"
TRANSFORM = "/img2img.v1.ImageToImageService/Transform"


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running(lambda: store(m=FakePipeline())) as server:
        yield server


def is_healthy(server: RunningServer) -> bool:
    with grpc.insecure_channel(f"localhost:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        found = health.Check(health_pb2.HealthCheckRequest(), timeout=120).status
        return bool(found == health_pb2.HealthCheckResponse.SERVING)


# Connections.


def test_http2_settings_announce_call_and_metadata_limits(server: RunningServer) -> None:
    with RawConnection(server.port) as connection:
        found = settings_of(next(frame for frame in connection.frames() if frame.kind == raw_http2.SETTINGS))
    assert found[raw_http2.MAX_CONCURRENT_STREAMS] == transport.MAX_STREAMS
    assert found[raw_http2.MAX_HEADER_LIST_SIZE] == transport.MAX_METADATA_BYTES


def test_excessive_pings_close_the_connection(server: RunningServer) -> None:
    with RawConnection(server.port) as connection:
        for _ in range(20):
            with contextlib.suppress(ConnectionError):
                connection.send(raw_http2.PING, b"01234567")
        goodbyes = [frame.payload for frame in connection.frames() if frame.kind == raw_http2.GOAWAY]
    assert int.from_bytes(goodbyes[-1][4:8], "big") == raw_http2.ENHANCE_YOUR_CALM
    assert is_healthy(server)


def test_calls_received_during_an_event_loop_stall_are_answered(server: RunningServer) -> None:
    """By default gRPC itself cancels waiting calls from the 1000th on."""
    late = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(late.set)
        connections = [stack.enter_context(RawConnection(server.port)) for _ in range(2)]
        frames = [connection.frames() for connection in connections]
        server.loop.call_soon_threadsafe(late.wait)
        streams = range(1, 2 * transport.MAX_STREAMS, 2)
        for connection, received in zip(connections, frames, strict=True):
            for stream in streams:
                connection.call(CHECK, b"", stream=stream)
            connection.send(raw_http2.PING, bytes(8))
            # gRPC's own threads have read all calls once they answer.
            next(frame for frame in received if frame.kind == raw_http2.PING and frame.flags & raw_http2.ACK)
        late.set()
        for received in frames:
            ended = list(itertools.islice(_ends(received), len(streams)))
            assert sorted(frame.stream for frame in ended) == list(streams)
            assert not [frame for frame in ended if b"CANCELLED" in frame.payload]


def _ends(frames: Iterator[raw_http2.Frame]) -> Iterator[raw_http2.Frame]:
    """The last frame of each call."""
    return (frame for frame in frames if frame.kind == raw_http2.HEADERS and frame.flags & raw_http2.END_STREAM)


def test_oversized_metadata_fails_only_its_own_call(server: RunningServer) -> None:
    with grpc.insecure_channel(f"localhost:{server.port}") as channel:
        stub = ImageToImageServiceStub(channel)
        assert stub.Transform(request(), metadata=(("x-note", "a" * 15_000),), timeout=120).images
        with pytest.raises(grpc.RpcError) as caught:
            stub.Transform(request(), metadata=(("x-note", "a" * 17_000),), timeout=120)
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Transform(request(), timeout=120).images


def test_connection_limit_frees_slots_when_connections_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_CONNECTIONS", 2)
    with running(lambda: store(m=FakePipeline())) as server:
        first, second = RawConnection(server.port), RawConnection(server.port)
        kinds = [next(connection.frames()).kind for connection in (first, second)]
        assert kinds == [raw_http2.SETTINGS] * 2
        assert not _is_accepted(server), "a third is closed without a word"
        first.close()
        while not _is_accepted(server):  # the server notices this a moment later
            threading.Event().wait(0.05)
        second.close()


def _is_accepted(server: RunningServer) -> bool:
    with contextlib.suppress(ConnectionError), RawConnection(server.port) as connection:
        return next(connection.frames(), None) is not None
    return False


def test_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HANDSHAKE_SECONDS", 1)
    with (
        running(lambda: store(m=FakePipeline())) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection,
    ):
        while connection.recv(4096):  # the server's settings, and then the end
            pass


async def test_unresponsive_client_is_detected_and_its_call_cancelled() -> None:
    """It neither closes its connection nor answers pings, like a machine without power."""
    called, cancelled = asyncio.Event(), asyncio.Event()

    async def work(requests: object, context: object) -> None:
        called.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    options = transport.options(ServerConfig(), keepalive=1)
    server = grpc.aio.server(options=options)
    handler: Any = grpc.stream_stream_rpc_method_handler(work)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Work": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with await asyncio.to_thread(RawConnection, port) as connection:
        await asyncio.to_thread(connection.call, "/test.Test/Work")
        await asyncio.wait_for(called.wait(), 120)
        await asyncio.wait_for(cancelled.wait(), 60)
    await server.stop(0)


def test_connection_age_is_limited_only_with_tls(tmp_path: Path) -> None:
    from img2img_server.config import TlsSettings

    plain, secure = ServerConfig(), ServerConfig(tls=TlsSettings(tmp_path / "c", tmp_path / "k"))
    assert "grpc.max_connection_age_ms" not in dict(transport.options(plain))
    assert dict(transport.options(secure))["grpc.max_connection_age_ms"] == 3_600_000


# The store.


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A store with the model "inside", and beside it a bundle "outside" that is none of its."""
    for name in ("store/inside", "outside"):
        (tmp_path / name).mkdir(parents=True)
        write_manifest(tmp_path / name, manifest(f"acme/{Path(name).name}"))
    return tmp_path


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[grpc.Channel]:
    def load() -> ModelRegistry:
        return ModelRegistry.load(folder, lambda bundle, manifest: FakePipeline())

    with (
        running(load, models=folder, **settings) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        yield channel


ESCAPES = ("..", "../outside", "inside/../../outside", "./inside/../../outside", "/etc/passwd", "//outside", "inside\x00", "\x00",
           "..\\outside", "~", "~root", "%2e%2e/outside", "file:///etc/passwd", "outside", ".", "./", "in\nside",
           "x" * 100_000, "\U0001f5bc" * 10_000, "\n" * 10_000,
           "\u2025/outside", "$HOME", "-rf")  # fmt: skip


def test_model_path_cannot_escape_the_store(folders: Path) -> None:
    """The error is the same for existing and missing files."""
    with serving(folders / "store") as channel:
        stub, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        assert stub.Transform(request(model=pb.ModelReference(path="inside")), timeout=120).model_id == "inside"
        for escape in (*ESCAPES, str(folders / "outside"), str(folders / "store" / "inside")):
            for call in (
                lambda escape=escape: stub.Transform(request(model=pb.ModelReference(path=escape)), timeout=120),
                lambda escape=escape: models.GetModel(model_pb2.GetModelRequest(id=escape), timeout=120),
                lambda escape=escape: models.LoadModel(model_pb2.LoadModelRequest(id=escape), timeout=120),
                lambda escape=escape: models.UnloadModel(model_pb2.UnloadModelRequest(id=escape), timeout=120),
            ):
                assert_harmless(call, folders, escape)


@pytest.mark.parametrize("field", ["repo_id", "variant", "revision", "allow_patterns", "ignore_patterns"])
def test_other_reference_fields_cannot_escape_the_store(field: str, folders: Path) -> None:
    with serving(folders / "store") as channel:
        stub = ImageToImageServiceStub(channel)
        for escape in (*ESCAPES, "../*", "**/../../outside/*", "[", "acme/outside", str(folders / "outside")):
            value = [escape] if field.endswith("patterns") else escape
            reference = pb.ModelReference(**{field: value})  # type: ignore[arg-type]
            assert_harmless(lambda reference=reference: stub.Transform(request(model=reference), timeout=120), folders, escape)  # type: ignore[misc]


def assert_harmless(call: Callable[[], object], folders: Path, sent: str) -> None:
    """A refusal caused by the caller, which discloses no path that the caller did not send."""
    code, details = failure(call)
    assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED), (sent, details)
    assert str(folders) not in str(details).replace(sent, ""), sent
    assert len(str(details["message"])) < 8192, "what was sent is not sent back at length"


# Internals must not be in errors.

SECRETS = ("/srv/secret", "hunter2", "Traceback", "RuntimeError")


def revealed(call: Callable[[], object]) -> str:
    """The whole text of a failed call's status."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return "\n".join(
        [error.details(), *(f"{key} {value}" for key, value in (*error.initial_metadata(), *error.trailing_metadata()))]
    )


def _fail(*words: object, **settings: object) -> Any:
    raise RuntimeError("cannot read /srv/secret/key with password hunter2")


@pytest.mark.parametrize("where", ["plan", "prepare", "denoise", "advance", "finish", "decode", "encode_pixels"])
def test_an_errors_text_stays_in_the_log(where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FakePipeline()
    if hasattr(pipeline, where):
        monkeypatch.setattr(pipeline, where, _fail)
    else:
        monkeypatch.setattr(images, where, _fail)
        monkeypatch.setattr(server_module, "Codecs", partial(Codecs, make=FakeProcess))
    with (
        running(lambda: store(m=pipeline)) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        stub = ImageToImageServiceStub(channel)
        for call in (
            lambda: stub.Transform(request(), timeout=120),
            lambda: list(stub.TransformStream(pb.TransformStreamRequest(request=request()), timeout=120)),
        ):
            answer = revealed(call)
            assert not [secret for secret in SECRETS if secret in answer], answer
    assert "hunter2" in caplog.text, "it was really raised"


def test_bundle_problems_are_only_in_the_log(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Callers do not see them, in particular the path of the folder."""
    damaged = folders / "store" / "damaged"
    damaged.mkdir()
    write_manifest(damaged, manifest("acme/damaged"))
    (damaged / "manifest.json").write_text((damaged / "manifest.json").read_text().replace('"files": {}', '"files": {"x": "0"}'))
    with serving(folders / "store") as channel:
        stub, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        answer = revealed(lambda: stub.Transform(request(model=pb.ModelReference(path="damaged")), timeout=120))
        assert str(folders) not in answer
        listed = models.ListModels(model_pb2.ListModelsRequest(), timeout=120)
        assert {model.id for model in listed.models} == {"inside", "damaged"}
        assert str(folders) not in str(listed)
    assert str(damaged) in caplog.text


def test_a_token_is_in_no_answer_and_no_log(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    from img2img_server.access import tokens

    secret, path = tokens.make_secret(), folders / "tokens.toml"
    with tokens.editing(path) as known:
        known["alice"] = tokens.Token("alice", tokens.digest(secret), models=("inside",))
    bearing = (("authorization", f"Bearer {secret}"),)
    with caplog.at_level(logging.DEBUG), serving(folders / "store", tokens=path) as channel:
        stub = ImageToImageServiceStub(channel)
        call = stub.Transform.with_call(request(), metadata=bearing, timeout=120)[1]
        answers = [str((*call.initial_metadata(), *call.trailing_metadata()))]
        answers.append(revealed(lambda: stub.Transform(request(strength=7), metadata=bearing, timeout=120)))
        answers.append(
            revealed(lambda: stub.Transform(request(), metadata=(("authorization", f"Bearer x{secret}"),), timeout=120))
        )
    for text in (*answers, caplog.text, path.read_text()):
        assert secret not in text
        assert secret.removeprefix(tokens.PREFIX) not in text


def test_a_token_sees_no_other_models(folders: Path) -> None:
    """Neither by requests nor by the error for a missing model."""
    from img2img_server.access import tokens

    hidden = folders / "store" / "hidden"
    hidden.mkdir()
    write_manifest(hidden, manifest("acme/hidden"))
    secret, path = tokens.make_secret(), folders / "tokens.toml"
    with tokens.editing(path) as known:
        known["alice"] = tokens.Token("alice", tokens.digest(secret), models=("in*",))
    bearing = (("authorization", f"Bearer {secret}"),)
    with serving(folders / "store", tokens=path) as channel:
        stub, models = ImageToImageServiceStub(channel), ModelServiceStub(channel)
        allowed = stub.Transform(request(model=pb.ModelReference(path="inside")), metadata=bearing, timeout=120)
        assert allowed.model_id == "inside"
        listed = models.ListModels(model_pb2.ListModelsRequest(), metadata=bearing, timeout=120)
        assert [model.id for model in listed.models] == ["inside"]
        code, _ = failure(lambda: models.GetModel(model_pb2.GetModelRequest(id="hidden"), metadata=bearing, timeout=120))
        assert code == grpc.StatusCode.NOT_FOUND
        hidden_reference = pb.ModelReference(path="hidden")
        code, _ = failure(lambda: stub.Transform(request(model=hidden_reference), metadata=bearing, timeout=120))
        assert code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)
        for reference in (pb.ModelReference(path="nothing"), pb.ModelReference()):
            answer = revealed(lambda: stub.Transform(request(model=reference), metadata=bearing, timeout=120))  # noqa: B023
            assert "hidden" not in answer


@pytest.mark.parametrize(("hard", "connections"), [(8192, 4096), (1024, 768), (100, 50)])
def test_the_limit_of_open_files_is_raised_and_connections_stay_below_it(hard: int, connections: int) -> None:
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (80, {hard}))\n"
        "from img2img_server.api import transport; transport.raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], transport.max_connections())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(hard), str(connections)]
    assert ("connections" in done.stderr) == (connections < transport.MAX_CONNECTIONS)
