"""Authentication by bearer token, with limits per token: calls per minute, calls in progress, and models."""

import hmac
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from img2img_server.access import tokens
from img2img_server.access.tokens import Token
from img2img_server.errors import ClientBusy, Exhausted, RateLimited, Unauthenticated
from img2img_server.support.call import Call
from img2img_server.support.file_reloader import Contents, FileReloader

_BURST_SECONDS = 10.0
"""Size of a burst after a pause, in seconds of the token's rate."""
_BUSY_SECONDS = 1.0
"""Retry delay for a client at its concurrency limit: a guess, since the end of its running calls is unknown."""


@dataclass(slots=True)
class Usage:
    """A client's `running` calls and its token bucket.

    `level` is the bucket's content in calls at the time `at` in seconds; None before the first call, when it is full.
    """

    running: int = 0
    level: float | None = None
    at: float = 0.0

    def refusal(self, token: Token, now: float) -> Exhausted | None:
        """The error that refuses a call of `token` at time `now` in seconds; None if the call is allowed."""
        if token.concurrency is not None and self.running >= token.concurrency:
            calls = "1 call" if token.concurrency == 1 else f"{token.concurrency} calls"
            return ClientBusy(f"'{token.name}' already has {calls} in progress, its maximum", _BUSY_SECONDS)
        if token.requests_per_minute is not None and (level := self._level(token.requests_per_minute, now)) < 1:
            wait = (1 - level) * 60 / token.requests_per_minute
            return RateLimited(f"'{token.name}' exceeded its limit of {token.requests_per_minute} calls per minute", wait)
        return None

    def begin(self, token: Token, now: float) -> None:
        """Counts a call that was admitted at time `now` in seconds."""
        if token.requests_per_minute is not None:
            self.level = self._level(token.requests_per_minute, now) - 1
            self.at = now
        self.running += 1

    def end(self) -> None:
        """Counts the end of a call, successful or not."""
        self.running -= 1

    def _level(self, per_minute: int, now: float) -> float:
        burst = max(1.0, per_minute * _BURST_SECONDS / 60)
        return burst if self.level is None else min(burst, self.level + (now - self.at) * per_minute / 60)


_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]

_OPEN = "/grpc.health.v1.Health/"
_UNCOUNTED = (
    "/grpc.reflection.",
    "/img2img.v1.ImageToImageService/TransformBatch",
    "/inference.GRPCInferenceService/ModelStreamInfer",
)
"""Methods that do not count towards limits. Of the last two, each request counts instead (api/request_stream.py)."""
_LOOK_SECONDS = 1.0
"""Minimum interval between checks of the file, and its minimum age: a file that is still being written may lack a token's
limits."""
_LOG_SECONDS = 10.0
"""Minimum interval between two log lines about calls without a valid token."""
_MAX_SECRET = 512
_WRITABLE_BY_OTHERS = 0o002


class Access:
    """Admits calls. Without a token file every caller is admitted and identified by its address.

    With a token file, every call except health checks must carry one of its tokens and is bound by that token's limits. The file
    is reloaded when it changes. Raises ValueError if the file cannot be read. `clock` is a monotonic clock in seconds, `now`
    returns the current time with its zone, `wall` the time in seconds that file timestamps use. Used on the event loop only.
    """

    def __init__(
        self,
        tokens: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._now, self._wall = clock, now, wall
        self._path = tokens
        self._watched = None if tokens is None else _watch(tokens)
        self._looked = clock()
        self._usages: dict[str, Usage] = {}
        self._strangers = _Strangers(clock)

    @contextmanager
    def admitted(self, call: Call, metadata: Metadata) -> Iterator[Call]:
        """Counts the call for its client within the block. Yields the call with its token's permissions.

        Raises Unauthenticated, RateLimited or ClientBusy.
        """
        try:
            token = self._token(call.method, metadata)
        except Unauthenticated as error:
            self._strangers.note(call.client, str(error.__cause__))
            raise
        if token is None:
            yield call
            return
        usage, now = self._usage(token, call.method), self._clock()
        if refused := usage.refusal(token, now):
            raise refused
        usage.begin(token, now)
        try:
            yield replace(call, client=token.name, authenticated=True, models=token.models, admin=token.admin)
        finally:
            usage.end()

    def _token(self, method: str, metadata: Metadata) -> Token | None:
        """The token of a call, None if none is required. Raises Unauthenticated, whose cause is for the log only."""
        if self._watched is None or method.startswith(_OPEN):
            return None
        try:
            return self._find(_bearer(metadata))
        except _NoGood as error:
            # The same text for every cause: callers must not learn whether a token was once valid.
            raise Unauthenticated("missing or invalid bearer token: send metadata 'authorization: Bearer TOKEN'") from error

    def _find(self, secret: str) -> Token:
        self._look()
        assert self._watched is not None, "the token file is set"
        found = tokens.digest(secret)
        token = self._watched.value.get(found)
        if token is None or not hmac.compare_digest(token.sha256, found):
            raise _NoGood("an unknown token")
        if token.expires is not None and self._now() >= token.expires:
            raise _NoGood(f"token '{token.name}', which has expired")
        return token

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS or self._path is None or self._watched is None:
            return
        self._looked = now
        if _age(self._path, self._wall()) >= _LOOK_SECONDS and self._watched.look() is not None:
            known = {token.name for token in self._watched.value.values()}
            self._usages = {name: usage for name, usage in self._usages.items() if name in known or usage.running}

    def _usage(self, token: Token, method: str) -> Usage:
        if method.startswith(_UNCOUNTED):
            return Usage()
        return self._usages.setdefault(token.name, Usage())


class _NoGood(Exception):
    """Why a call has no valid token, for the log."""


class _Strangers:
    """Logs calls without a valid token: the first at once, then at most one line every `_LOG_SECONDS`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._logged: float | None = None
        self._count = 0

    def note(self, client: str, sent: str) -> None:
        self._count += 1
        now = self._clock()
        if self._logged is not None and now - self._logged < _LOG_SECONDS:
            return
        _log.warning("refused %d calls without a valid token; the last, from %s, sent %s", self._count, client, sent)
        self._logged, self._count = now, 0


def _watch(path: Path) -> FileReloader[dict[str, Token]]:
    """A reloader of a file's tokens, by their SHA-256."""

    def make(contents: Contents) -> dict[str, Token]:
        found = {token.sha256: token for token in tokens.parse(contents[0], path).values()}
        if path.stat().st_mode & _WRITABLE_BY_OTHERS:
            _log.warning("%s is writable by every user of this machine, who could add tokens: run chmod 600 on it", path)
        if not found:
            _log.warning(
                "%s has no tokens, so every call is refused: create one with `img2img token add NAME --tokens %s`", path, path
            )
        return found

    try:
        return FileReloader("tokens", lambda: (path.read_bytes(),), make)
    except OSError as error:
        raise ValueError(f"tokens: {path} cannot be read: {error.strerror}") from None


def _bearer(metadata: Metadata) -> str:
    """The token in a call's only `authorization` metadata. Raises _NoGood."""
    found = [value for key, value in metadata if key == "authorization"]
    if not found:
        raise _NoGood("none")
    (value, *more) = found
    scheme, _, secret = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if more or scheme.lower() != "bearer" or not 0 < len(secret) <= _MAX_SECRET:
        raise _NoGood("not exactly one 'Bearer TOKEN'")
    return secret


def _age(path: Path, now: float) -> float:
    """Seconds since a file was changed; infinite if it does not exist or its time is in the future."""
    try:
        age = now - path.stat().st_mtime
    except OSError:
        return float("inf")
    return age if age >= 0 else float("inf")
