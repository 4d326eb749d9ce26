"""The client for asyncio, with the methods of `client.Client`."""

# ruff: noqa: ASYNC109 - a timeout here is a deadline that is sent to the server

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc
from img2img.v1 import asset_pb2, asset_pb2_grpc, image_to_image_pb2_grpc, model_pb2, model_pb2_grpc

from img2img_client import assets
from img2img_client.async_batch import run_async
from img2img_client.async_calls import AsyncCaller, AsyncStop, converted_errors
from img2img_client.async_stream import AsyncTransformStream
from img2img_client.batch import BatchItem
from img2img_client.calls import require_open
from img2img_client.channel import Access
from img2img_client.errors import Img2ImgError
from img2img_client.options import TransformOptions, build_request
from img2img_client.requests import (
    HEALTH_REQUEST,
    HEALTH_SERVING,
    HEALTH_WATCH,
    asset_id,
    load_request,
    not_ready,
    plan,
    watch_ended,
)
from img2img_client.responses import parse_model, parse_result
from img2img_client.retry import RetryPolicy
from img2img_client.stream_state import StreamState
from img2img_client.values import (
    DEFAULT_TARGET,
    Asset,
    BatchResult,
    ImageInput,
    LoraInfo,
    ModelInfo,
    ModelReference,
    TransformResult,
)

if TYPE_CHECKING:
    from grpc import aio


