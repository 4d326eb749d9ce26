"""The one tree of errors that a caller may see.

Each class owns the name of its gRPC status code as a plain string, so that the engine and the leaves can raise what the
service answers without importing grpc. The message of an error is written for the caller: it names nothing internal.
"""


class ServerError(Exception):
    """Base of every error that reaches a caller, and what any other error is turned into.

    `status` is the name of a grpc.StatusCode, `reason` the stable reason of its ErrorInfo.
    """

    status = "INTERNAL"
    reason = "INTERNAL"

    def __reduce__(self) -> tuple[object, ...]:
        """As it is copied and sent between processes: with all it knows, whatever its constructor takes."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[ServerError], args: tuple[object, ...], known: dict[str, object]) -> ServerError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(known)
    return error


class InvalidField(ServerError):
    """A field of the request is wrong. `field` is its path in the proto, such as "image.data"."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


class MalformedMessage(ServerError):
    """What the caller sent is no message of the method's type."""

    status = "INVALID_ARGUMENT"
    reason = "MALFORMED_MESSAGE"


class MessageTooLarge(ServerError):
    """The message has more bytes than the method takes."""

    status = "INVALID_ARGUMENT"
    reason = "MESSAGE_TOO_LARGE"


class ModelNotFound(ServerError):
    """No model of the store agrees with the request's reference."""

    status = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"


class ServiceNotFound(ServerError):
    """A health check names a service that this server does not have."""

    status = "NOT_FOUND"
    reason = "SERVICE_NOT_FOUND"


class ModelUnavailable(ServerError):
    """The model is in the store, but cannot run: its bundle is damaged or did not load."""

    status = "FAILED_PRECONDITION"
    reason = "MODEL_UNAVAILABLE"


class ModelNotLoaded(ServerError):
    """The model is in the store, not in memory, and this server does not load models on request."""

    status = "FAILED_PRECONDITION"
    reason = "MODEL_NOT_LOADED"


class NotSupported(ServerError):
    """The contract has it, this server does not do it."""

    status = "UNIMPLEMENTED"
    reason = "NOT_SUPPORTED"


class Exhausted(ServerError):
    """Something that comes back is used up. `retry_after` is in seconds, None where nobody can say."""

    status = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Exhausted):
    """No room for one more request."""

    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after: float = retry_after


class ClientBusy(Exhausted):
    """This client has as many requests in as one may have."""

    reason = "CLIENT_QUEUE_FULL"


class RateLimited(Exhausted):
    """This client's token allows no more calls for now."""

    reason = "RATE_LIMITED"


class ModelMemoryFull(Exhausted):
    """The model does not fit into the memory for models, beside those that are in use."""

    reason = "MODEL_MEMORY_FULL"


class ImageMemoryFull(Exhausted):
    """The memory for images, as they arrive and once they are decoded, is full."""

    reason = "IMAGE_MEMORY_FULL"


class AssetQuotaFull(Exhausted):
    """There is no room for one more asset."""

    reason = "ASSET_QUOTA_FULL"


class AssetNotFound(ServerError):
    """No asset has this id, or it has expired."""

    status = "NOT_FOUND"
    reason = "ASSET_NOT_FOUND"


class StorageFailed(ServerError):
    """Storage of assets, or of an image's bytes while it is decoded or encoded, cannot be read or written: the disk is full, for
    example, or the storage cannot be reached."""

    status = "UNAVAILABLE"
    reason = "STORAGE_FAILED"


class Unauthenticated(ServerError):
    """The call has no bearer token, or an invalid one."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(ServerError):
    """The caller's token does not allow this."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class DeadlineExpired(ServerError):
    """The caller's deadline passed before the request was finished."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXPIRED"


class ReaderTooSlow(ServerError):
    """The client did not read its answer within the time that a message may be left unread."""

    status = "DEADLINE_EXCEEDED"
    reason = "READER_TOO_SLOW"


class DeadlineUnmeetable(ServerError):
    """Refused on arrival: the caller's deadline would pass before the request is finished. `estimate` is in seconds."""

    status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_UNMEETABLE"

    def __init__(self, message: str, estimate: float) -> None:
        super().__init__(message)
        self.estimate = estimate


class RequestCancelled(ServerError):
    """The caller cancelled the request."""

    status = "CANCELLED"
    reason = "CANCELLED"


class ShuttingDown(ServerError):
    """The server accepts no new requests, or stopped before this one was finished."""

    status = "UNAVAILABLE"
    reason = "SHUTTING_DOWN"


class ServerStarting(Exhausted):
    """The server is still loading its models. `retry_after` says when to retry."""

    status = "UNAVAILABLE"
    reason = "SERVER_STARTING"


class EngineStuck(ServerError):
    """A call of the model did not return. This server exits; retry on another one."""

    status = "UNAVAILABLE"
    reason = "ENGINE_STUCK"


class NoReplica(Exhausted):
    """No replica can be reached. A lost replica is being replaced."""

    status = "UNAVAILABLE"
    reason = "NO_REPLICA"


class ModelFailed(ServerError):
    """The model's own computation failed. The cause is in the server's log."""

    status = "INTERNAL"
    reason = "MODEL_FAILED"


class OutOfMemory(ServerError):
    """The device has no room for this request, even alone. The message says of what size it was.

    `again` says for the engine that memory was given back since, so that the same call may work now.
    """

    status = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"
    again = False


class BundleError(Exception):
    """A bundle that must not be served. Seen by the operator at start, never by a caller."""
