"""The errors of failed calls.

Errors before a call are ordinary Python errors: a missing file is a FileNotFoundError.
"""


class Img2ImgError(Exception):
    """A call failed. Subclasses distinguish common causes; other failures are of this class itself.

    `status` is the name of the gRPC status code, such as "INVALID_ARGUMENT". `reason` is the server's stable reason, such as
    "QUEUE_FULL", or "" if the failure did not come from an img2img server. `fields` are (field, description) pairs for invalid
    fields of a request. `retry_after` is in seconds, None if the server sent none. `estimate` is the estimated duration in
    seconds if the server refused a request because of its timeout, else None. `request_id` identifies the call in the server's
    log, or "" if no server responded.
    """

    def __init__(
        self,
        message: str,
        *,
        status: str = "UNKNOWN",
        reason: str = "",
        fields: tuple[tuple[str, str], ...] = (),
        retry_after: float | None = None,
        estimate: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        self.fields = fields
        self.retry_after = retry_after
        self.estimate = estimate
        self.request_id = request_id


class InvalidRequest(Img2ImgError):
    """The request is invalid and must not be retried; `fields` has the invalid fields."""


class ModelNotFound(Img2ImgError):
    """The server has no model that matches the reference."""


class ModelUnavailable(Img2ImgError):
    """The server has the model but cannot run it: it is damaged, or cannot be loaded now."""


class NotSupported(Img2ImgError):
    """The server or the model does not support this."""


class ServerFailed(Img2ImgError):
    """The server failed, and the request is not the cause; the server's log has the details under `request_id`."""


class Damaged(Img2ImgError):
    """The received data differs from the sent data."""


class AssetNotFound(Img2ImgError):
    """The server stores no such image for this caller, or it has expired."""


class Unauthenticated(Img2ImgError):
    """The access token is missing or invalid."""


class PermissionDenied(Img2ImgError):
    """The access token does not permit this call."""


class Overloaded(Img2ImgError):
    """The server cannot accept another request; retry after `retry_after` seconds.

    If that is None, as with the reason "OUT_OF_MEMORY", retrying does not help.
    """


class Unavailable(Img2ImgError):
    """The server cannot be reached, or is shutting down."""


class DeadlineExceeded(Img2ImgError):
    """The timeout expired, or the server predicts that it would: then `estimate` is the expected duration."""


class Cancelled(Img2ImgError):
    """The call was cancelled by the client or the server."""
