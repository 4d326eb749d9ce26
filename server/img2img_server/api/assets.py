"""AssetService: the gRPC API of the asset store."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from img2img.v1 import asset_pb2 as pb
from img2img.v1 import asset_pb2_grpc

from img2img_server import images
from img2img_server.assets.files import is_id, owner_of
from img2img_server.assets.index import Asset
from img2img_server.assets.store import AssetStore
from img2img_server.codecs.jobs import Inspect
from img2img_server.codecs.pool import Codecs
from img2img_server.errors import DeadlineExpired, InvalidField
from img2img_server.support.call import current

_CHUNK = 256 * 2**10
"""Bytes of one download message."""
_IDLE = 60.0
"""Seconds without a message after which an upload is cancelled, since it holds memory and a part of the quota."""
_LONGEST = 600.0
"""Maximum seconds of an upload, also if it keeps sending small messages."""


class AssetService(asset_pb2_grpc.AssetServiceServicer):
    """UploadAsset, GetAsset and DeleteAsset. `limits` apply to uploaded images, which `codecs` inspect; `idle` is in seconds."""

    def __init__(self, assets: AssetStore, limits: images.ImageLimits, codecs: Codecs, idle: float = _IDLE) -> None:
        self._assets = assets
        self._limits = limits
        self._codecs = codecs
        self._idle = idle

    async def UploadAsset(self, request_iterator: AsyncIterator[pb.UploadAssetRequest], context: Any) -> pb.UploadAssetResponse:
        """Receives, checks and stores an image, then responds."""
        self._assets.require("UploadAsset")
        owner = owner_of(current())
        try:
            async with asyncio.timeout(_LONGEST):
                info = await self._info(request_iterator)
                held = info.sha256 != "" and self._assets.holds(owner, info.sha256)
                with self._codecs.memory.hold(current(), info.size):
                    async with self._assets.reserve(owner, 0 if held else info.size) as reserved:
                        data = await self._data(info, request_iterator)
                        await self._check_image(info, data)
                        asset = await self._assets.put(owner, data, reserved)
        except TimeoutError:
            raise DeadlineExpired(f"the upload exceeded the maximum duration of {_LONGEST:g} seconds") from None
        return pb.UploadAssetResponse(asset=_message(asset))

    async def GetAsset(self, request: pb.GetAssetRequest, context: Any) -> AsyncGenerator[pb.GetAssetResponse, None]:
        """Sends an image in chunks, no faster than the client reads."""
        owner = self._checked(request.id, "GetAsset")
        yield pb.GetAssetResponse(asset=_message(await self._assets.find(owner, request.id)))
        async for block in self._assets.stream(owner, request.id):
            for start in range(0, len(block), _CHUNK):
                yield pb.GetAssetResponse(chunk=block[start : start + _CHUNK])

    async def DeleteAsset(self, request: pb.DeleteAssetRequest, context: Any) -> pb.DeleteAssetResponse:
        """Deletes one of the caller's images."""
        owner = self._checked(request.id, "DeleteAsset")
        await self._assets.delete(owner, request.id)
        return pb.DeleteAssetResponse()

    def _checked(self, asset_id: str, what: str) -> str:
        """The owner of the caller's assets. Raises NotSupported, naming `what`, or InvalidField for a malformed id."""
        self._assets.require(what)
        if not is_id(asset_id):
            raise InvalidField("id", "an asset id must be 64 lowercase hexadecimal digits, as returned by UploadAsset")
        return owner_of(current())

    async def _info(self, messages: AsyncIterator[pb.UploadAssetRequest]) -> pb.UploadAssetInfo:
        first = await self._next(messages)
        if first is None or first.WhichOneof("content") != "info":
            raise InvalidField("info", "the first message of an upload must contain info")
        most = self._limits.max_bytes
        if not 1 <= first.info.size <= most:
            raise InvalidField("info.size", f"size {first.info.size} is not in 1 to {most}: set it to the file's size in bytes")
        if first.info.sha256 and not is_id(first.info.sha256):
            raise InvalidField("info.sha256", "a SHA-256 must be 64 lowercase hexadecimal digits")
        return first.info

    async def _data(self, info: pb.UploadAssetInfo, messages: AsyncIterator[pb.UploadAssetRequest]) -> bytes:
        data = bytearray()
        while (message := await self._next(messages)) is not None:
            if message.WhichOneof("content") == "info":
                raise InvalidField("info", "only the first message of an upload may contain info")
            if len(data) + len(message.chunk) > info.size:
                raise InvalidField("info.size", f"info.size is {info.size} bytes, but more bytes were received")
            data += message.chunk
        if len(data) < info.size:
            raise InvalidField("info.size", f"info.size is {info.size} bytes, but {len(data)} bytes were received")
        return bytes(data)

    async def _next(self, messages: AsyncIterator[pb.UploadAssetRequest]) -> pb.UploadAssetRequest | None:
        """The next message, None at the end."""
        try:
            async with asyncio.timeout(self._idle):
                return await anext(messages, None)
        except TimeoutError:
            raise DeadlineExpired(f"no message of the upload was received for {self._idle:g} seconds") from None

    async def _check_image(self, info: pb.UploadAssetInfo, data: bytes) -> None:
        found = await self._codecs.inspect(data, Inspect("chunk", self._limits))
        if info.sha256 and info.sha256 != found.sha256:
            raise InvalidField("info.sha256", "the received bytes do not match the SHA-256 in info")
        if info.media_type and info.media_type != found.media_type:
            raise InvalidField("info.media_type", f"the file is {found.media_type}, which does not match the media type in info")


def _message(asset: Asset) -> pb.Asset:
    expires = Timestamp()
    expires.FromMilliseconds(round(asset.expires * 1000))
    return pb.Asset(id=asset.id, media_type=asset.media_type, size=asset.size, sha256=asset.id, expire_time=expires)
