"""How a client makes a call: the token goes with it, failures are tried again, and tracing hears of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from img2img_client.balancing import tries_of
from img2img_client.errors import Img2ImgError
from img2img_client.responses import REQUEST_ID, parse_error, parse_request_id
from img2img_client.retry import Attempts, RetryPolicy, Stop, wait_again
from img2img_client.tracing import CallSpan

if TYPE_CHECKING:
    from img2img_client.async_calls import AsyncStop

Metadata = tuple[tuple[str, str], ...]
"""Of a call, as gRPC takes it."""

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer", covariant=True)

_LONGEST = 1e9
"""Seconds of a time-out, 31 years. gRPC counts nanoseconds since 1970 in 64 bits; what overflows has passed."""

_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""What a server takes for the name of a call."""


class Call(Protocol[_Answer]):
    """A call that runs, as gRPC gives it back: of those that have one answer."""

    def result(self) -> _Answer:
        """Waits for the answer."""

    def cancel(self) -> bool:
        """Ends it."""

    def initial_metadata(self) -> "tuple[tuple[str, str | bytes], ...] | None":
        """What came before the answer."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A call that begins: its span, what goes with each attempt, and the attempts."""

    span: CallSpan
    metadata: Metadata
    attempts: Attempts


@dataclass(frozen=True, slots=True)
class Calling:
    """What the calls of one client have in common. `shown` names its servers, `several` of them or one.

    `metadata` goes with each call; `timeout`, in seconds, holds for those that name none. `counted` where gRPC tries again as
    `balancing.service_config(policy)` says.
    """

    shown: str
    metadata: Metadata
    timeout: float | None
    policy: RetryPolicy | None
    several: bool = False
    counted: bool = False

    def seconds(self, timeout: float | None) -> float | None:
        """The time-out of a call that was given this one. ValueError for one that gRPC would take for one that has passed."""
        seconds = self.timeout if timeout is None else timeout
        if seconds is not None and not 0 <= seconds <= _LONGEST:  # nor is it not a number
            raise ValueError(f"timeout is {seconds}: it is in seconds, 0 to {_LONGEST:g}, or None for no bound")
        return seconds

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> Begun:
        """Begins a call of a procedure, such as "ImageToImageService/Transform", that is `safe` to make twice or not.

        ValueError for a `request_id` that a server would not take, or a time-out that cannot be.
        """
        timeout = self.seconds(timeout)
        if request_id is not None and not _REQUEST_ID_FORM.fullmatch(request_id):
            raise ValueError(f"request_id has 1 to 64 letters, digits and _ . : -, unlike {request_id!r}")
        span = CallSpan(procedure, self.shown)
        named = () if request_id is None else ((REQUEST_ID, request_id),)
        policy = self.policy if safe else None
        tries = tries_of(procedure, policy) if self.counted else 1
        if policy is not None:
            policy = replace(policy, on_retry=_both(span, policy))
        return Begun(span, (*self.metadata, *span.metadata, *named), Attempts(policy, timeout, tries=tries, several=self.several))


class Caller:
    """Makes the calls of one client that blocks. `stop` ends their waits."""

    def __init__(self, calling: Calling) -> None:
        self.calling = calling
        self.stop = Stop()

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> Begun:
        """Begins a call, as `Calling.begin` does. ValueError where the client is closed."""
        require_open(self.stop)
        return self.calling.begin(procedure, timeout, safe=safe, request_id=request_id)

    def unary(
        self,
        procedure: str,
        method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout: float | None,
        *,
        safe: bool = True,
        request_id: str | None = None,
    ) -> tuple[_Response, str]:
        """Calls a procedure of one message each way. Returns the answer and the call's name in the server's log."""
        return self.run(
            procedure,
            lambda seconds, metadata: finish(method.future(request, timeout=seconds, metadata=metadata)),
            timeout,
            safe=safe,
            request_id=request_id,
        )

    def run(
        self,
        procedure: str,
        attempt: Callable[[float | None, Metadata], tuple[_Result, str]],
        timeout: float | None,
        *,
        safe: bool = True,
        request_id: str | None = None,
    ) -> tuple[_Result, str]:
        """Calls a procedure by `attempt`, which is given its time-out and metadata, and returns the result and the call's name.

        One that is not `safe` to make twice is attempted once.
        """
        begun = self.begin(procedure, timeout, safe=safe, request_id=request_id)
        with begun.span:
            while True:
                try:
                    result, answered = attempt(begun.attempts.seconds_left(), begun.metadata)
                except Img2ImgError as error:
                    if not wait_again(begun.attempts, error, self.stop):
                        raise
                else:
                    begun.span.answered(answered)
                    return result, answered


def require_open(stop: "Stop | AsyncStop") -> None:
    """ValueError where a client is closed: a mistake of the program's, as with a file."""
    if stop.is_set:
        raise ValueError("the client is closed")


def finish(call: Call[_Result]) -> tuple[_Result, str]:
    """Waits for a call's answer; gives it and the call's name in the server's log. Raises an Img2ImgError."""
    try:
        return call.result(), parse_request_id(call.initial_metadata())
    except grpc.RpcError as error:
        raise parse_error(error) from error
    finally:
        call.cancel()  # Does nothing to a call that has ended; Ctrl-C leaves here with one that has not.


def _both(span: CallSpan, policy: RetryPolicy) -> Callable[[int, Img2ImgError, float], None]:
    def tell(attempt: int, error: Img2ImgError, wait: float) -> None:
        span.retry(attempt, error, wait)
        if policy.on_retry is not None:
            policy.on_retry(attempt, error, wait)

    return tell
