"""The one tree of errors that a server's answer, or the lack of one, turns into.

What goes wrong before a call is made keeps its ordinary Python error: a file that is not there is a FileNotFoundError.
"""


class Img2ImgError(Exception):
    """A call failed. The subclasses are what a program may want to tell apart; everything else is this class itself.

    `status` is the name of the gRPC status code, such as "INVALID_ARGUMENT". `reason` is the server's stable reason, such as
    "QUEUE_FULL", and empty where the failure did not come from an img2img server. `fields` are (field, description) pairs
    that name what is wrong with a request. `retry_after` is in seconds, None where the server gave none. `estimate` is the
    seconds that the server would take, where it refused a request for its time-out, else None. `request_id` is the name of
    the call in the server's log, empty where no server answered.
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
    """The request is wrong and would be wrong again; `fields` says where."""


class ModelNotFound(Img2ImgError):
    """The server has no model that agrees with the reference."""


class ModelUnavailable(Img2ImgError):
    """The server has the model and cannot run it: it is damaged, or not to be loaded now."""


class NotSupported(Img2ImgError):
    """The server, or the model, does not do this."""


class ServerFailed(Img2ImgError):
    """The server failed on this request, by no fault of it; what happened is in its log, under `request_id`."""


class Damaged(Img2ImgError):
    """What arrived is not what was sent."""


class AssetNotFound(Img2ImgError):
    """The server keeps no such image for this caller, or keeps it no longer."""


class Unauthenticated(Img2ImgError):
    """The server wants a token, and got none or one that it does not know."""


class PermissionDenied(Img2ImgError):
    """The token is known and does not allow this."""


class Overloaded(Img2ImgError):
    """The server has no room for one more request; try again after `retry_after` seconds.

    Where that is None, as with the reason "OUT_OF_MEMORY", waiting would not help.
    """


class Unavailable(Img2ImgError):
    """There is no server at the target, or it is shutting down."""


class DeadlineExceeded(Img2ImgError):
    """The time-out passed first, or the server knows that it would: then `estimate` says how long it would take."""


class Cancelled(Img2ImgError):
    """The call was cancelled, here or by the server."""
