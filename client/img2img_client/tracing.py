"""OpenTelemetry spans for a client's calls, if the program uses OpenTelemetry.

This module never imports OpenTelemetry first: a program that has set it up has imported it.
https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
"""

import re
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from img2img_client.errors import Img2ImgError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAME = "img2img_client"
_PACKAGE = "img2img.v1"


class CallSpan:
    """The span of one call with all its attempts. Use it as a context manager, or `end` it; later events are not recorded.

    For the `procedure` "ImageToImageService/TransformStream", the span is "img2img.transform_stream". `metadata` propagates the
    trace to the server.
    """

    def __init__(self, procedure: str, target: str) -> None:
        self.metadata: tuple[tuple[str, str], ...] = ()
        self._span: Span | None = None
        if "opentelemetry.trace" in sys.modules:
            self._start(procedure, target)

    def retry(self, attempt: int, error: Img2ImgError, wait: float) -> None:
        """Records a retry."""
        if self._span is not None:
            failed: dict[str, str | int | float] = {"status": error.status, "reason": error.reason}
            self._span.add_event("retry", {**failed, "attempt": attempt, "wait_seconds": wait})

    def answered(self, request_id: str) -> None:
        """Records the request id."""
        if self._span is not None and request_id:
            self._span.set_attribute("img2img.request_id", request_id)

    def end(self, error: BaseException | None = None, status: str = "OK") -> None:
        """Ends the span with the status of `error`, or else with `status`."""
        span, self._span = self._span, None
        if span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            kind, status = type(error).__qualname__, "CANCELLED"  # raised by the caller: Ctrl-C, an unreadable file
            if isinstance(error, Img2ImgError):
                kind = status = error.status
                if error.request_id:
                    span.set_attribute("img2img.request_id", error.request_id)
            span.set_attribute("error.type", kind)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.set_attribute("rpc.response.status_code", status)
        span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)

    def _start(self, procedure: str, target: str) -> None:
        from opentelemetry.trace import SpanKind, get_tracer, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", procedure.partition("/")[2]).lower()
        about = {"rpc.system.name": "grpc", "rpc.method": f"{_PACKAGE}.{procedure}", "server.address": target}
        self._span = get_tracer(_NAME).start_span(f"img2img.{name}", kind=SpanKind.CLIENT, attributes=about)
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        self.metadata = tuple(carrier.items())
