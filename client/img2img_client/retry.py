"""Which failures are tried again, when, and for how long."""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from img2img_client.errors import Cancelled, Img2ImgError

OnRetry = Callable[[int, Img2ImgError, float], None]
"""Is told, before each wait, how many attempts there were, how the last one failed, and the seconds until the next."""

_MOST_DOUBLINGS = 1000
"""Of a back-off: beyond, a float would overflow."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is tried again that may succeed the next time, within the time-out that the caller gave it.

    There are `max_attempts` in all. The wait after the n-th failure is drawn from 0 to `first_backoff` times 2 to the (n - 1),
    which `most_backoff` bounds; all in seconds. Drawn anew by each caller, it keeps those who failed together from coming back
    together. A server that says how long to wait is given that and the drawn wait on top; where it says more than
    `longest_wait`, the call fails. `on_retry` is told of each wait.
    """

    max_attempts: int = 5
    first_backoff: float = 0.2
    most_backoff: float = 10.0
    longest_wait: float = 60.0
    on_retry: OnRetry | None = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}, the least is 1")
        for name in ("first_backoff", "most_backoff", "longest_wait"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} is {seconds}: it is in seconds, 0 or more")

    def backoff(self, failures: int) -> float:
        """The most seconds to wait after so many failures, from 1, where the server asks for nothing."""
        return float(min(self.most_backoff, self.first_backoff * 2.0 ** min(failures - 1, _MOST_DOUBLINGS)))


def is_transient(error: Img2ImgError) -> bool:
    """Whether the same call may succeed later: nobody answered, or who did said when to come back.

    An answer that will be the same again (a wrong field, a failed model, too large a message, no memory) is not, nor is a
    time-out, which was the caller's.
    """
    return error.status == "UNAVAILABLE" or (error.status == "RESOURCE_EXHAUSTED" and error.retry_after is not None)


class Stop:
    """Ends waits early: those of a stream that is closed, or of everything that belongs to a client that is."""

    def __init__(self, parent: "Stop | None" = None) -> None:
        self._parent = parent
        self._changed: threading.Condition = threading.Condition() if parent is None else parent._changed
        self._set = False

    @property
    def is_set(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self._set or (self._parent is not None and self._parent.is_set)

    def set(self) -> None:
        """Ends every wait, now and later."""
        with self._changed:
            self._set = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Waits so long, and returns whether it was ended early."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_set, seconds)


class Attempts:
    """The attempts of one call: the time that each has, and whether one follows a failure.

    `timeout` holds for all of them, from now. Without a `policy` there is one attempt. `clock` is in seconds, `wait` returns
    whether it was ended early, and `uniform` draws between two numbers.
    """

    def __init__(
        self,
        policy: RetryPolicy | None,
        timeout: float | None,
        wait: Callable[[float], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._policy = policy
        self._wait = wait
        self._clock = clock
        self._uniform = uniform
        self._deadline = None if timeout is None else clock() + timeout
        self._failures = 0

    def seconds_left(self) -> float | None:
        """The time-out of an attempt that begins now; None for no bound."""
        return None if self._deadline is None else self._deadline - self._clock()

    def again(self, error: Img2ImgError) -> bool:
        """Takes notice of a failure. Waits and returns True where another attempt is due, returns False at once where none is.

        Raises Cancelled where the wait was ended early.
        """
        self._failures += 1
        policy = self._policy
        wait = self._next_wait(error)
        if policy is None or wait is None:
            return False
        if policy.on_retry is not None:
            policy.on_retry(self._failures, error, wait)
        if self._wait(wait):
            raise Cancelled("closed while it waited to try again", status="CANCELLED", request_id=error.request_id) from error
        return self._is_in_time(0)  # A machine that was busy, or asleep, may have waited for longer.

    def _next_wait(self, error: Img2ImgError) -> float | None:
        """Seconds until the next attempt; None where there is none."""
        policy = self._policy
        if policy is None or self._failures >= policy.max_attempts or not is_transient(error):
            return None
        asked = error.retry_after or 0.0
        if asked > policy.longest_wait:
            return None
        wait = asked + self._uniform(0.0, policy.backoff(self._failures))
        return wait if self._is_in_time(wait) else None

    def _is_in_time(self, wait: float) -> bool:
        left = self.seconds_left()
        return left is None or wait < left
