"""Uploads and downloads of images stored on a server, verified by SHA-256 at both ends."""

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
from grpc import aio
from img2img.v1 import asset_pb2

from img2img_client.async_calls import AsyncStop, converted_errors, finish_async
from img2img_client.calls import Metadata, finish
from img2img_client.errors import Damaged, Img2ImgError, Unavailable
from img2img_client.options import ADDRESS_SCHEMES, read_file
from img2img_client.responses import parse_asset, parse_error, parse_request_id
from img2img_client.values import Asset, ImageInput

CHUNK_BYTES = 512 * 1024
"""Size of an upload message; 256 KiB to 1 MiB measured fastest."""


class Upload:
    """A file to upload in chunks.

    The file is read once for its size and SHA-256, and again for each attempt, always in chunks. Raises TypeError if it is not an
    image, ValueError for an address, OSError if the file cannot be read.
    """

    def __init__(self, image: ImageInput) -> None:
        if isinstance(image, Asset) or (isinstance(image, str) and image.startswith(ADDRESS_SCHEMES)):
            raise ValueError("an asset or an address cannot be uploaded: pass a path, a file's bytes or a Pillow image")
        self._source = Path(image) if isinstance(image, str | os.PathLike) else read_file(image)
        self._failure: OSError | None = None
        with self._open() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._info = asset_pb2.UploadAssetInfo(size=file.seek(0, os.SEEK_END), sha256=digest)

    def attempt(
        self,
        method: "grpc.StreamUnaryMultiCallable[asset_pb2.UploadAssetRequest, asset_pb2.UploadAssetResponse]",
        seconds: float | None,
        metadata: Metadata,
    ) -> tuple[Asset, str]:
        """Sends the file. Raises OSError if it cannot be read completely."""
        self._failure = None
        try:
            response, request_id = finish(method.future(self._messages(), timeout=seconds, metadata=metadata))
        except Img2ImgError as error:
            raise self._cause(error) from error.__cause__
        return parse_asset(response.asset), request_id

    async def attempt_async(
        self,
        method: "aio.StreamUnaryMultiCallable[asset_pb2.UploadAssetRequest, asset_pb2.UploadAssetResponse]",
        stop: AsyncStop,
        seconds: float | None,
        metadata: Metadata,
    ) -> tuple[Asset, str]:
        """The same on an event loop."""
        self._failure = None
        try:
            response, request_id = await finish_async(method(self._messages_async(), timeout=seconds, metadata=metadata), stop)
        except Img2ImgError as error:
            if error.status == "INTERNAL" and not error.reason:
                # grpc.aio reports this if the server ends the call while a message is in flight; the reason is lost.
                error = Unavailable("the server ended the upload early", status="UNAVAILABLE")
            raise self._cause(error) from error.__cause__
        return parse_asset(response.asset), request_id

    def _cause(self, error: Img2ImgError) -> Exception:
        """The OSError that cut the file short, if any, since it caused the server's error."""
        return error if self._failure is None else self._failure

    async def _messages_async(self) -> AsyncIterator[asset_pb2.UploadAssetRequest]:
        messages = self._messages()
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            yield message

    def _messages(self) -> Iterator[asset_pb2.UploadAssetRequest]:
        """Yields the messages. Runs on a gRPC thread, which only logs exceptions, so an OSError is kept for the caller."""
        yield asset_pb2.UploadAssetRequest(info=self._info)
        try:
            with self._open() as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield asset_pb2.UploadAssetRequest(chunk=chunk)
        except OSError as error:
            self._failure = error  # The file ends early, so the server refuses it.

    def _open(self) -> "io.BufferedReader | io.BytesIO":
        return io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source.open("rb")


def download(
    method: "grpc.UnaryStreamMultiCallable[asset_pb2.GetAssetRequest, asset_pb2.GetAssetResponse]",
    asset_id: str,
    seconds: float | None,
    metadata: Metadata,
) -> tuple[bytes, str]:
    """Downloads an image's file. Returns it and the request id.

    Raises Damaged if the file's size or SHA-256 differs from the announced one.
    """
    call = method(asset_pb2.GetAssetRequest(id=asset_id), timeout=seconds, metadata=metadata)
    received = _Download(asset_id)
    try:
        for message in call:
            if received.take(message):
                break
        request_id = parse_request_id(call.initial_metadata())
    except grpc.RpcError as error:
        raise parse_error(error) from error
    finally:
        call.cancel()
    return received.file(request_id), request_id


async def download_async(
    method: "aio.UnaryStreamMultiCallable[asset_pb2.GetAssetRequest, asset_pb2.GetAssetResponse]",
    asset_id: str,
    stop: AsyncStop,
    seconds: float | None,
    metadata: Metadata,
) -> tuple[bytes, str]:
    """The same on an event loop."""
    call = method(asset_pb2.GetAssetRequest(id=asset_id), timeout=seconds, metadata=metadata)
    received = _Download(asset_id)
    with converted_errors(stop):
        try:
            async for message in call:
                if received.take(message):
                    break
            request_id = parse_request_id(await call.initial_metadata())
        finally:
            call.cancel()
    return received.file(request_id), request_id


class _Download:
    """The received part of a file."""

    def __init__(self, asset_id: str) -> None:
        self._asset_id = asset_id
        self._announced = asset_pb2.Asset()
        self._data = bytearray()

    def take(self, message: asset_pb2.GetAssetResponse) -> bool:
        """Adds a message. Returns whether the file exceeds its announced size: an endless stream must not fill the memory."""
        if message.HasField("asset"):
            self._announced = message.asset
        self._data += message.chunk
        return len(self._data) > self._announced.size

    def file(self, request_id: str) -> bytes:
        """The complete file. Raises Damaged if its SHA-256 differs from the announced one."""
        if hashlib.sha256(self._data).hexdigest() != self._announced.sha256:
            raise Damaged(f"asset {self._asset_id} arrived damaged", status="DATA_LOSS", request_id=request_id)
        return bytes(self._data)
