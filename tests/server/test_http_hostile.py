"""Hostile HTTP clients are refused early, within limits of memory and time."""

import asyncio
import contextlib
import io
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes import FakePipeline
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_calls import (
    BOUNDARY,
    EDITS,
    answer_of,
    ask,
    connection,
    form,
    get,
    head,
    head_of,
    port_of,
    rest_of,
    send,
    serving,
    typed,
)
from img2img_server.access.access import Access
from img2img_server.api import transport
from img2img_server.api.health import HealthServicer
from img2img_server.api.http.connection import MAX_CHUNKS, MAX_HEADERS, Limits
from img2img_server.api.http.exchange import ClientLeft
from img2img_server.api.http.forms import MAX_PARTS, BodyLimits, read_form
from img2img_server.api.http.front import HttpFront
from img2img_server.api.transport import MAX_METADATA_BYTES, Readers
from img2img_server.codecs.pool import ImageMemory
from img2img_server.config import ServerConfig, TelemetrySettings
from img2img_server.errors import DeadlineExpired, ImageMemoryFull, MalformedMessage
from img2img_server.images import ImageLimits
from img2img_server.support.call import Call
from img2img_server.telemetry.telemetry import Telemetry
from kserve_calls import ending
from PIL import Image
from running import RunningServer

MOST = 100_000
"""Bytes of an image, for the servers here; a body may have 2 * MOST + 1 MiB."""
PROMPT = ("prompt", "a lake")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(pipelines={"m": FakePipeline()}, image_limits=ImageLimits(max_bytes=MOST)) as made:
        yield made


def part(name: str, value: bytes = b"x", *headers: bytes) -> bytes:
    lines = [b"--" + BOUNDARY.encode(), b'Content-Disposition: form-data; name="%s"' % name.encode(), *headers, b"", value, b""]
    return b"\r\n".join(lines)


