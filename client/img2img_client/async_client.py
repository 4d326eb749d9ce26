"""The client for asyncio: what `client.Client` does, without a thread that waits."""

# ruff: noqa: ASYNC109 - a time-out is a deadline here, which the server is told

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

import grpc
from img2img.v1 import asset_pb2, asset_pb2_grpc, image_to_image_pb2_grpc, model_pb2, model_pb2_grpc

from img2img_client import assets
from img2img_client.async_calls import AsyncCaller, AsyncStop, answering
from img2img_client.async_stream import AsyncTransformStream
from img2img_client.calls import require_open
from img2img_client.channel import Access
from img2img_client.errors import Img2ImgError
from img2img_client.options import ImageInput, TransformOptions, build_request
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
from img2img_client.story import Story
from img2img_client.values import DEFAULT_TARGET, Asset, ModelInfo, ModelReference, TransformResult

if TYPE_CHECKING:
    from grpc import aio


class AsyncClient:
    """Talks to one server, or to several, as a Client does: the same arguments, methods, retries and errors.

    Connects at the first call, and belongs to the event loop of that one (RuntimeError in another). Use it as an asynchronous
    context, or `close()` it. Tasks may share it. A task that is cancelled while it waits cancels its call at the server.
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
        found, self._line, calling = plan(target, balance, access, timeout, retries, dns_service_config)
        self.target = found.shown
        self._caller = AsyncCaller(calling)

    async def transform(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> TransformResult:
        """Transforms one image and returns when it is done, as Client.transform does. The image is read on another thread."""
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
            lambda: Story(build_request(image, options)),
            lambda request, seconds: self._open.images.TransformStream(request, timeout=seconds, metadata=begun.metadata),
            begun,
            AsyncStop(self._caller.stop),
        )

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every model of the server's store, in order of id."""
        request = model_pb2.ListModelsRequest()
        response, _ = await self._caller.unary("ModelService/ListModels", self._open.models.ListModels, request, timeout)
        return tuple(parse_model(model) for model in response.models)

    async def model(self, model_id: str, *, timeout: float | None = None) -> ModelInfo:
        """One model. ModelNotFound where the server has none of that id."""
        request = model_pb2.GetModelRequest(id=model_id)
        response, _ = await self._caller.unary("ModelService/GetModel", self._open.models.GetModel, request, timeout)
        return parse_model(response.model)

    async def load_model(self, model: str | ModelReference, *, timeout: float | None = None) -> ModelInfo:
        """Returns when the model is ready, which may take minutes; see Client.load_model."""
        request = load_request(model)
        response, _ = await self._caller.unary("ModelService/LoadModel", self._open.models.LoadModel, request, timeout)
        return parse_model(response.model)

    async def unload_model(self, model_id: str, *, timeout: float | None = None) -> int:
        """Returns, when the last request that runs on the model has ended, the bytes that the server's memory shrank by."""
        request, method = model_pb2.UnloadModelRequest(id=model_id), self._open.models.UnloadModel
        response, _ = await self._caller.unary("ModelService/UnloadModel", method, request, timeout, safe=False)
        return response.freed_bytes

    async def upload(self, image: ImageInput, *, timeout: float | None = None) -> Asset:
        """Has the server keep an image: a path, a file's bytes or a Pillow image. The same content is the same Asset."""
        upload = await asyncio.to_thread(assets.Upload, image)
        attempt = partial(upload.attempt_async, self._open.assets.UploadAsset, self._caller.stop)
        return (await self._caller.run("AssetService/UploadAsset", attempt, timeout))[0]

    async def download(self, asset: Asset | str, *, timeout: float | None = None) -> bytes:
        """The file of an image that the server keeps, by its Asset or its id. AssetNotFound where it has none, or no more."""
        attempt = partial(assets.download_async, self._open.assets.GetAsset, asset_id(asset), self._caller.stop)
        return (await self._caller.run("AssetService/GetAsset", attempt, timeout))[0]

    async def delete_asset(self, asset: Asset | str, *, timeout: float | None = None) -> None:
        """Has the server forget an image. AssetNotFound where it has none."""
        request = asset_pb2.DeleteAssetRequest(id=asset_id(asset))
        await self._caller.unary("AssetService/DeleteAsset", self._open.assets.DeleteAsset, request, timeout, safe=False)

    async def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns when the server's health turns to SERVING, at once if it is. DeadlineExceeded after `timeout` seconds."""
        watch: aio.UnaryStreamMultiCallable[bytes, bytes] = self._open.channel.unary_stream(HEALTH_WATCH)
        calling = self._caller.calling
        call = watch(HEALTH_REQUEST, timeout=calling.seconds(timeout), metadata=calling.metadata, wait_for_ready=True)
        try:
            with answering(self._caller.stop):
                async for status in call:
                    if status == HEALTH_SERVING:
                        return
        except Img2ImgError as failure:
            raise not_ready(failure, self.target) from failure.__cause__
        finally:
            call.cancel()
        raise watch_ended(self.target)

    async def close(self) -> None:
        """Closes the channel; what still runs on it, or waits to be tried again, is cancelled."""
        self._caller.stop.set()
        if "_opened" in vars(self):
            await self._opened.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def _open(self) -> "_Opened":
        require_open(self._caller.stop)  # gRPC would crash where a stub is made of a closed channel.
        if self._opened.loop is not asyncio.get_running_loop():
            raise RuntimeError("this AsyncClient belongs to another event loop: make one for each")
        return self._opened

    @cached_property
    def _opened(self) -> "_Opened":
        """Made by the first call, as gRPC ties a channel to the event loop that runs then."""
        channel = self._line.open_async()
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
