"""The client: one channel, and a method for each thing that a server does."""

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from img2img.v1 import image_to_image_pb2, image_to_image_pb2_grpc, model_pb2, model_pb2_grpc

from img2img_client.errors import DeadlineExceeded, Img2ImgError
from img2img_client.options import MAX_MESSAGE_BYTES, ImageInput, TransformOptions, build_request
from img2img_client.responses import parse_error, parse_event, parse_model, parse_result
from img2img_client.values import Completed, ModelInfo, TransformEvent, TransformResult

DEFAULT_TARGET = "localhost:50051"
"""Where `img2img serve` listens unless it is told otherwise."""

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What the server made is taken whatever its size: it was asked for, and its making is paid.
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

# grpc.health.v1 by hand, because its package is not needed otherwise: an empty HealthCheckRequest asks about the server as a
# whole, and a HealthCheckResponse is one varint, field 1, where SERVING is 1.
_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
_HEALTH_REQUEST = b""
_HEALTH_SERVING = b"\x08\x01"


class Client:
    """Talks to one server. Connects at the first call; safe to share between threads; `close()` it or use it as a context.

    `target` is "host:port" or any name gRPC resolves ("unix:/path"); "https://host:port" means TLS with the system's roots.
    `timeout` is in seconds and holds for each call that names none; None waits forever. `credentials` turn TLS on and are
    what grpc.ssl_channel_credentials and its relatives make. Every failed call raises an Img2ImgError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._channel = _open_channel(target, credentials)
        self._images = image_to_image_pb2_grpc.ImageToImageServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)

    def transform(
        self, image: ImageInput, *, timeout: float | None = None, **options: Unpack[TransformOptions]
    ) -> TransformResult:
        """Transforms one picture and returns when it is done. The options, all optional, are TransformOptions' fields.

        OSError where the picture cannot be read; TypeError and ValueError for options that cannot be sent.
        """
        return parse_result(self._call(self._images.Transform, build_request(image, options), timeout))

    def transform_stream(
        self, image: ImageInput, *, timeout: float | None = None, **options: Unpack[TransformOptions]
    ) -> "TransformStream":
        """Transforms one picture and tells how it goes. Takes what `transform` takes and raises what it raises.

        with client.transform_stream("photo.jpg") as events:
            for event in events: ...   # leaving early cancels the call
        """
        request = image_to_image_pb2.TransformStreamRequest(request=build_request(image, options))
        return TransformStream(self._images.TransformStream(request, timeout=self._seconds(timeout)))

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every model of the server's store, in order of id."""
        response = self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(parse_model(model) for model in response.models)

    def model(self, model_id: str, *, timeout: float | None = None) -> ModelInfo:
        """One model. ModelNotFound where the server has none of that id."""
        return parse_model(self._call(self._models.GetModel, model_pb2.GetModelRequest(id=model_id), timeout).model)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns when the server's health turns to SERVING, at once if it is. DeadlineExceeded after `timeout` seconds.

        There need not be a server yet: the channel tries again until there is one.
        """
        watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(_HEALTH_WATCH)
        call = watch(_HEALTH_REQUEST, timeout=self._seconds(timeout), wait_for_ready=True)
        try:
            for status in call:
                if status == _HEALTH_SERVING:
                    return
        except grpc.RpcError as error:
            failure = parse_error(error)
            if isinstance(failure, DeadlineExceeded):
                failure = DeadlineExceeded(f"{self.target} was not ready in time", status=failure.status)
            raise failure from error
        finally:
            call.cancel()
        raise Img2ImgError(f"{self.target} ended its health watch", status="UNAVAILABLE")

    def close(self) -> None:
        """Closes the channel; what still runs on it is cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(
        self, method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request, timeout: float | None
    ) -> _Response:
        call = method.future(request, timeout=self._seconds(timeout))
        try:
            return call.result()
        except grpc.RpcError as error:
            raise parse_error(error) from error
        finally:
            call.cancel()  # Does nothing to a call that has ended; Ctrl-C leaves here with one that has not.

    def _seconds(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout


class TransformStream(Iterator[TransformEvent]):
    """The events of one request: Queued, again when its place changes, Started, Progress for each step, Completed at last.

    Leaving the context, `close()` or dropping the stream cancels what has not ended. A failed call raises an Img2ImgError.
    """

    def __init__(self, call: "_StreamCall") -> None:
        self._call = call
        self._completed = False

    def __next__(self) -> TransformEvent:
        try:
            for message in self._call:
                event = parse_event(message)
                if event is not None:
                    self._completed = isinstance(event, Completed)
                    return event
        except grpc.RpcError as error:
            raise parse_error(error) from error
        if self._completed:
            raise StopIteration
        raise Img2ImgError("the server ended the stream without a result", status="INTERNAL")

    def close(self) -> None:
        """Cancels the call, unless it has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _StreamCall(Protocol):
    def __iter__(self) -> Iterator[image_to_image_pb2.TransformStreamResponse]: ...
    def cancel(self) -> bool: ...


def _open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if target.startswith("https://"):
        target = target.removeprefix("https://").rstrip("/")
        credentials = credentials or grpc.ssl_channel_credentials()
    options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if _is_loopback(target) else 1))
    if credentials is None:
        return grpc.insecure_channel(target, options, grpc.Compression.NoCompression)
    return grpc.secure_channel(target, credentials, options, grpc.Compression.NoCompression)


def _is_loopback(target: str) -> bool:
    """Whether the target is this machine, which no proxy can reach; gRPC would ask $http_proxy all the same."""
    host = target.rpartition(":")[0]
    return host in ("localhost", "[::1]") or host.startswith("127.")
