"""Where source images come from: a request's bytes, its asset, or an address that may be read."""

import asyncio
from typing import TYPE_CHECKING

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server import images
from img2img_server.assets.files import is_id, owner_of
from img2img_server.assets.store import AssetStore
from img2img_server.config import SourceSettings
from img2img_server.errors import InvalidField
from img2img_server.sources.rooted import path_of, read_below
from img2img_server.support.call import current
from img2img_server.support.fair_queue import FairThreads

if TYPE_CHECKING:
    from img2img_server.sources.fetching import Fetcher

_THREADS = 4
"""For files and data: addresses. Clients share them fairly."""
_ASSET = "image.asset_id"
_URI = "image.uri"


class Sources:
    """Reads source images. `limits` bound their size."""

    def __init__(self, settings: SourceSettings, assets: AssetStore, limits: images.ImageLimits) -> None:
        self.assets = assets
        self._settings = settings
        self._limits = limits
        self._fetcher: Fetcher | None = None
        self._threads = FairThreads(_THREADS, "img2img-sources")

    async def open(self) -> None:
        """Gets ready to read addresses. Raises OSError where the folder of file: addresses is none."""
        root = self._settings.file_root
        if root is not None and not await asyncio.to_thread(root.is_dir):
            raise NotADirectoryError(f"file_root: '{root}' is no folder")
        if self._settings.allow_http:
            from img2img_server.sources import fetching

            self._fetcher = fetching.Fetcher(self._settings.http_seconds, self._limits.max_bytes)

    async def close(self) -> None:
        """Ends what is left of connections."""
        if self._fetcher is not None:
            await self._fetcher.close()
        self._threads.close()

    def check(self, source: pb.ImageSource) -> None:
        """Raises InvalidField, or NotSupported, where it can be seen without reading anything that the source cannot be read."""
        kind = source.WhichOneof("source")
        if kind is None:
            raise InvalidField("image", "a source picture is required")
        if kind == "asset_id":
            self._check_asset(_ASSET, source.asset_id)
        if kind == "uri":
            self._check_uri(source.uri)

    async def read(self, source: pb.ImageSource) -> tuple[str, bytes]:
        """The file, and the name of the field that it came from. Raises InvalidField, AssetNotFound or StorageFailed."""
        kind = source.WhichOneof("source")
        if kind == "asset_id":
            return _ASSET, await self._asset(_ASSET, source.asset_id)
        if kind == "uri":
            return _URI, await self._read_uri(source.uri)
        return "image.data", source.data

    def _check_asset(self, field: str, asset_id: str) -> None:
        self.assets.require(field)
        if not is_id(asset_id):
            raise InvalidField(field, "an asset's id has 64 hexadecimal digits in lower case, as UploadAsset gives it")

    def _check_uri(self, uri: str) -> None:
        scheme = _scheme_of(uri)
        if scheme == "asset":
            self._check_asset(_URI, _after_scheme(uri))
        elif scheme in ("http", "https") and self._fetcher is not None:
            self._fetcher.check(uri)
        elif scheme == "file" and self._settings.file_root is not None:
            path_of(uri, _URI)
        elif scheme != "data":
            raise InvalidField(
                _URI, f"only {', '.join(self._schemes())} addresses are read by this server; or send the picture as data"
            )

    def _schemes(self) -> list[str]:
        web = ["http:", "https:"] if self._fetcher is not None else []
        return [
            "data:",
            *(["asset:"] if self.assets.kept else []),
            *web,
            *(["file:"] if self._settings.file_root is not None else []),
        ]

    async def _read_uri(self, uri: str) -> bytes:
        scheme = _scheme_of(uri)
        if scheme == "asset":
            return await self._asset(_URI, _after_scheme(uri))
        if scheme == "file":
            root, path = self._settings.file_root, path_of(uri, _URI)
            assert root is not None, "check refuses files where there is none"
            return await self._threads.run(read_below, root, path, self._limits.max_bytes, _URI)
        if scheme in ("http", "https"):
            assert self._fetcher is not None, "check refuses addresses where there is none"
            return await self._fetcher.fetch(uri)
        return await self._threads.run(images.decode_data_uri, uri, self._limits, _URI)

    async def _asset(self, field: str, asset_id: str) -> bytes:
        data = await self.assets.read(owner_of(current()), asset_id, self._limits.max_bytes)
        if data is None:
            raise InvalidField(field, f"the asset has more than {self._limits.max_bytes} bytes, the most of a source")
        return data


def _scheme_of(uri: str) -> str:
    scheme, colon, _ = uri.partition(":")
    return scheme.lower() if colon else ""


def _after_scheme(uri: str) -> str:
    return uri.partition(":")[2]