END = b"--" + BOUNDARY.encode() + b"--\r\n"
BODIES = {
    "empty": b"",
    "no boundary in it": b"x" * 1000,
    "only the end": END,
    "no end": part("prompt"),
    "cut in a header": form(PROMPT)[:100],
    "too many parts": part("prompt") * (MAX_PARTS + 1) + END,
    "many nameless parts": (b"--" + BOUNDARY.encode() + b"\r\n\r\nx\r\n") * 100 + END,
    "no name": b"--" + BOUNDARY.encode() + b"\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
    "large part header": part("prompt", b"x", b"X-A: " + b"a" * 5000) + END,
    "endless part header": b"--" + BOUNDARY.encode() + b"\r\nX-A: " + b"a" * 50_000,
    "many part headers": part("prompt", b"x", *[b"X-A: a"] * 20) + END,
    "header name without end": b"--" + BOUNDARY.encode() + b"\r\n" + b"a" * 50_000,
    "boundary, then garbage": b"--" + BOUNDARY.encode() + b"garbage",
    "large field": part("prompt", b"x" * 70_000) + END,
    "large unknown field": part("x" * 1000, b"x" * 70_000) + END,
    "field of a control character": part("\x00\x1b", b"x") + END,
    "null bytes": bytes(5000),
    "line ends": b"\r\n" * 5000,
    "hyphens": b"\r\n--" * 5000,
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_malformed_body_is_refused(server: RunningServer, name: str, chunked: bool) -> None:
    body = BODIES[name]
    with connection(server) as made:
        if chunked:
            lines = (f"Content-Type: multipart/form-data; boundary={BOUNDARY}", "Transfer-Encoding: chunked")
            pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
            made.sendall(head(*lines) + chunks + b"0\r\n\r\n")
        else:
            made.sendall(head_of(body) + body)
        answer = answer_of(made)
    assert (answer.status, answer.error["code"]) in ((400, "MALFORMED_MESSAGE"), (400, "INVALID_FIELD"))
    assert len(answer.body) < 3000
    assert get(server, "/health").status == 200


CONTENT_TYPES = [
    "multipart/form-data",
    "multipart/form-data; boundary=",
    f"multipart/form-data; boundary={'b' * 300}",
    "multipart/mixed; boundary=x",
    "application/x-www-form-urlencoded",
    "application/json",
    ";" * 5000,
    'multipart/form-data; boundary="' + '\\"' * 3000,
    "",
]


@pytest.mark.parametrize("content_type", CONTENT_TYPES, ids=lambda text: text[:40])
def test_another_content_type_is_refused(server: RunningServer, content_type: str) -> None:
    answer = send(server, "POST", EDITS, form(PROMPT), {"Content-Type": content_type})
    assert (answer.status, answer.error["code"]) == (400, "MALFORMED_MESSAGE")


def test_compressed_bodies_are_refused(server: RunningServer) -> None:
    answer = ask(server, EDITS, PROMPT, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.error["code"]) == (400, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("size", ["10000000", "9" * 19])
def test_body_declared_too_large_is_refused_before_it_is_sent(server: RunningServer, size: str) -> None:
    with connection(server) as made:
        made.sendall(head(f"Content-Type: multipart/form-data; boundary={BOUNDARY}", f"Content-Length: {size}"))
        answer = answer_of(made)
    assert (answer.status, answer.error["code"]) == (413, "MESSAGE_TOO_LARGE")


def test_client_with_expect_continue_does_not_send_a_refused_body(server: RunningServer) -> None:
    with connection(server) as made:
        made.sendall(head_of(b"x" * 10_000_000, "Expect: 100-continue"))
        assert answer_of(made).status == 413
    body = form(PROMPT)
    with connection(server) as made:
        made.sendall(head_of(body, "Expect: 100-continue"))
        expected = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert made.recv(len(expected), socket.MSG_WAITALL) == expected
        made.sendall(body)
        assert answer_of(made).status == 200


def test_endless_body_is_refused_at_the_limit(server: RunningServer) -> None:
    with connection(server) as made:
        made.sendall(head(f"Content-Type: multipart/form-data; boundary={BOUNDARY}", "Transfer-Encoding: chunked"))
        made.sendall(b"%x\r\n" % (2**40) + part("image")[:-3])
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                made.sendall(bytes(65536))
        assert b"HTTP/1.1 413 " in rest_of(made)


def test_connection_stays_usable_after_a_refused_body(server: RunningServer) -> None:
    body = form(PROMPT, ("nonsense", "1"), image=bytes(MOST * 5))
    with connection(server) as made:
        for _ in range(3):
            made.sendall(head_of(body, "X-Request-Timeout: nonsense") + body)
            assert answer_of(made).error["param"] == "x-request-timeout"
        made.sendall(head_of(form(PROMPT)) + form(PROMPT))
        assert answer_of(made).status == 200


HEADS = {
    "garbage": (b"\x16\x03\x01\x00garbage\r\n\r\n", 400),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "no length": (head(f"Content-Type: multipart/form-data; boundary={BOUNDARY}"), 400),
    "two lengths": (head("Content-Length: 5", "Content-Length: 6"), 400),
    "length and chunked": (head("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    "length with a sign": (head("Content-Length: +5"), 400),
    "many headers": (head(*[f"X-{number}: a" for number in range(MAX_HEADERS + 1)]), 431),
    "large header": (head("X-A: " + "a" * MAX_METADATA_BYTES), 431),
    "large path": (head(path="/" + "a" * MAX_METADATA_BYTES, verb="GET"), 431),
    "header that never ends": (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 400_000, 431),
    "path that never ends": (b"GET /" + b"a" * 400_000, 431),
    "connect": (b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n", 400),
    "header with a null byte": (head("X-A: a\0b"), 400),
    "folded header": (b"GET / HTTP/1.1\r\nA: b\r\n c\r\nB\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_malformed_request_is_refused_in_openais_form(server: RunningServer, name: str) -> None:
    data, status = HEADS[name]
    with connection(server) as made:
        with contextlib.suppress(ConnectionError):  # it may be refused while it is being sent
            made.sendall(data)
            made.shutdown(socket.SHUT_WR) if name == "no length" else None
        try:
            answer = answer_of(made)
        except ConnectionError:
            return  # the refusal was lost, as the rest of the data met a closed connection
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"


def test_pipelined_requests_close_the_connection(server: RunningServer) -> None:
    """Of one request sent a thousand times in one packet only the first is parsed."""
    one = head(verb="GET", path="/v1/models")
    with connection(server) as made:
        made.sendall(one * 1000)
        assert rest_of(made).count(b"HTTP/1.1 200 OK") <= 1


def test_many_small_chunks_are_refused(server: RunningServer) -> None:
    with connection(server) as made:
        made.sendall(head(f"Content-Type: multipart/form-data; boundary={BOUNDARY}", "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(MAX_CHUNKS + 10):
                made.sendall(b"1\r\n-\r\n")
        rest_of(made)  # it ends
    assert get(server, "/health").status == 200


def test_upgrade_headers_are_ignored(server: RunningServer) -> None:
    lines = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with connection(server) as made:
        made.sendall(head(*lines, verb="GET", path="/health"))
        assert rest_of(made).startswith(b"HTTP/1.1 200 OK")
    with connection(server) as made:
        made.sendall(head("Connection: Upgrade", "Upgrade: websocket", verb="GET", path="/health"))
        assert rest_of(made).startswith(b"HTTP/1.1 200 OK")


def test_http_1_0_is_answered_and_closed(server: RunningServer) -> None:
    with connection(server) as made:
        made.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert rest_of(made).endswith(b'{"status":"ok"}')


def test_slow_clients_do_not_delay_grpc_or_other_http_clients(server: RunningServer) -> None:
    body = form(PROMPT)
    with ExitStack() as connected:
        for data in (b"", b"GET", head_of(body), head_of(body) + body[:-1]) * 20:
            connected.enter_context(connection(server)).sendall(data)
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            check: Any = health_pb2_grpc.HealthStub(channel)
            assert check.Check(health_pb2.HealthCheckRequest(), timeout=30).status == health_pb2.HealthCheckResponse.SERVING
        assert ask(server, EDITS, PROMPT).status == 200


def test_client_that_does_not_read_is_disconnected_and_its_model_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its response, three images of noise, is larger than the kernel's buffers."""
    monkeypatch.setattr(transport, "_BYTES_PER_SECOND", 10**9)
    pipeline = FakePipeline()
    pipeline.native_size = (1024, 1024)
    noise = Image.effect_noise((1024, 1024), 100).convert("RGB")
    big = _file(noise)
    fields = (PROMPT, ("n", "3"), ("size", "source"))
    with serving(pipelines={"m": pipeline}, reader_timeout=0.2) as server, ending() as calls:
        for stream in ("false", "true"):
            with socket.socket() as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                made.connect(("localhost", port_of(server)))
                body = form(*fields, ("stream", stream), image=big)
                made.sendall(head_of(body) + body)
                assert calls.wait("edits") == "DEADLINE_EXCEEDED"
                assert pipeline.released
        server.stop().result(30)


def _file(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


@asynccontextmanager
async def front(limits: Limits) -> AsyncIterator[HttpFront]:
    """The front alone, on this event loop, without a server behind it."""
    config = ServerConfig(Path(), http_port=0)
    made = HttpFront(config, Access(), Telemetry(TelemetrySettings()), Readers(0.0), HealthServicer(), limits)
    await made.open()
    try:
        yield made
    finally:
        await made.close(0.0)


PARTS = {
    "nothing": b"",
    "a line": b"GET /health HTTP/1.1\r\n",
    "line ends": b"\r\n",
    "a header": b"GET /health HTTP/1.1\r\nHost: x\r\nA",
}


@pytest.mark.parametrize("name", PARTS)
async def test_header_timeout_closes_the_connection(name: str) -> None:
    async with front(Limits(10, headers=0.05)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(PARTS[name])
        assert await reader.read() == b""
        writer.close()


async def test_idle_connections_and_unfinished_bodies_time_out() -> None:
    body = form(PROMPT)
    for limits, data in [
        (Limits(10, idle=0.05), head(verb="GET", path="/health")),
        (Limits(10, rest=0.05), head_of(body) + body[:50]),
    ]:
        async with front(limits) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            writer.write(data)
            assert (await reader.read()).startswith(b"HTTP/1.1 "), "answered, then closed"
            writer.close()


async def test_small_responses_do_not_wait_for_tcp_acknowledgements() -> None:
    async with front(Limits(10)) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
        writer.write(head(verb="GET", path="/health"))
        assert await reader.read(8) == b"HTTP/1.1"
        (one,) = made._state.connections
        assert one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()


async def test_connections_are_limited_and_closing_one_frees_a_slot() -> None:
    async with front(Limits(2)) as made:

        async def health() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", made.port)
            try:
                writer.write(head("Connection: close", verb="GET", path="/health"))
                return await reader.read()
            except ConnectionError:
                return b""
            finally:
                writer.close()

        held = [await asyncio.open_connection("127.0.0.1", made.port) for _ in range(2)]
        for _, writer in held:
            writer.write(b"G")
            await writer.drain()
        assert await health() == b""
        held[0][1].close()
        await held[0][1].wait_closed()
        assert [await health() for _ in range(50)][-1], "its end is noticed within a few turns of the loop"
        held[1][1].close()


def receiving(*messages: bytes, complete: bool = True, then: Callable[[], Any] | None = None) -> Any:
    """The `receive` of an ASGI application: these parts of a body, then the result of `then`, or no message."""
    left = list(messages)

    async def receive() -> Any:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not complete}
        if then is not None:
            return then()
        await asyncio.Event().wait()

    return receive


async def read(receive: Any, memory: ImageMemory, size: int = 10**7, seconds: float = 60.0) -> Any:
    with ExitStack() as held:
        limits = BodyLimits(size, seconds)
        return await read_form({k.lower(): v for k, v in typed().items()}, receive, Call("m", "r", "alice"), memory, held, limits)


async def test_body_timeout_raises_deadline_expired() -> None:
    with pytest.raises(DeadlineExpired, match="not received within"):
        await read(receiving(b"--", complete=False), ImageMemory(10**8), 1000, 0.05)


async def test_memory_of_a_body_is_counted_while_it_is_received() -> None:
    memory = ImageMemory(10 * 2**20)
    body = form(PROMPT, image=bytes(3 * 2**20))
    pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    seen: list[int] = []

    async def receive() -> Any:
        seen.append(memory.held)
        return {"type": "http.request", "body": pieces[len(seen) - 1], "more_body": len(seen) < len(pieces)}

    await read(receive, memory)
    assert max(seen) >= 3 * 2**20 - 65536
    assert memory.held == 0, "given back"
    other = Call("m", "other", "alice")
    with memory.hold(other, 4 * 2**20):
        seen.clear()
        with pytest.raises(ImageMemoryFull):
            await read(receive, memory)
    assert memory.held == 0


async def test_disconnect_during_the_body_raises_client_left() -> None:
    with pytest.raises(ClientLeft):
        await read(receiving(b"--", complete=False, then=lambda: {"type": "http.disconnect"}), ImageMemory(10**8))


@pytest.mark.parametrize("cut", [1, 7, 64, 1000])
async def test_form_parsing_does_not_depend_on_chunk_sizes(cut: int) -> None:
    image = bytes(range(256)) * 8 + b"\r\n--" + BOUNDARY.encode()[:-1] + b"\r\n"
    body = form(PROMPT, ("seed", "5"), image=image)
    parts = await read(receiving(*[body[start : start + cut] for start in range(0, len(body), cut)]), ImageMemory(10**8))
    assert [(one.name, bytes(one.data)) for one in parts] == [("image", image), ("prompt", b"a lake"), ("seed", b"5")]


FLOODS = {
    "zeros": bytes(10**6),
    "carriage returns": b"\r" * 10**6,
    "almost boundaries": b"\r\n--" * 250_000,
    "boundaries without parts": f"\r\n--{BOUNDARY}".encode() * 40_000,
    "almost ends": part("image")[:-3] + f"\r\n--{BOUNDARY}-".encode() * 40_000,
    "parts": part("prompt") * 10_000,
    "headers": b"--" + BOUNDARY.encode() + b"\r\n" + b"A: b\r\n" * 100_000,
}


@pytest.mark.parametrize("name", FLOODS)
async def test_parsing_hostile_bodies_takes_bounded_work(name: str) -> None:
    """A megabyte of any content is refused early or parsed as data, with a bounded number of Python calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    body = FLOODS[name]
    receive = receiving(*[body[start : start + 65536] for start in range(0, len(body), 65536)])
    sys.setprofile(count)
    try:
        with contextlib.suppress(MalformedMessage):
            await read(receive, ImageMemory(10**8))
    finally:
        sys.setprofile(None)
    assert calls < 20_000
