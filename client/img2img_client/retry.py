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
    `longest_wait`, the call fails. `on_retry` is told of each wait. With several servers gRPC makes some of the attempts by
    itself, at once (`balancing.py`).
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
    """The attempts of one call: the time that each has, and when one follows a failure. Does not wait itself.

    `timeout` holds for all of them, from now. Without a `policy` there is one attempt. Each may be as many as `tries`, where gRPC
    makes some of them by itself. With `several` servers the first that has no room is not waited for: another may have.
    `clock` is in seconds, and `uniform` draws between two numbers.
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
        """The time-out of an attempt that begins now; None for no bound."""
        return None if self._deadline is None else self._deadline - self._clock()

    def failed(self, error: Img2ImgError, *, begun: bool = False) -> float | None:
        """Takes notice of a failure; `begun` where the answer had begun, which gRPC does not try again. Tells the policy's
        `on_retry` and returns the seconds to wait before the next attempt, None where there is none."""
        self._made += self._tries if error.status == "UNAVAILABLE" and not begun else 1
        wait = self._next_wait(error)
        if wait is not None and self._policy is not None and self._policy.on_retry is not None:
            self._policy.on_retry(self._made, error, wait)
        return wait

    def is_in_time(self, wait: float = 0.0) -> bool:
        """Whether there is time left after so many seconds. A machine that was busy, or asleep, may wait for longer."""
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


def closed_meanwhile(request_id: str = "") -> Cancelled:
    """What a call ends with whose client, or stream, was closed while it ran or waited."""
    return Cancelled("closed before it was done", status="CANCELLED", request_id=request_id)


def wait_again(attempts: Attempts, error: Img2ImgError, stop: Stop, *, begun: bool = False) -> bool:
    """Waits and returns True where another attempt is due, returns False at once where none is.

    Raises Cancelled where the wait was ended early.
    """
    wait = attempts.failed(error, begun=begun)
    if wait is None:
        return False
    if stop.wait(wait):
        raise closed_meanwhile(error.request_id) from error
    return attempts.is_in_time()
