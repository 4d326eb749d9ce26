"""Retries: which failures, when, and for how long."""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from img2img_client.errors import Cancelled, Img2ImgError

OnRetry = Callable[[int, Img2ImgError, float], None]
"""Called before each wait with the number of attempts made, the last error, and the seconds until the next attempt."""

_MOST_DOUBLINGS = 1000
"""Maximum doublings of the back-off, so that a float does not overflow."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How transient failures of a call are retried within the call's timeout.

    `max_attempts` includes the first one. The wait after the n-th failure is random, from 0 to `first_backoff` * 2 ** (n - 1),
    at most `most_backoff` (seconds; jitter keeps clients that failed together from retrying together). If the server sends a
    retry delay, the random wait is added to it; if the delay is above `longest_wait`, the call fails. `on_retry` is called before
    each wait. With several servers, gRPC makes some of the attempts itself, immediately (`balancing.py`).
    """

    max_attempts: int = 5
    first_backoff: float = 0.2
    most_backoff: float = 10.0
    longest_wait: float = 60.0
    on_retry: OnRetry | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, not {self.max_attempts}")
        for name in ("first_backoff", "most_backoff", "longest_wait"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} must be 0 seconds or more, not {seconds}")

    def backoff(self, failures: int) -> float:
        """The maximum random wait in seconds after `failures` (1 or more) failures."""
        return float(min(self.most_backoff, self.first_backoff * 2.0 ** min(failures - 1, _MOST_DOUBLINGS)))


def is_transient(error: Img2ImgError) -> bool:
    """Whether the same call may succeed later: there was no response, or the response has a retry delay.

    Permanent failures (an invalid field, a failed model, too large a message, no memory) and the caller's own timeout are not
    transient.
    """
    return error.status == "UNAVAILABLE" or (error.status == "RESOURCE_EXHAUSTED" and error.retry_after is not None)


class Stop:
    """Ends the waits of a closed stream or client early."""

    def __init__(self, parent: "Stop | None" = None) -> None:
        self._parent = parent
        self._changed: threading.Condition = threading.Condition() if parent is None else parent._changed
        self._set = False

    @property
    def is_set(self) -> bool:
        """Whether the stream or client is closed."""
        return self._set or (self._parent is not None and self._parent.is_set)

    def set(self) -> None:
        """Ends all current and future waits."""
        with self._changed:
            self._set = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Waits `seconds`; returns True if the wait was ended early."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_set, seconds)


class Attempts:
    """The attempts of one call: the timeout of each, and the wait after a failure. Does not wait itself.

    `timeout` covers all attempts, from now. Without a `policy` there is one attempt. Each may count as `tries`, if gRPC retries
    too. With `several` servers, the first retry delay is ignored: another server may accept the call. `clock` returns seconds,
    and `uniform` a random number between two numbers.
    """

    def __init__(
        self,
        policy: RetryPolicy | None,
        timeout: float | None,
        *,
        tries: int = 1,
        several: bool = False,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._policy = policy
        self._tries = tries
        self._several = several
        self._clock = clock
        self._uniform = uniform
        self._deadline = None if timeout is None else clock() + timeout
        self._made = 0
        self._refused = False

    def seconds_left(self) -> float | None:
        """The timeout of an attempt that starts now; None for no limit."""
        return None if self._deadline is None else self._deadline - self._clock()

    def failed(self, error: Img2ImgError, *, begun: bool = False) -> float | None:
        """Records a failure. Calls the policy's `on_retry`, and returns the seconds to wait before the next attempt, or None if
        there is none. `begun`: part of the response had arrived, so gRPC did not retry."""
        self._made += self._tries if error.status == "UNAVAILABLE" and not begun else 1
        wait = self._next_wait(error)
        if wait is not None and self._policy is not None and self._policy.on_retry is not None:
            self._policy.on_retry(self._made, error, wait)
        return wait

    def is_in_time(self, wait: float = 0.0) -> bool:
        """Whether there is time left after `wait` seconds. (On a busy or suspended machine, a wait may take longer.)"""
        left = self.seconds_left()
        return left is None or wait < left

    def _next_wait(self, error: Img2ImgError) -> float | None:
        policy = self._policy
        if policy is None or self._made + self._tries > policy.max_attempts or not is_transient(error):
            return None
        asked = 0.0 if self._several and not self._refused else error.retry_after or 0.0
        self._refused = self._refused or error.retry_after is not None
        if asked > policy.longest_wait:
            return None
        wait = asked + self._uniform(0.0, policy.backoff(self._made))
        return wait if self.is_in_time(wait) else None


def closed_error(request_id: str = "") -> Cancelled:
    """The error of a call whose client or stream was closed while it ran or waited."""
    return Cancelled("the client or stream was closed before the call was done", status="CANCELLED", request_id=request_id)


def wait_again(attempts: Attempts, error: Img2ImgError, stop: Stop, *, begun: bool = False) -> bool:
    """Waits for the next attempt and returns True, or returns False immediately if there is none.

    Raises Cancelled if the wait was ended early.
    """
    wait = attempts.failed(error, begun=begun)
    if wait is None:
        return False
    if stop.wait(wait):
        raise closed_error(error.request_id) from error
    return attempts.is_in_time()
