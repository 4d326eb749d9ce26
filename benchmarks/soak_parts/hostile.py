"""Clients that never read: each stream has a flow-control window of 0 bytes, and uploads stop half-way."""

import contextlib
import itertools
import threading
from collections.abc import Iterator

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from img2img.v1 import asset_pb2
from img2img.v1 import image_to_image_pb2 as pb

from soak_parts.raw_http2 import ACK, HEADERS, PING, RawConnection

WATCH = "/grpc.health.v1.Health/Watch"
STREAM = "/img2img.v1.ImageToImageService/TransformStream"
UNARY = "/img2img.v1.ImageToImageService/Transform"
UPLOAD = "/img2img.v1.AssetService/UploadAsset"
GET = "/img2img.v1.AssetService/GetAsset"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
KSERVE_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
KSERVE_UNARY = "/inference.GRPCInferenceService/ServerLive"


def watch_of(service: str) -> bytes:
    """The request message of a health watch."""
    return health_pb2.HealthCheckRequest(service=service).SerializeToString()


class Unread:
    """A connection with calls in progress whose answers are not read. Pings are answered, because otherwise the server would
    close the connection."""

    def __init__(self, connection: RawConnection) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._begun: set[int] = set()
        self.closed = threading.Event()
        """Set when the server has closed the connection."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, *streams: int) -> None:
        """Returns once the server has begun to answer these calls. Raises ConnectionError if it closes the connection first."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.closed.is_set() or self._begun.issuperset(streams), 60)
            if not self._begun.issuperset(streams):
                raise ConnectionError("the server closed the connection")

    def _read(self) -> None:
        try:
            self._acknowledge()
        except OSError:
            pass
        finally:
            with self._changed:
                self.closed.set()
                self._changed.notify_all()

    def _acknowledge(self) -> None:
        for frame in self._connection.frames():
            if frame.kind == PING and not frame.flags & ACK:
                self._connection.send(PING, frame.payload, ACK)
            elif frame.kind == HEADERS:
                with self._changed:
                    self._begun.add(frame.stream)
                    self._changed.notify_all()


@contextlib.contextmanager
def unread(port: int, *calls: tuple[str, bytes], token: str = "") -> Iterator[Unread]:
    """Within the block a client is connected that makes these calls (on streams 1, 3, ...) and reads no answer. The server has
    begun to answer the first watch of each service."""
    with RawConnection(port, window=0, timeout=None) as connection:
        reader = Unread(connection)
        watched: dict[bytes, int] = {}
        for stream, (method, message) in zip(itertools.count(1, 2), calls, strict=False):
            connection.call(method, message, stream=stream, token=token)
            if method == WATCH:
                watched.setdefault(message, stream)
        reader.wait_for(*watched.values())
        yield reader


def crowd_calls(transform: pb.TransformRequest, asset: str = "", kserve: bool = True) -> list[tuple[str, bytes]]:
    """Calls of each kind that sends an answer, three of each."""
    calls = [
        (STREAM, pb.TransformStreamRequest(request=transform).SerializeToString()),
        (UNARY, transform.SerializeToString()),
        (REFLECTION, reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()),
        (UNARY, b"\xff"),
        *((WATCH, watch_of(name)) for name in ("", "models/m", "models/unknown", "img2img.v1.ImageToImageService")),
    ]
    if asset:
        calls.append((GET, asset_pb2.GetAssetRequest(id=asset).SerializeToString()))
    if kserve:
        calls += [(KSERVE_UNARY, b""), (KSERVE_STREAM, b"")]
    return calls * 3


@contextlib.contextmanager
def stalled(port: int, token: str = "") -> Iterator[None]:
    """Within the block a client is connected with stalled uploads and one call without a message."""
    with RawConnection(port, window=0, timeout=None) as uploads:
        Unread(uploads)
        info = asset_pb2.UploadAssetRequest(info=asset_pb2.UploadAssetInfo(size=1000))
        for stream in (1, 3, 5):
            uploads.call(UPLOAD, info.SerializeToString(), stream=stream, end=False, token=token)
        uploads.call(UNARY, stream=7, token=token)
        yield


@contextlib.contextmanager
def crowd(port: int, transform: pb.TransformRequest, asset: str = "", kserve: bool = True, token: str = "") -> Iterator[Unread]:
    """Within the block the clients of `unread` and `stalled` are connected."""
    calls = crowd_calls(transform, asset, kserve)
    with unread(port, *calls, token=token) as reader, stalled(port, token):
        yield reader
