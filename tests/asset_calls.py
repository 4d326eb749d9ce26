"""Calls of AssetService for tests, images to send, and the bounds of the server that they are sent to."""

import io
import os

from img2img.v1 import asset_pb2 as pb
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img_server.images import ImageLimits
from PIL import Image

LIMITS = ImageLimits(max_bytes=3 * 2**20)
QUOTA = 16 * 2**20


def noise(size: tuple[int, int] = (800, 800)) -> bytes:
    """A PNG of well over a megabyte."""
    file = io.BytesIO()
    Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def messages(data: bytes, chunk: int = 100_000, **info: object) -> list[pb.UploadAssetRequest]:
    described = pb.UploadAssetInfo(**{"size": len(data), **info})  # type: ignore[arg-type]
    chunks = [pb.UploadAssetRequest(chunk=data[start : start + chunk]) for start in range(0, len(data), chunk)]
    return [pb.UploadAssetRequest(info=described), *chunks]


def upload(assets: AssetServiceStub, data: bytes, **info: object) -> pb.Asset:
    return assets.UploadAsset(iter(messages(data, **info))).asset  # type: ignore[arg-type]


def download(assets: AssetServiceStub, asset_id: str) -> tuple[pb.Asset, list[bytes]]:
    first, *rest = assets.GetAsset(pb.GetAssetRequest(id=asset_id))
    assert all(message.WhichOneof("content") == "chunk" for message in rest)
    return first.asset, [message.chunk for message in rest]
