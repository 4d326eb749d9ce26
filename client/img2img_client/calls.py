"""Calls of a client, with the token, retries and tracing."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from img2img_client.balancing import tries_of
from img2img_client.errors import Img2ImgError
from img2img_client.responses import REQUEST_ID, parse_error, parse_request_id
from img2img_client.retry import Attempts, RetryPolicy, Stop, wait_again
from img2img_client.tracing import CallSpan

Metadata = tuple[tuple[str, str], ...]
"""A call's metadata in gRPC's format."""

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer", covariant=True)

_LONGEST = 1e9
"""Maximum timeout in seconds, 31 years. gRPC counts nanoseconds since 1970 in 64 bits, and an overflow counts as expired."""

_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
"""The request ids that a server accepts."""


class Call(Protocol[_Answer]):
    """A running gRPC call with a single response."""

    def result(self) -> _Answer:
        """Waits for the response."""

    def cancel(self) -> bool:
        """Cancels the call."""

    def initial_metadata(self) -> "tuple[tuple[str, str | bytes], ...] | None":
        """The metadata that precedes the response."""


@dataclass(frozen=True, slots=True)
class StartedCall:
    """A started call: its span, the metadata of each attempt, and the attempts."""

    span: CallSpan
    metadata: Metadata
    attempts: Attempts


@dataclass(frozen=True, slots=True)
class CallSettings:
    """The settings that a client's calls share. `shown` names its server or servers; `several`: there are several.

    `metadata` is sent with each call; `timeout`, in seconds, is the default. `counted`: gRPC retries according to
    `balancing.service_config(policy)`, and its attempts count.
    """

    shown: str
    metadata: Metadata
    timeout: float | None
    policy: RetryPolicy | None
    several: bool = False
    counted: bool = False

    def seconds(self, timeout: float | None) -> float | None:
        """The timeout of a call, `timeout` or the default. Raises ValueError if it is out of range."""
        seconds = self.timeout if timeout is None else timeout
        if seconds is not None and not 0 <= seconds <= _LONGEST:  # also refuses NaN
            raise ValueError(f"timeout is {seconds}: it must be 0 to {_LONGEST:g} seconds, or None for no limit")
        return seconds

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> StartedCall:
        """Starts a call of a procedure, such as "ImageToImageService/Transform". `safe`: the call may be made twice.

        Raises ValueError for an invalid `request_id` or timeout.
        """
        timeout = self.seconds(timeout)
        if request_id is not None and not _REQUEST_ID_FORM.fullmatch(request_id):
            raise ValueError(
                f"request_id must have 1 to 64 characters, each a letter, a digit or one of _ . : -, not {request_id!r}"
            )
        span = CallSpan(procedure, self.shown)
        named = () if request_id is None else ((REQUEST_ID, request_id),)
        policy = self.policy if safe else None
        tries = tries_of(procedure, policy) if self.counted else 1
        if policy is not None:
            policy = replace(policy, on_retry=_both(span, policy))
        return StartedCall(
            span, (*self.metadata, *span.metadata, *named), Attempts(policy, timeout, tries=tries, several=self.several)
        )


class Caller:
    """Makes the calls of one Client. `stop` ends their waits."""

    def __init__(self, settings: CallSettings) -> None:
        self.settings = settings
        self.stop = Stop()

    def begin(self, procedure: str, timeout: float | None, *, safe: bool = True, request_id: str | None = None) -> StartedCall:
        """Starts a call, like `CallSettings.begin`. Raises ValueError if the client is closed."""
        require_open(self.stop.is_set)
        return self.settings.begin(procedure, timeout, safe=safe, request_id=request_id)

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
        """Calls a unary procedure. Returns the response and the request id."""
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
        """Calls a procedure with `attempt`, which takes a timeout and metadata and returns the result and the request id.

        A call that is not `safe` to make twice is attempted once.
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


def require_open(is_closed: bool) -> None:
    """Raises ValueError if a client is closed, like a closed file."""
    if is_closed:
        raise ValueError("the client is closed")


def finish(call: Call[_Result]) -> tuple[_Result, str]:
    """Waits for a call's response. Returns it and the request id. Raises an Img2ImgError."""
    try:
        return call.result(), parse_request_id(call.initial_metadata())
    except grpc.RpcError as error:
        raise parse_error(error) from error
    finally:
        call.cancel()  # No effect if the call has ended; after Ctrl-C it has not.


def _both(span: CallSpan, policy: RetryPolicy) -> Callable[[int, Img2ImgError, float], None]:
    def on_retry(attempt: int, error: Img2ImgError, wait: float) -> None:
        span.retry(attempt, error, wait)
        if policy.on_retry is not None:
            policy.on_retry(attempt, error, wait)

    return on_retry
