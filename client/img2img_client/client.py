"""The blocking client: one channel, and one method per procedure of the server. `async_client` is the same for asyncio."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import grpc
from img2img.v1 import asset_pb2, asset_pb2_grpc, image_to_image_pb2_grpc, model_pb2, model_pb2_grpc

from img2img_client import assets, batch
from img2img_client.batch import BatchItem
from img2img_client.calls import Caller, require_open
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
from img2img_client.responses import parse_error, parse_model, parse_result
from img2img_client.retry import RetryPolicy, Stop
from img2img_client.stream import TransformStream
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


class Client:
    """A client of one server or several. Connects at the first call; thread-safe; `close()` it or use it as a context manager.

    `target` is "host:port", optionally with "http://", or any name that gRPC resolves ("unix:/path"). A list of addresses, or
    "dns:///name:port" for all addresses of a name, means several servers: calls are balanced across healthy servers and retried
    on another one. `balance` overrides whether there are several. `timeout`, in seconds, is the default for calls without one,
    including all attempts; None waits forever. Every failed call raises an Img2ImgError.

    "https://host:port", `ca`, `certificate` or `credentials` enable TLS. `ca` is the CA file (PEM) of the server's certificate,
    by default the system's roots; `certificate` and `key` are the client's own files, if the server requires them; `credentials`,
    such as from grpc.ssl_channel_credentials, replace these files. `server_name` is the name in the servers' certificate, if it
    differs from the target's. `token` is sent with every call, over TLS or to this machine only, unless `allow_insecure_token`
    (the connection is encrypted otherwise).

    `retries` is the policy for calls that a server could not accept or that did not reach one; None disables retries. All calls
    except `unload_model` and `delete_asset` are retried (a second attempt of those would find the work of the first done). A
    transform is safe to retry: it changes nothing on the server except assets that expire. `dns_service_config` lets an operator
    set gRPC's balancing and retries in DNS.
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
        found, channels, settings = plan(target, balance, access, timeout, retries, dns_service_config)
        self.target = found.shown
        self._channel = channels.open()
        self._caller = Caller(settings)
        self._images = image_to_image_pb2_grpc.ImageToImageServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._assets = asset_pb2_grpc.AssetServiceStub(self._channel)

    def transform(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> TransformResult:
        """Transforms one image and returns the result. The options, all optional, are TransformOptions' fields.

        `request_id` identifies the call in the server's log (default: made by the server). Raises OSError if the image cannot be
        read; TypeError or ValueError for options that cannot be sent.
        """
        request = build_request(image, options)
        procedure = "ImageToImageService/Transform"
        return parse_result(*self._caller.unary(procedure, self._images.Transform, request, timeout, request_id=request_id))

    def transform_stream(
        self,
        image: ImageInput,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[TransformOptions],
    ) -> TransformStream:
        """Transforms one image and yields its events. Takes the arguments of `transform` and raises the same errors.

        with client.transform_stream("photo.jpg") as events:
            for event in events: ...   # leaving early cancels the call
        """
        state = StreamState(build_request(image, options))
        procedure, method = "ImageToImageService/TransformStream", self._images.TransformStream
        begun = self._caller.begin(procedure, timeout, request_id=request_id)
        return TransformStream(
            lambda request, seconds: method(request, timeout=seconds, metadata=begun.metadata),
            state,
            begun,
            Stop(self._caller.stop),
        )

    def transform_batch(
        self, items: Iterable[BatchItem], *, timeout: float | None = None, request_id: str | None = None
    ) -> Iterator[BatchResult]:
        """Transforms many images in one call and yields their results as they finish. `items` are (image, options) pairs:

        for outcome in client.transform_batch((path, {"prompt": "in winter"}) for path in paths):
            print(outcome.index, outcome.error or outcome.result)

        `items` is read on another thread, as fast as the server takes requests. A request that fails has its error in its
        BatchResult, and does not end the batch; requests without a result are sent again if the connection breaks. `timeout`, in
        seconds, is that of the whole batch. Closing the iterator cancels what has not finished.
        """
        begun = self._caller.begin("ImageToImageService/TransformBatch", timeout, request_id=request_id)
        return batch.run(self._images, items, begun, Stop(self._caller.stop))

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The server's models, ordered by id."""
        request = model_pb2.ListModelsRequest()
        response, _ = self._caller.unary("ModelService/ListModels", self._models.ListModels, request, timeout)
        return tuple(parse_model(model) for model in response.models)

    def loras(self, *, timeout: float | None = None) -> tuple[LoraInfo, ...]:
        """The LoRAs that requests may name, ordered by id."""
        request = model_pb2.ListLorasRequest()
        response, _ = self._caller.unary("ModelService/ListLoras", self._models.ListLoras, request, timeout)
        return tuple(LoraInfo(lora.id, lora.size_bytes) for lora in response.loras)

    def model(self, model_id: str, *, timeout: float | None = None) -> ModelInfo:
        """One model. Raises ModelNotFound if the server has no model with this id."""
        request = model_pb2.GetModelRequest(id=model_id)
        response, _ = self._caller.unary("ModelService/GetModel", self._models.GetModel, request, timeout)
        return parse_model(response.model)

    def load_model(self, model: str | ModelReference, *, timeout: float | None = None) -> ModelInfo:
        """Loads a model and returns when it is ready, which may take minutes. A str is its id on the server; a ModelReference
        with a `repo_id` may name a model that the server downloads first, if it allows that."""
        request = load_request(model)
        response, _ = self._caller.unary("ModelService/LoadModel", self._models.LoadModel, request, timeout)
        return parse_model(response.model)

    def unload_model(self, model_id: str, *, timeout: float | None = None) -> int:
        """Unloads a model after its running requests have finished. Returns the bytes of freed memory."""
        request = model_pb2.UnloadModelRequest(id=model_id)
        method = self._models.UnloadModel
        return self._caller.unary("ModelService/UnloadModel", method, request, timeout, safe=False)[0].freed_bytes

    def upload(self, image: ImageInput, *, timeout: float | None = None) -> Asset:
        """Stores an image (a path, a file's bytes or a Pillow image) on the server as a source for transforms. Idempotent: the
        same content is the same Asset."""
        attempt = partial(assets.Upload(image).attempt, self._assets.UploadAsset)
        return self._caller.run("AssetService/UploadAsset", attempt, timeout)[0]

    def download(self, asset: Asset | str, *, timeout: float | None = None) -> bytes:
        """Downloads the file of a stored image by its Asset or id. Raises AssetNotFound if it does not exist or has expired."""
        attempt = partial(assets.download, self._assets.GetAsset, asset_id(asset))
        return self._caller.run("AssetService/GetAsset", attempt, timeout)[0]

    def delete_asset(self, asset: Asset | str, *, timeout: float | None = None) -> None:
        """Deletes a stored image. Raises AssetNotFound if it does not exist."""
        request = asset_pb2.DeleteAssetRequest(id=asset_id(asset))
        self._caller.unary("AssetService/DeleteAsset", self._assets.DeleteAsset, request, timeout, safe=False)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the server's health is SERVING. Raises DeadlineExceeded after `timeout` seconds.

        The server need not be running yet: the channel keeps trying to connect.
        """
        try:
            with closing(self.watch_health(timeout=timeout)) as changes:
                any(changes)
        except Img2ImgError as failure:
            raise not_ready(failure, self.target) from failure.__cause__

    def watch_health(self, *, timeout: float | None = None) -> Generator[bool, None, None]:
        """Yields whether the server's health is SERVING, now and after each change, until the generator is closed.

        Connects first if the server is not running yet. Raises Unavailable if the connection breaks, DeadlineExceeded after
        `timeout` seconds. Source: grpc.health.v1.
        """
        require_open(self._caller.stop.is_set)
        watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(HEALTH_WATCH)
        settings = self._caller.settings
        call = watch(HEALTH_REQUEST, timeout=settings.seconds(timeout), metadata=settings.metadata, wait_for_ready=True)
        try:
            for status in call:
                yield status == HEALTH_SERVING
        except grpc.RpcError as error:
            raise parse_error(error) from error
        finally:
            call.cancel()
        raise watch_ended(self.target)

    def close(self) -> None:
        """Closes the channel; cancels running calls and pending retries."""
        self._caller.stop.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
