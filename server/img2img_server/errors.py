"""The errors that a caller may see.

Each class has the name of its gRPC status code as a string, so that packages below the API can raise it without importing grpc.
Messages are written for the caller and contain nothing internal.
"""


class ServerError(Exception):
    """Base of every error that reaches a caller. Other exceptions are reported as a plain ServerError.

    `status` is the name of a grpc.StatusCode, `reason` the stable reason of its ErrorInfo.
    """

    status = "INTERNAL"
    reason = "INTERNAL"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles all attributes, whatever the constructor's parameters: errors are copied and sent between processes."""
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

    @property
    def root(self) -> str:
        """The field of the request that the wrong one is in, such as "image"."""
        return root_of(self.field)


def root_of(field: str) -> str:
    """The first name of a field's path, without an index: "loras" of "loras[0].id"."""
    return field.partition(".")[0].partition("[")[0]


class MalformedMessage(ServerError):
    """The caller's bytes are not a message of the method's type."""

    status = "INVALID_ARGUMENT"
    reason = "MALFORMED_MESSAGE"


class MessageTooLarge(ServerError):
    """The message is larger than the method accepts."""

    status = "INVALID_ARGUMENT"
    reason = "MESSAGE_TOO_LARGE"


class ModelNotFound(ServerError):
    """No model of the store matches the request's reference."""

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
    """The contract has this feature, but this server does not support it."""

    status = "UNIMPLEMENTED"
    reason = "NOT_SUPPORTED"


class Exhausted(ServerError):
    """A resource is used up for now. `retry_after` is in seconds, None if unknown."""

    status = "RESOURCE_EXHAUSTED"
    reason = "EXHAUSTED"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Exhausted):
    """The queue is full."""

    reason = "QUEUE_FULL"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after: float = retry_after


class ClientBusy(Exhausted):
    """This client has reached its maximum number of requests."""

    reason = "CLIENT_QUEUE_FULL"


class RateLimited(Exhausted):
    """This client has reached its token's rate limit."""

    reason = "RATE_LIMITED"


class ModelMemoryFull(Exhausted):
    """The model does not fit into the memory for models beside the models in use."""

    reason = "MODEL_MEMORY_FULL"


class ImageMemoryFull(Exhausted):
    """The memory for received and decoded images is full."""

    reason = "IMAGE_MEMORY_FULL"


class AssetQuotaFull(Exhausted):
    """Asset storage is full."""

    reason = "ASSET_QUOTA_FULL"


class AssetNotFound(ServerError):
    """No asset has this id, or it has expired."""

    status = "NOT_FOUND"
    reason = "ASSET_NOT_FOUND"


class StorageFailed(ServerError):
    """The storage of assets, or of image bytes during decoding or encoding, cannot be read or written: the disk is full, for
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
    """The client did not read its response within the reader timeout."""

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
    """The device has not enough memory for this request, even alone. The message contains the request's size.

    `again` tells the engine that memory was freed since, so that a retry of the same call may succeed.
    """

    status = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"
    again = False


class BundleError(Exception):
    """A bundle cannot be served. Its text is for the operator; callers get a short version of it (models/)."""
