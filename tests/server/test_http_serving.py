"""The HTTP front apart from its requests: tokens, TLS, start and drain, disconnected callers, metrics and the log."""

import contextlib
import logging
import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme
from collecting import collecting
from fakes import FakePipeline
from granting import grant
from http_calls import EDITS, answer_of, ask, client_of, connection, form, get, head_of, port_of, rest_of, serving
from img2img_server.backends.local import LocalBackend
from img2img_server.config import ServerConfig, TelemetrySettings, TlsSettings
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.telemetry.logs import ACCESS
from kserve_calls import Gate, ending
from messages import png
from running import RunningServer, starting, store
from scraping import fetch, settled, value
from server_process import FAULTY, Process

EDIT = ("prompt", "a lake"), ("model", "m")
STEPS = 20


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@contextlib.contextmanager
def in_background(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs `call` on a thread, and waits for it at the end. Gives a list that its result is put into."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    try:
        yield results
    finally:
        thread.join(60)
        assert not thread.is_alive()


def test_tokens_apply_to_http_as_to_grpc(tmp_path: Path, pipeline: FakePipeline) -> None:
    tokens = tmp_path / "tokens.toml"
    alice = grant(tokens, "alice", models=("m",), requests_per_minute=6)
    bob = grant(tokens, "bob")
    pipelines = {"m": pipeline, "second": FakePipeline()}
    with serving(pipelines=pipelines, tokens=tokens) as server:
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert get(server, path).status == 200
        for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": f"Basic {alice}"}):
            answer = get(server, "/v1/models", headers)
            assert (answer.status, answer.error["code"], answer.error["type"]) == (
                401, "UNAUTHENTICATED", "authentication_error"
            )  # fmt: skip
            assert answer.headers["www-authenticate"] == "Bearer"
        with client_of(server, api_key=bob) as client:
            assert [one.id for one in client.models.list()] == ["m", "second"]
            client.images.edit(image=png(), prompt="a lake", model="second")
        with client_of(server, api_key=alice) as client:
            assert [one.id for one in client.models.list()] == ["m"]
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.edit(image=png(), prompt="a lake", model="m")
            assert (caught.value.code, caught.value.type) == ("RATE_LIMITED", "rate_limit_error")
            told = caught.value.response.headers
            assert 0 < int(told["retry-after-ms"]) <= 10_000
            assert int(told["retry-after"]) >= 1
            assert told["x-should-retry"] == "true"
    assert not pipeline.prepared


def test_a_token_without_the_model_does_not_see_it(tmp_path: Path, pipeline: FakePipeline) -> None:
    tokens = tmp_path / "tokens.toml"
    alice = grant(tokens, "alice", models=("other",))
    with serving(pipelines={"m": pipeline}, tokens=tokens) as server:
        answer = ask(server, EDITS, *EDIT, headers={"Authorization": f"Bearer {alice}"})
    assert (answer.status, answer.error["code"]) in ((403, "PERMISSION_DENIED"), (404, "MODEL_NOT_FOUND"))
    assert not pipeline.prepared


def issued(folder: Path, authority: trustme.CA, certificate: trustme.LeafCert) -> TlsSettings:
    folder.mkdir(exist_ok=True)
    chain, key, ca = folder / "server.pem", folder / "server.key", folder / "ca.pem"
    key.touch(0o600)
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    ca.write_bytes(authority.cert_pem.bytes())
    return TlsSettings(chain, key, ca)


def shown(server: RunningServer, context: ssl.SSLContext) -> bytes | None:
    with (
        socket.create_connection(("localhost", port_of(server)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        # With TLS 1.3, a refusal comes with the first read.
        assert secure.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
        return secure.getpeercert(binary_form=True)


def test_tls_with_client_certificates_is_renewed_without_a_restart(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    old, new = first.issue_cert("localhost"), first.issue_cert("localhost")
    tls = issued(tmp_path / "tls", first, old)

    def context_of(client: trustme.LeafCert | None) -> ssl.SSLContext:
        made = ssl.create_default_context()
        first.configure_trust(made)
        if client is not None:
            client.configure_cert(made)
        return made

    one, other = first.issue_cert("one@example.org"), second.issue_cert("other@example.org")
    with serving(pipelines={"m": FakePipeline()}, tls=tls) as server:
        before = shown(server, context_of(one))
        for unknown in (None, other):
            with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
                shown(server, context_of(unknown))
        issued(tmp_path / "tls", second, new)  # the server's new certificate, and another authority for clients
        after = shown(server, context_of(other))
        assert after != before
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            shown(server, context_of(one))
        (tmp_path / "tls" / "server.key").write_bytes(b"half a k")
        assert shown(server, context_of(other)) == after, "what is not usable leaves the previous one"


def test_the_port_answers_before_the_models_are_loaded() -> None:
    go = threading.Event()

    def load() -> Any:
        assert go.wait(60)
        return store(m=FakePipeline())

    def made(config: ServerConfig) -> LocalBackend:
        return LocalBackend(config, load_models=load)

    with starting(made, http_port=0) as (server, started):
        while not server.server.http_port:
            assert not started.done(), started.exception()
        assert get(server, "/health").status == 200
        assert (get(server, "/ready").status, get(server, "/ready").json) == (503, {"status": "not ready"})
        answer = get(server, "/v1/models")
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "SERVER_STARTING", "1")
        assert answer.headers["x-should-retry"] == "true"
        assert ask(server, EDITS, *EDIT).error["code"] == "SERVER_STARTING"
        go.set()
        started.result(60)
        assert (get(server, "/ready").status, ask(server, EDITS, *EDIT).status) == (200, 200)


def test_drain_finishes_running_requests_and_refuses_new_ones(pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    with serving(pipelines={"m": pipeline}) as server, connection(server) as idle, connection(server) as slow:
        body = form(*EDIT)
        slow.sendall(head_of(body) + body[:100])
        with in_background(lambda: ask(server, EDITS, *EDIT)) as results:
            gate.wait_for_call()
            stopping = server.stop()
            while get(server, "/ready").status != 503:
                assert not stopping.done()
            answer = ask(server, EDITS, *EDIT)
            assert (answer.status, answer.error["code"]) == (503, "SHUTTING_DOWN")
            gate.open()
        assert results[0].status == 200
        stopping.result(30)
        assert rest_of(idle) == b""
        assert rest_of(slow) == b"", "its body never came"
        with pytest.raises(ConnectionError):
            get(server, "/health")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_disconnect_frees_the_device_at_the_next_step(pipeline: FakePipeline, stream: str) -> None:
    gate = Gate(pipeline)
    with serving(pipelines={"m": pipeline}) as server, ending() as calls:
        with connection(server) as made:
            body = form(*EDIT, ("stream", stream))
            made.sendall(head_of(body) + body)
            gate.wait_for_call()
        assert calls.wait("edits") == "CANCELLED"
        gate.open()
        assert ask(server, EDITS, *EDIT).status == 200
        assert len(pipeline.released) == 2
        assert len(pipeline.batches) == STEPS + 1, "one step of the first"


def test_deadline_ends_a_running_request(pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    with serving(pipelines={"m": pipeline}) as server:
        answer = ask(server, EDITS, *EDIT, headers={"x-request-timeout": "0.5"})
        gate.open()
        assert (answer.status, answer.error["code"]) == (504, "DEADLINE_EXPIRED")
        assert ask(server, EDITS, *EDIT).status == 200
        assert len(pipeline.batches) == STEPS + 1


def test_a_full_queue_refuses_a_request_before_its_body_is_sent(pipeline: FakePipeline) -> None:
    gate = Gate(pipeline)
    limits = QueueLimits(max_active=1, max_waiting=1)
    with serving(pipelines={"m": pipeline}, limits=limits) as server:
        with ExitStack() as background:
            background.enter_context(in_background(lambda: ask(server, EDITS, *EDIT)))
            gate.wait_for_call()  # from here on it runs
            background.enter_context(in_background(lambda: ask(server, EDITS, *EDIT)))
            while True:
                with connection(server) as made:
                    made.sendall(head_of(b"x" * 10_000_000, "x-request-timeout: 0.2"))  # and nothing more
                    made.settimeout(30)
                    answer = answer_of(made)
                if answer.status == 429:
                    break
            gate.open()
        assert answer.error["code"] in ("QUEUE_FULL", "CLIENT_QUEUE_FULL")
        assert "retry-after" in answer.headers


def test_metrics_and_log_cover_http_calls(tmp_path: Path, pipeline: FakePipeline, caplog: pytest.LogCaptureFixture) -> None:
    tokens = tmp_path / "tokens.toml"
    alice = {"Authorization": f"Bearer {grant(tokens, 'alice')}"}
    telemetry = TelemetrySettings(metrics_port=0)
    with (
        caplog.at_level(logging.INFO, ACCESS),
        serving(pipelines={"m": pipeline}, tokens=tokens, telemetry=telemetry) as server,
    ):
        assert server.server.metrics_port is not None
        assert ask(server, EDITS, *EDIT, headers={**alice, "x-request-id": "one"}).status == 200
        ask(server, EDITS, *EDIT, ("n", "0"), headers=alice)
        ask(server, EDITS, *EDIT)
        for path in ("/health", "/v1/nope/" + "x" * 100):
            get(server, path)
        samples = settled(server.server.metrics_port)
        text = fetch(server.server.metrics_port)
    counted = {
        ("OK", "", "alice"): 1, ("INVALID_ARGUMENT", "INVALID_FIELD", "alice"): 1, ("UNAUTHENTICATED", "UNAUTHENTICATED", ""): 1
    }  # fmt: skip
    for (status, reason, client), count in counted.items():
        labels = {"method": f"POST {EDITS}", "status": status, "reason": reason, "client": client}
        assert value(samples, "img2img_requests_total", **labels) == count
    assert value(samples, "img2img_pictures_total", model="m") == 1
    assert "nope" not in text
    lines = [record.getMessage() for record in caplog.records if record.name == ACCESS]
    assert len(lines) == 3, "health and unknown paths have none"
    assert re.fullmatch(rf"POST {EDITS} OK in \d+\.\d{{3}} s for alice", lines[0])
    assert vars(caplog.records[0])["request_id"] == "one"


def test_trace_continues_the_callers_trace(pipeline: FakePipeline) -> None:
    trace, parent = "1" * 32, "2" * 16
    with collecting() as collector:
        telemetry = TelemetrySettings(otlp_endpoint=collector.endpoint)
        with serving(pipelines={"m": pipeline}, telemetry=telemetry) as server:
            assert ask(server, EDITS, *EDIT, headers={"traceparent": f"00-{trace}-{parent}-01"}).status == 200
            get(server, "/health")
        (span,) = [span for span in collector.spans if span.parent == parent]
        assert (span.name, span.trace) == (f"POST {EDITS}", trace)
        assert (span.attributes["http.request.method"], span.attributes["http.route"]) == ("POST", EDITS)
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert [below.name for below in collector.children(span)] == ["parse", "queue", "encode", "denoise", "decode", "respond"]
        assert not [span for span in collector.spans if "health" in span.name]


def test_stalled_http_clients_do_not_delay_shutdown(start: Callable[..., Process], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(*FAULTY, "none", "--models", "m", "--grace", "1", "--http-port", str(port))
    with process.channel():
        body = form(("prompt", "a lake"), ("stream", "true"), image=png((512, 512)))
        with ExitStack() as connected:
            for data in (b"", b"GET /hea", head_of(body), head_of(body) + body[:50], (head_of(body) + body)):
                made = connected.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                made.sendall(data)
            process.popen.send_signal(signal.SIGTERM)
            assert process.popen.wait(60) == 0, process.log
    assert "Traceback" not in process.log


def test_missing_http_extra_is_reported_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("img2img_server.api.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn.config", None)
    with pytest.raises(ValueError, match=r"http_port needs 'uvicorn.config': pip install 'img2img-server\[http\]'"), serving():
        pass


def test_address_that_cannot_be_bound_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"http_port: 127\.0\.0\.1:{port} is in use"), serving(http_port=port):
            pass
    with pytest.raises(ValueError, match="http_port needs an address"), serving(host=f"unix:{tmp_path / 'socket'}"):
        pass
    with pytest.raises(ValueError, match="http_port"):
        ServerConfig(Path(), http_port=65536)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_every_address_of_a_host_is_listened_on(host: str) -> None:
    with serving(pipelines={"m": FakePipeline()}, host=host) as server:
        address = "127.0.0.1" if host == "127.0.0.1" else host.strip("[]")
        with socket.create_connection((address, port_of(server)), timeout=30) as made:
            made.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert rest_of(made).startswith(b"HTTP/1.1 200 OK")


def test_http_is_off_by_default() -> None:
    with serving(pipelines={"m": FakePipeline()}, http_port=None) as server:
        assert server.server.http_port is None
