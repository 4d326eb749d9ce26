"""gRPC's side of the asset store."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from img2img.v1 import asset_pb2 as pb
from img2img.v1 import asset_pb2_grpc

from img2img_server import images
from img2img_server.assets.files import is_id, owner_of
from img2img_server.assets.index import Asset
from img2img_server.assets.store import AssetStore
from img2img_server.calls import current
from img2img_server.errors import DeadlineExpired, Exhausted, InvalidField

_CHUNK = 256 * 2**10
"""Bytes of a download's message."""
_IDLE = 60.0
"""Seconds without a message after which an upload is given up: until then it holds memory, and a part of the quota."""
_LONGEST = 600.0
"""Seconds for a whole upload: messages of a byte must not hold them for ever either."""
_IN_FLIGHT = 256 * 2**20
"""Bytes of all files that are being uploaded, which are in memory until they are whole."""
_RETRY = 1.0


class AssetService(asset_pb2_grpc.AssetServiceServicer):
    """UploadAsset, GetAsset and DeleteAsset. `limits` bound the pictures that are taken; `idle` is in seconds."""

    def __init__(self, assets: AssetStore, limits: images.ImageLimits, idle: float = _IDLE) -> None:
        self._assets = assets
        self._limits = limits
        self._idle = idle
        self._in_flight = 0

    async def UploadAsset(self, request_iterator: AsyncIterator[pb.UploadAssetRequest], context: Any) -> pb.UploadAssetResponse:
        """Stores a picture, whole and checked, before it answers."""
        self._assets.require("UploadAsset")
        owner = owner_of(current())
        try:
            async with asyncio.timeout(_LONGEST):
                info = await self._info(request_iterator)
                held = info.sha256 != "" and self._assets.holds(owner, info.sha256)
                with self._memory(info.size):
                    async with self._assets.room(owner, 0 if held else info.size) as room:
                        data = await self._data(info, request_iterator)
                        await asyncio.to_thread(self._check_picture, info, data)
                        asset = await self._assets.put(owner, data, room)
        except TimeoutError:
            raise DeadlineExpired(f"the upload took longer than {_LONGEST:g} seconds") from None
        return pb.UploadAssetResponse(asset=_message(asset))

    async def GetAsset(self, request: pb.GetAssetRequest, context: Any) -> AsyncGenerator[pb.GetAssetResponse, None]:
        """Sends a picture as fast as its reader takes it."""
        owner = self._checked(request.id, "GetAsset")
        yield pb.GetAssetResponse(asset=_message(await self._assets.find(owner, request.id)))
        async for block in self._assets.stream(owner, request.id):
            for start in range(0, len(block), _CHUNK):
                yield pb.GetAssetResponse(chunk=block[start : start + _CHUNK])

    async def DeleteAsset(self, request: pb.DeleteAssetRequest, context: Any) -> pb.DeleteAssetResponse:
        """Deletes a picture of the caller's."""
        owner = self._checked(request.id, "DeleteAsset")
        await self._assets.delete(owner, request.id)
        return pb.DeleteAssetResponse()

    def _checked(self, asset_id: str, what: str) -> str:
        """Whose asset the caller asks for. Raises InvalidField for an id that is none."""
        self._assets.require(what)
        if not is_id(asset_id):
            raise InvalidField("id", "an asset's id has 64 hexadecimal digits in lower case, as UploadAsset gives it")
        return owner_of(current())

    @contextmanager
    def _memory(self, size: int) -> Iterator[None]:
        """Counts an upload's bytes within the block. Raises Exhausted where too many are on their way; one alone always may."""
        if self._in_flight and self._in_flight + size > _IN_FLIGHT:
            raise Exhausted("too many uploads are on their way", _RETRY)
        self._in_flight += size
        try:
            yield
        finally:
            self._in_flight -= size

    async def _info(self, messages: AsyncIterator[pb.UploadAssetRequest]) -> pb.UploadAssetInfo:
        first = await self._next(messages)
        if first is None or first.WhichOneof("content") != "info":
            raise InvalidField("info", "the first message of an upload has its info")
        most = self._limits.max_bytes
        if not 1 <= first.info.size <= most:
            raise InvalidField("info.size", f"{first.info.size} is not in 1 to {most}: announce the file's size in bytes")
        if first.info.sha256 and not is_id(first.info.sha256):
            raise InvalidField("info.sha256", "a SHA-256 has 64 hexadecimal digits in lower case")
        return first.info

    async def _data(self, info: pb.UploadAssetInfo, messages: AsyncIterator[pb.UploadAssetRequest]) -> bytes:
        data = bytearray()
        while (message := await self._next(messages)) is not None:
            if message.WhichOneof("content") == "info":
                raise InvalidField("info", "only the first message of an upload has one")
            if len(data) + len(message.chunk) > info.size:
                raise InvalidField("info.size", f"it announces {info.size} bytes, and more came")
            data += message.chunk
        if len(data) < info.size:
            raise InvalidField("info.size", f"it announces {info.size} bytes, and {len(data)} came")
        return bytes(data)

    async def _next(self, messages: AsyncIterator[pb.UploadAssetRequest]) -> pb.UploadAssetRequest | None:
        """The next message, None at the end."""
        try:
            async with asyncio.timeout(self._idle):
                return await anext(messages, None)
        except TimeoutError:
            raise DeadlineExpired(f"nothing of the upload came for {self._idle:g} seconds") from None

    def _check_picture(self, info: pb.UploadAssetInfo, data: bytes) -> None:
        if info.sha256:
            _check_digest(data, info.sha256)
        media_type = images.check_header(data, self._limits, "chunk")
        if info.media_type and info.media_type != media_type:
            raise InvalidField("info.media_type", f"the file is {media_type}, not what was announced")


def _message(asset: Asset) -> pb.Asset:
    expires = Timestamp()
    expires.FromMilliseconds(round(asset.expires * 1000))
    return pb.Asset(id=asset.id, media_type=asset.media_type, size=asset.size, sha256=asset.id, expire_time=expires)


def _check_digest(data: bytes, announced: str) -> None:
    if hashlib.sha256(data).hexdigest() != announced:
        raise InvalidField("info.sha256", "the bytes that came have another SHA-256 than was announced")
