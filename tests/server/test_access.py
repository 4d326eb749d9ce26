"""Tokens: authentication, rate and concurrency limits, and reloading of the file."""

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fakes import Clock
from granting import bearing, grant, rest
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.access.access import Access
from img2img_server.access.tokens import Token, editing
from img2img_server.errors import ClientBusy, RateLimited, ServerError, Unauthenticated
from img2img_server.support.call import Call

TRANSFORM = "/img2img.v1.ImageToImageService/Transform"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@dataclass(slots=True)
class Gate:
    """An Access with manual clocks."""

    path: Path
    clock: Clock
    access: Access

    def call(self, secret: str | None, method: str = TRANSFORM) -> contextlib.AbstractContextManager[Call]:
        metadata = () if secret is None else bearing(secret)
        return self.access.admitted(Call(method, "id", client="ipv4:10.0.0.7"), metadata)

    def admit(self, secret: str | None, method: str = TRANSFORM) -> Call:
        with self.call(secret, method) as call:
            return call

    def refused(self, secret: str | None, method: str = TRANSFORM) -> ServerError:
        """The error of a call."""
        with pytest.raises(ServerError) as caught:
            self.admit(secret, method)
        return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def open_gate(path: Path) -> Gate:
    clock = Clock()
    return Gate(path, clock, Access(path, clock, lambda: NOON + timedelta(seconds=clock.now)))


def test_without_a_token_file_every_client_is_allowed_and_named_by_address() -> None:
    access = Access()
    call = Call(TRANSFORM, "id", client="ipv4:10.0.0.7")
    with access.admitted(call, ()) as admitted:
        assert admitted == call
    assert (admitted.admin, admitted.authenticated) == (True, False)


def test_token_grants_its_name_models_and_admin_right(path: Path) -> None:
    alice = grant(path, "alice", models=("sd*", "demo"))
    root = grant(path, "root", admin=True)
    gate = open_gate(path)
    call = gate.admit(alice)
    assert (call.client, call.models, call.admin, call.authenticated) == ("alice", ("sd*", "demo"), False, True)
    assert [call.may_use(name) for name in ("sd15", "demo", "sdxl", "flux", "DEMO")] == [True, True, True, False, False]
    call = gate.admit(root)
    assert (call.client, call.models, call.admin) == ("root", None, True)


