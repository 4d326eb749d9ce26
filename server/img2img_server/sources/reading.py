"""Reads a request's source image: inline bytes, an asset, or an allowed URI."""

import asyncio
import os
import re
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server import images
from img2img_server.assets.files import is_id, owner_of
from img2img_server.assets.store import AssetStore
from img2img_server.config import SourceSettings
from img2img_server.errors import InvalidField
from img2img_server.support.call import current
from img2img_server.support.fair_queue import FairThreads

if TYPE_CHECKING:
    from img2img_server.sources.fetching import Fetcher

_NONE = "file not found in the folder that this server reads files from"
"""The same error for missing, unreadable and outside files: callers must not learn which files exist elsewhere."""


_MOST_CHARACTERS = 3 * 4096 + 100
"""Maximum length of a "file:" URI: a path has at most 4096 bytes, each of which may be percent-encoded."""


def path_of(uri: str, field: str) -> Path:
    """The absolute path of a "file:" URI. Raises InvalidField, naming `field`, for a malformed URI."""
    if len(uri) > _MOST_CHARACTERS:
        raise InvalidField(field, f"the address has {len(uri)} characters, the maximum is {_MOST_CHARACTERS}")
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise InvalidField(field, "a file: URI must look like file:///folder/image.png") from None
    if parts.netloc not in ("", "localhost"):
        raise InvalidField(field, "the host of a file: URI must be empty or localhost")
    path = unquote(parts.path, errors="surrogateescape")
    if parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
        raise InvalidField(field, "a file: URI must look like file:///folder/image.png, with ?, # and % in names percent-encoded")
    return Path(path)


def read_below(root: Path, path: Path, most: int, field: str) -> bytes:
    """The bytes of a regular file below `root`. Follows links that stay below it. Blocks.

    Raises InvalidField, naming `field`, if there is no such file or it has more than `most` bytes.
    """
    try:
        base = root.resolve(strict=True)
        inner = path.resolve(strict=True).relative_to(base)
        with ExitStack() as opened:
            return _read(_open(base, inner, opened), most, field)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: circular links
        raise InvalidField(field, _NONE) from None