class AsyncClient:
    """A client of one or several servers for asyncio, with the arguments, methods, retries and errors of Client.

    Connects at the first call and is bound to that call's event loop (RuntimeError in another). Use it as an async context
    manager, or `close()` it. Tasks may share it. Cancelling a task that waits for a call cancels the call on the server.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        balance: bool | None = None,
        timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        ca: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        server_name: str | None = None,
        allow_insecure_token: bool = False,
        retries: RetryPolicy | None = RetryPolicy(),  # noqa: B008 - a frozen value
        dns_service_config: bool = False,
    ) -> None:
        access = Access(token, ca, certificate, key, credentials, allow_insecure_token, server_name)
        found, self._channels, settings = plan(target, balance, access, timeout, retries, dns_service_config)
        self.target = found.shown
        self._caller = AsyncCaller(settings)

    async def transform(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> TransformResult:
        """Transforms one image and returns the result, like Client.transform. The image is read on another thread."""
        request = await asyncio.to_thread(build_request, image, options)
        procedure, method = "ImageToImageService/Transform", self._open.images.Transform
        return parse_result(*await self._caller.unary(procedure, method, request, timeout, request_id=request_id))

    def transform_stream(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> AsyncTransformStream:
        """Transforms one image and yields its events. An error in the image is raised with the first event.

        async with client.transform_stream("photo.jpg") as events:
            async for event in events: ...   # leaving early cancels the call
        """
        begun = self._caller.begin("ImageToImageService/TransformStream", timeout, request_id=request_id)
        return AsyncTransformStream(
            lambda: StreamState(build_request(image, options)),
            lambda request, seconds: self._open.images.TransformStream(request, timeout=seconds, metadata=begun.metadata),
            begun,
            AsyncStop(self._caller.stop),
        )

    def transform_batch(
        self, items: Iterable[BatchItem], *, timeout: float | None = None, request_id: str | None = None
    ) -> AsyncIterator[BatchResult]:
        """Transforms many images in one call and yields their results as they finish, like Client.transform_batch.

        async for outcome in client.transform_batch((path, {"prompt": "in winter"}) for path in paths): ...
        """
        begun = self._caller.begin("ImageToImageService/TransformBatch", timeout, request_id=request_id)
        return run_async(self._open.images, items, begun, AsyncStop(self._caller.stop))

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The server's models, ordered by id."""
        request = model_pb2.ListModelsRequest()
        response, _ = await self._caller.unary("ModelService/ListModels", self._open.models.ListModels, request, timeout)
        return tuple(parse_model(model) for model in response.models)

    async def loras(self, *, timeout: float | None = None) -> tuple[LoraInfo, ...]:
        """The LoRAs that requests may name, ordered by id."""
        request = model_pb2.ListLorasRequest()
        response, _ = await self._caller.unary("ModelService/ListLoras", self._open.models.ListLoras, request, timeout)
        return tuple(LoraInfo(lora.id, lora.size_bytes) for lora in response.loras)

    async def model(self, model_id: str, *, timeout: float | None = None) -> ModelInfo:
        """One model. Raises ModelNotFound if the server has no model with this id."""
        request = model_pb2.GetModelRequest(id=model_id)
        response, _ = await self._caller.unary("ModelService/GetModel", self._open.models.GetModel, request, timeout)
        return parse_model(response.model)

    async def load_model(self, model: str | ModelReference, *, timeout: float | None = None) -> ModelInfo:
        """Loads a model and returns when it is ready, which may take minutes; see Client.load_model."""
        request = load_request(model)
        response, _ = await self._caller.unary("ModelService/LoadModel", self._open.models.LoadModel, request, timeout)
        return parse_model(response.model)

    async def unload_model(self, model_id: str, *, timeout: float | None = None) -> int:
        """Unloads a model after its running requests have finished. Returns the bytes of freed memory."""
        request, method = model_pb2.UnloadModelRequest(id=model_id), self._open.models.UnloadModel
        response, _ = await self._caller.unary("ModelService/UnloadModel", method, request, timeout, safe=False)
        return response.freed_bytes

    async def upload(self, image: ImageInput, *, timeout: float | None = None) -> Asset:
        """Stores an image (a path, a file's bytes or a Pillow image) on the server. Idempotent: same content, same Asset."""
        upload = await asyncio.to_thread(assets.Upload, image)
        attempt = partial(upload.attempt_async, self._open.assets.UploadAsset, self._caller.stop)
        return (await self._caller.run("AssetService/UploadAsset", attempt, timeout))[0]

    async def download(self, asset: Asset | str, *, timeout: float | None = None) -> bytes:
        """Downloads the file of a stored image by its Asset or id. Raises AssetNotFound if it does not exist or has expired."""
        attempt = partial(assets.download_async, self._open.assets.GetAsset, asset_id(asset), self._caller.stop)
        return (await self._caller.run("AssetService/GetAsset", attempt, timeout))[0]

    async def delete_asset(self, asset: Asset | str, *, timeout: float | None = None) -> None:
        """Deletes a stored image. Raises AssetNotFound if it does not exist."""
        request = asset_pb2.DeleteAssetRequest(id=asset_id(asset))
        await self._caller.unary("AssetService/DeleteAsset", self._open.assets.DeleteAsset, request, timeout, safe=False)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the server's health is SERVING. Raises DeadlineExceeded after `timeout` seconds."""
        try:
            async with aclosing(self.watch_health(timeout=timeout)) as changes:
                async for serving in changes:
                    if serving:
                        return
        except Img2ImgError as failure:
            raise not_ready(failure, self.target) from failure.__cause__

    async def watch_health(self, *, timeout: float | None = None) -> AsyncGenerator[bool, None]:
        """Yields whether the server's health is SERVING, now and after each change, like Client.watch_health."""
        watch: aio.UnaryStreamMultiCallable[bytes, bytes] = self._open.channel.unary_stream(HEALTH_WATCH)
        settings = self._caller.settings
        call = watch(HEALTH_REQUEST, timeout=settings.seconds(timeout), metadata=settings.metadata, wait_for_ready=True)
        try:
            with converted_errors(self._caller.stop):
                async for status in call:
                    yield status == HEALTH_SERVING
        finally:
            call.cancel()
        raise watch_ended(self.target)

    async def close(self) -> None:
        """Closes the channel; cancels running calls and pending retries."""
        self._caller.stop.set()
        if "_opened" in vars(self):
            await self._opened.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def _open(self) -> "_Opened":
        require_open(self._caller.stop.is_set)  # gRPC crashes if a stub is created on a closed channel.
        if self._opened.loop is not asyncio.get_running_loop():
            raise RuntimeError("this AsyncClient is bound to another event loop: create one client per event loop")
        return self._opened

    @cached_property
    def _opened(self) -> "_Opened":
        """Created at the first call, since gRPC binds a channel to the running event loop."""
        channel = self._channels.open_async()
        return _Opened(
            asyncio.get_running_loop(),
            channel,
            image_to_image_pb2_grpc.ImageToImageServiceStub(channel),
            model_pb2_grpc.ModelServiceStub(channel),
            asset_pb2_grpc.AssetServiceStub(channel),
        )


@dataclass(frozen=True, slots=True)
class _Opened:
    loop: asyncio.AbstractEventLoop
    channel: "aio.Channel"
    images: "image_to_image_pb2_grpc.ImageToImageServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"
    assets: "asset_pb2_grpc.AssetServiceAsyncStub"
