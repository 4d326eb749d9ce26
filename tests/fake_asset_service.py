"""An AssetService that keeps images in memory, and the behaviour that all fake services share."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from fake_statuses import abort, error_info, rich_status, wrong_field
from google.protobuf import timestamp_pb2
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img.v1 import asset_pb2, asset_pb2_grpc


class Observed:
    """Common behaviour of the fake services.

    `failures` are statuses for the next calls, one each; `failure` is a status for every call. `token` is the token that calls
    must send. `calls` and `metadata` record every call in order.
    """

    def __init__(self) -> None:
        self.failures: list[grpc.Status] = []
        self.failure: grpc.Status | None = None
        self.token: str | None = None
        self.metadata: list[dict[str, str | bytes]] = []
        self.seconds_left: list[float | None] = []

    def meet(self, context: Any, begun: bool = False) -> None:
        """Records a call, and refuses it if it is to fail. `begun`: part of the response has been sent already."""
        sent = dict(context.invocation_metadata())
        self.metadata.append(sent)
        self.seconds_left.append(context.time_remaining())
        if self.token is not None and sent.get("authorization") != f"Bearer {self.token}":
            abort(context, rich_status(code_pb2.UNAUTHENTICATED, "no token that is known", error_info("UNAUTHENTICATED")))
        failure = self.failures.pop(0) if self.failures else self.failure
        if failure is not None:
            abort(context, failure)
        if not begun:
            self.name(context)

    def name(self, context: Any) -> None:
        """Begins the answer with the call's name: the caller's, or "made"."""
        sent = dict(context.invocation_metadata())
        context.send_initial_metadata((("x-request-id", sent.get("x-request-id", "made")),))


class FakeAssetService(Observed, asset_pb2_grpc.AssetServiceServicer):
    """Keeps images in memory, by their SHA-256. `chunks` are the sizes of the received chunks; `damage` damages downloads. If an
    upload is to fail, it does so after its first message; a small one after its last, as grpc.aio loses the status of a call that
    ends while a message is on its way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.chunks: list[int] = []
        self.damage: Callable[[bytes], bytes] = lambda data: data

    def UploadAsset(
        self, request_iterator: Iterator[asset_pb2.UploadAssetRequest], context: Any
    ) -> asset_pb2.UploadAssetResponse:
        info = next(request_iterator).info
        small = [message.chunk for message in request_iterator] if info.size < 1000 else []
        self.meet(context)
        received = small or [message.chunk for message in request_iterator]
        self.chunks += map(len, received)
        data = b"".join(received)
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != info.size:
            abort(context, wrong_field("info.size", f"{info.size} bytes were announced, {len(data)} came"))
        if digest != info.sha256:
            abort(context, wrong_field("info.sha256", "is not that of the bytes that came"))
        self.files[digest] = data
        return asset_pb2.UploadAssetResponse(asset=self._asset(digest))

    def GetAsset(self, request: asset_pb2.GetAssetRequest, context: Any) -> Iterator[asset_pb2.GetAssetResponse]:
        self.meet(context)
        self._require(request.id, context)
        yield asset_pb2.GetAssetResponse(asset=self._asset(request.id))
        data = self.damage(self.files[request.id])
        for start in range(0, len(data), 100_000):
            yield asset_pb2.GetAssetResponse(chunk=data[start : start + 100_000])

    def DeleteAsset(self, request: asset_pb2.DeleteAssetRequest, context: Any) -> asset_pb2.DeleteAssetResponse:
        self.meet(context)
        self._require(request.id, context)
        del self.files[request.id]
        return asset_pb2.DeleteAssetResponse()

    def _require(self, name: str, context: Any) -> None:
        if name not in self.files:
            abort(context, rich_status(code_pb2.NOT_FOUND, f"no asset {name}", error_info("ASSET_NOT_FOUND")))

    def _asset(self, name: str) -> asset_pb2.Asset:
        expires = timestamp_pb2.Timestamp(seconds=1_800_000_000)
        return asset_pb2.Asset(id=name, media_type="image/png", size=len(self.files[name]), sha256=name, expire_time=expires)