def _open(base: Path, inner: Path, opened: ExitStack) -> int:
    """A descriptor of the file. Opens folder by folder from the root without following links, which may have just appeared."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(base, flags | os.O_DIRECTORY)
    opened.callback(os.close, descriptor)
    for index, part in enumerate(inner.parts, 1):
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer.
        kind = os.O_NONBLOCK if index == len(inner.parts) else os.O_DIRECTORY
        descriptor = os.open(part, flags | kind, dir_fd=descriptor)
        opened.callback(os.close, descriptor)
    return descriptor


def _read(descriptor: int, most: int, field: str) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidField(field, _NONE)
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read(most + 1)  # not fstat's size: the file may be growing
    if len(data) > most:
        raise InvalidField(field, f"the file has more than {most} bytes, the maximum")
    return data


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15}):")
_MOST_SCHEME = 17
"""Maximum characters of a scheme with its colon. No more of an address is looked at, which may be a data: URI of megabytes."""
_FETCHED = ("http", "https")
_THREADS = 4
"""Threads that read files and data: URIs, shared fairly among clients."""


class Sources:
    """Reads source images of at most `limits`."""

    def __init__(self, settings: SourceSettings, assets: AssetStore, limits: images.ImageLimits) -> None:
        self.assets = assets
        self._settings = settings
        self._limits = limits
        self._fetcher: Fetcher | None = None
        self._threads = FairThreads(_THREADS, "img2img-sources")

    async def open(self) -> None:
        """Prepares to read URIs. Raises OSError if the `file_root` setting is not a folder."""
        root = self._settings.file_root
        if root is not None and not await asyncio.to_thread(root.is_dir):
            raise NotADirectoryError(f"file_root: '{root}' is not a folder")
        if self._settings.allow_http:
            from img2img_server.sources import fetching

            self._fetcher = fetching.Fetcher(self._settings.http_seconds, self._limits.max_bytes)

    async def close(self) -> None:
        """Closes connections and threads."""
        if self._fetcher is not None:
            await self._fetcher.close()
        self._threads.close()

    def check(self, source: pb.ImageSource, field: str = "image") -> None:
        """Checks the source in `field` of a request without reading it.

        Raises InvalidField, or NotSupported if the server cannot read such sources.
        """
        kind = source.WhichOneof("source")
        if kind is None:
            what = "a source image is required" if field == "image" else "the image is missing: set uri, asset_id or data"
            raise InvalidField(field, what)
        if kind == "asset_id":
            self._check_asset(f"{field}.asset_id", source.asset_id)
        if kind == "uri":
            self._check_uri(f"{field}.uri", source.uri)

    async def read(self, source: pb.ImageSource, field: str = "image") -> tuple[str, bytes]:
        """The full name of the source in `field` of a request, such as "image.uri", and the image file's bytes.

        Raises InvalidField, AssetNotFound or StorageFailed.
        """
        match source.WhichOneof("source"):
            case "asset_id":
                name = f"{field}.asset_id"
                return name, await self._asset(name, source.asset_id)
            case "uri":
                name = f"{field}.uri"
                return name, await self._read_uri(name, source.uri)
        return f"{field}.data", source.data

    def _check_asset(self, field: str, asset_id: str) -> None:
        self.assets.require(field)
        if not is_id(asset_id):
            raise InvalidField(field, "an asset id must be 64 lowercase hexadecimal digits, as returned by UploadAsset")

    def _check_uri(self, field: str, uri: str) -> None:
        scheme = _scheme_of(uri)
        if scheme == "asset":
            self._check_asset(field, _after_scheme(uri))
        elif scheme in _FETCHED and self._fetcher is not None:
            self._fetcher.check(uri, field)
        elif scheme == "file" and self._settings.file_root is not None:
            path_of(uri, field)
        elif scheme != "data":
            raise InvalidField(
                field, f"only {', '.join(self._schemes())} addresses are supported by this server; or send the image as data"
            )

    def _schemes(self) -> list[str]:
        web = ["http:", "https:"] if self._fetcher is not None else []
        return [
            "data:",
            *(["asset:"] if self.assets.kept else []),
            *web,
            *(["file:"] if self._settings.file_root is not None else []),
        ]

    async def _read_uri(self, field: str, uri: str) -> bytes:
        scheme = _scheme_of(uri)
        if scheme == "asset":
            return await self._asset(field, _after_scheme(uri))
        if scheme == "file":
            root, path = self._settings.file_root, path_of(uri, field)
            assert root is not None, "check refuses files without it"
            return await self._threads.run(read_below, root, path, self._limits.max_bytes, field)
        if scheme in _FETCHED:
            assert self._fetcher is not None, "check refuses addresses without it"
            return await self._fetcher.fetch(uri, field)
        return await self._threads.run(images.decode_data_uri, uri, self._limits, field)

    async def _asset(self, field: str, asset_id: str) -> bytes:
        data = await self.assets.read(owner_of(current()), asset_id, self._limits.max_bytes)
        if data is None:
            raise InvalidField(field, f"the asset has more than {self._limits.max_bytes} bytes, the maximum of a source")
        return data


def begins_as_address(data: bytes) -> bool:
    """Whether bytes are an address and not an image file, none of which begins like one."""
    return bool(_scheme_of(data[:_MOST_SCHEME].decode("latin-1")))


def is_fetched(source: pb.ImageSource) -> bool:
    """Whether a source is downloaded from the web."""
    return source.WhichOneof("source") == "uri" and _scheme_of(source.uri) in _FETCHED


def asset_of(source: pb.ImageSource) -> str:
    """The id of the asset that a source names, by its field or its address; empty if it names none."""
    if source.asset_id or _scheme_of(source.uri) != "asset":
        return source.asset_id
    return _after_scheme(source.uri)


def _scheme_of(uri: str) -> str:
    """The scheme of an address in lower case; empty if it has none."""
    found = _SCHEME.match(uri)
    return found[1].lower() if found else ""


def _after_scheme(uri: str) -> str:
    return uri.partition(":")[2]