def test_every_call_without_a_good_token_gets_the_same_answer(path: Path) -> None:
    good = grant(path, "alice")
    expired = grant(path, "old", expires=NOON)
    gate = open_gate(path)
    gate.admit(good)
    bad: list[tuple[tuple[str, str | bytes], ...]] = [
        (),
        (("authorization", ""),),
        (("authorization", good),),
        (("authorization", f"Basic {good}"),),
        (("authorization", f"Bearer  {good}"),),
        (("authorization", f"Bearer {good[:-1]}"),),
        (("authorization", f"Bearer {good}x"),),
        (("authorization", f"Bearer {good.upper()}"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer " + "x" * 10_000),),
        (("authorization", "Bearer é"),),
        (("authorization-bin", f"Bearer {good}".encode()),),
        (*bearing(good), *bearing(expired)),
        bearing(expired),
        bearing(hashlib.sha256(good.encode()).hexdigest()),
    ]
    texts = set()
    for metadata in bad:
        with (
            pytest.raises(Unauthenticated) as caught,
            gate.access.admitted(Call(TRANSFORM, "id"), metadata),
        ):
            raise AssertionError(metadata)
        texts.add(str(caught.value))
    assert len(texts) == 1
    with gate.access.admitted(Call(TRANSFORM, "id"), (("authorization", f"bearer {good}"), ("x-other", "y"))) as call:
        assert call.client == "alice"


def test_expired_token_is_refused(path: Path) -> None:
    secret = grant(path, "alice", expires=NOON + timedelta(seconds=10))
    gate = open_gate(path)
    gate.clock.now = 9.9
    gate.admit(secret)
    gate.clock.now = 10
    assert isinstance(gate.refused(secret), Unauthenticated)


def test_only_health_needs_no_token(path: Path) -> None:
    grant(path, "alice")
    gate = open_gate(path)
    for method in ("Check", "Watch", "List"):
        assert gate.admit(None, f"/grpc.health.v1.Health/{method}").client == "ipv4:10.0.0.7"
    for method in (TRANSFORM, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.HealthX/Check"):
        assert isinstance(gate.refused(None, method), Unauthenticated)


def test_rate_limit_returns_the_exact_retry_delay(path: Path) -> None:
    secret, other = grant(path, "alice", requests_per_minute=30), grant(path, "bob", requests_per_minute=30)
    gate = open_gate(path)
    for _ in range(5):  # ten seconds' worth may come at once
        gate.admit(secret)
    error = gate.refused(secret)
    assert isinstance(error, RateLimited)
    assert error.retry_after == pytest.approx(2.0)
    gate.admit(other)
    gate.clock.now = 1.5
    error = gate.refused(secret)
    assert isinstance(error, RateLimited)
    assert error.retry_after == pytest.approx(0.5)
    gate.clock.now = 2.0
    gate.admit(secret)
    assert isinstance(gate.refused(secret), RateLimited)
    gate.clock.now = 10_000.0
    for _ in range(5):
        gate.admit(secret)
    assert isinstance(gate.refused(secret), RateLimited)


@given(st.integers(1, 120), st.lists(st.just(0.0) | st.floats(0, 3), min_size=1, max_size=100))
@settings(deadline=None, max_examples=60)
def test_no_call_pattern_exceeds_the_rate_and_the_retry_delay_is_long_enough(per_minute: int, pauses: list[float]) -> None:
    from img2img_server.access.access import Usage

    token, usage, now, taken = Token("t", "", requests_per_minute=per_minute), Usage(), 0.0, 0
    for pause in pauses:
        now += pause
        if refused := usage.refusal(token, now):
            assert refused.retry_after is not None
            assert refused.retry_after > 0
            later = now + refused.retry_after + 1e-6
            assert usage.refusal(token, later) is None
            continue
        usage.begin(token, now)
        taken += 1
    assert taken <= max(1, per_minute / 6) + now * per_minute / 60 + 1e-6


def test_concurrency_limit_is_per_token(path: Path) -> None:
    secret, other = grant(path, "alice", concurrency=2), grant(path, "bob", concurrency=1)
    gate = open_gate(path)
    with gate.call(secret):
        with gate.call(secret), gate.call(other):
            error = gate.refused(secret)
            assert isinstance(error, ClientBusy)
            assert error.retry_after is not None
            gate.admit(None, "/grpc.health.v1.Health/Check")
        gate.admit(secret)
        with contextlib.suppress(RuntimeError), gate.call(secret):
            raise RuntimeError("a call may end in any way")
        gate.admit(secret)


def test_calls_refused_for_concurrency_do_not_count_towards_the_rate(path: Path) -> None:
    secret = grant(path, "alice", concurrency=1, requests_per_minute=12)
    gate = open_gate(path)
    with gate.call(secret):
        for _ in range(5):
            assert isinstance(gate.refused(secret), ClientBusy)
    gate.admit(secret)
    assert isinstance(gate.refused(secret), RateLimited)


def test_reflection_is_not_counted(path: Path) -> None:
    secret = grant(path, "alice", requests_per_minute=1, concurrency=1)
    gate = open_gate(path)
    for _ in range(3):
        gate.admit(secret, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    gate.admit(secret)
    assert isinstance(gate.refused(secret), RateLimited)


def test_token_file_is_reloaded_and_running_calls_still_count(path: Path) -> None:
    alice = grant(path, "alice", concurrency=1)
    gate = open_gate(path)
    with gate.call(alice):
        bob = grant(path, "bob")
        assert isinstance(gate.refused(bob), Unauthenticated)  # looked at once a second
        gate.clock.now = 1.0
        assert gate.admit(bob).client == "bob"
        assert isinstance(gate.refused(alice), ClientBusy)
        with editing(path) as known:
            del known["alice"], known["bob"]
        rest(path)
        gate.clock.now = 2.0
        assert isinstance(gate.refused(bob), Unauthenticated)
        assert isinstance(gate.refused(alice), Unauthenticated)
        grant(path, "alice", alice, concurrency=1)
        gate.clock.now = 3.0
        assert isinstance(gate.refused(alice), ClientBusy)
    gate.admit(alice)


def test_partially_written_token_file_is_not_loaded(path: Path) -> None:
    """Cut off in the middle it may be good TOML that lacks a token's limits."""
    alice = grant(path, "alice", models=("demo",))
    gate = open_gate(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"models")])
    gate.clock.now = 5.0
    assert gate.admit(alice).models == ("demo",)
    path.write_bytes(whole)
    rest(path)
    gate.clock.now = 10.0
    assert gate.admit(alice).models == ("demo",)


@pytest.mark.parametrize("bad", [b"[tokens.alice", b"\xff", b"[tokens.bob]\nsha256='x'\n", None])
def test_invalid_token_file_keeps_the_old_tokens_and_is_logged_once(
    bad: bytes | None, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alice = grant(path, "alice")
    gate = open_gate(path)
    path.unlink()
    if bad is not None:
        path.write_bytes(bad)
        rest(path)
    for second in range(1, 6):
        gate.clock.now = second
        assert gate.admit(alice).client == "alice"
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "keeping the previous version" in line.getMessage()
    bob = grant(path, "bob") if bad is None else None
    gate.clock.now = 10.0
    if bob:
        assert gate.admit(bob).client == "bob"


def test_logging_of_unknown_tokens_is_rate_limited_and_redacted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grant(path, "alice")
    gone = grant(path, "gone", expires=NOON - timedelta(days=1))
    gate = open_gate(path)
    for index in range(1000):
        gate.clock.now = index / 50
        gate.refused(f"img2img_guess{index}")
    lines = [record.getMessage() for record in caplog.records if "without a valid token" in record.getMessage()]
    assert 2 <= len(lines) <= 3
    assert "refused 1 calls" in lines[0]
    assert "ipv4:10.0.0.7" in lines[0]
    assert "refused 500 calls" in lines[1]
    gate.clock.now = 1000.0
    gate.refused(gone)
    assert "token 'gone', which has expired" in caplog.messages[-1]
    assert "guess" not in caplog.text
    assert gone not in caplog.text
