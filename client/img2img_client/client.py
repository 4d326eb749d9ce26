"""The client: one channel, and a method for each thing that a server does. `async_client` is the same for asyncio."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import grpc
from img2img.v1 import asset_pb2, asset_pb2_grpc, image_to_image_pb2_grpc, model_pb2, model_pb2_grpc

from img2img_client import assets
from img2img_client.calls import Caller, require_open
from img2img_client.channel import Access
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
from img2img_client.responses import parse_error, parse_model, parse_result
from img2img_client.retry import RetryPolicy, Stop
from img2img_client.story import Story
from img2img_client.stream import TransformStream
from img2img_client.values import DEFAULT_TARGET, Asset, ModelInfo, ModelReference, TransformResult


class Client:
    """Talks to one server, or to several. Connects at the first call; safe to share between threads; `close()` it or use it as
    a context.

    `target` is "host:port", with "http://" before it or not, or any name gRPC resolves ("unix:/path"). A list of addresses, or
    "dns:///name:port" for all the addresses of a name, are several servers: calls are spread over those whose health is good, and
    what one of them cannot do another does. `balance` overrules whether there are several. `timeout` is in seconds and holds for
    each call that names none, all its attempts together; None waits forever. Every failed call raises an Img2ImgError.

    "https://host:port", `ca`, `certificate` or `credentials` mean TLS. `ca` is the file (PEM) of who signed the server's
    certificate, by default the system's roots; `certificate` and `key` are the files of the client's own, where the server wants
    one; `credentials` are what grpc.ssl_channel_credentials and its relatives make, in place of those. `server_name` is whom the
    servers' certificate is for, where that is not the target's name. `token` goes with every call: over TLS or to this machine
    only, unless `allow_insecure_token` says that something else encrypts it.

    `retries` says how calls are tried again that a server could not take or that never reached one; None does not. All are
    but `unload_model` and `delete_asset`, whose second attempt would find the first one's work done. A transform changes nothing
    on the server but what it keeps with `as_asset`, until that expires, and a caller sees one answer: so it is tried again, too,
    with its seed or with another drawn one. `dns_service_config` lets an operator say in DNS how gRPC balances and tries again.
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
        found, line, calling = plan(target, balance, access, timeout, retries, dns_service_config)
        self.target = found.shown
        self._channel = line.open()
        self._caller = Caller(calling)
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
        """Transforms one image and returns when it is done. The options, all optional, are TransformOptions' fields.

        `request_id` names the call in the server's log, in place of a name that the server makes. OSError where the image
        cannot be read; TypeError and ValueError for options that cannot be sent.
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
        story = Story(build_request(image, options))
        procedure, method = "ImageToImageService/TransformStream", self._images.TransformStream
        begun = self._caller.begin(procedure, timeout, request_id=request_id)
        return TransformStream(
            lambda request, seconds: method(request, timeout=seconds, metadata=begun.metadata),
            story,
            begun,
            Stop(self._caller.stop),
        )

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every model of the server's store, in order of id."""
        request = model_pb2.ListModelsRequest()
        response, _ = self._caller.unary("ModelService/ListModels", self._models.ListModels, request, timeout)
        return tuple(parse_model(model) for model in response.models)

    def model(self, model_id: str, *, timeout: float | None = None) -> ModelInfo:
        """One model. ModelNotFound where the server has none of that id."""
        request = model_pb2.GetModelRequest(id=model_id)
        response, _ = self._caller.unary("ModelService/GetModel", self._models.GetModel, request, timeout)
        return parse_model(response.model)

    def load_model(self, model: str | ModelReference, *, timeout: float | None = None) -> ModelInfo:
        """Returns when the model is ready, which may take minutes. A str is its id on the server; a ModelReference with a
        `repo_id` may name one that the server is to fetch first, where it does that."""
        request = load_request(model)
        response, _ = self._caller.unary("ModelService/LoadModel", self._models.LoadModel, request, timeout)
        return parse_model(response.model)

    def unload_model(self, model_id: str, *, timeout: float | None = None) -> int:
        """Returns, when the last request that runs on the model has ended, the bytes that the server's memory shrank by."""
        request = model_pb2.UnloadModelRequest(id=model_id)
        method = self._models.UnloadModel
        return self._caller.unary("ModelService/UnloadModel", method, request, timeout, safe=False)[0].freed_bytes

    def upload(self, image: ImageInput, *, timeout: float | None = None) -> Asset:
        """Has the server keep an image, to be the source of transforms as often as one likes: a path, a file's bytes or a
        Pillow image. The same content is the same Asset."""
        attempt = partial(assets.Upload(image).attempt, self._assets.UploadAsset)
        return self._caller.run("AssetService/UploadAsset", attempt, timeout)[0]

    def download(self, asset: Asset | str, *, timeout: float | None = None) -> bytes:
        """The file of an image that the server keeps, by its Asset or its id. AssetNotFound where it has none, or no more."""
        attempt = partial(assets.download, self._assets.GetAsset, asset_id(asset))
        return self._caller.run("AssetService/GetAsset", attempt, timeout)[0]

    def delete_asset(self, asset: Asset | str, *, timeout: float | None = None) -> None:
        """Has the server forget an image. AssetNotFound where it has none."""
        request = asset_pb2.DeleteAssetRequest(id=asset_id(asset))
        self._caller.unary("AssetService/DeleteAsset", self._assets.DeleteAsset, request, timeout, safe=False)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Returns when the server's health turns to SERVING, at once if it is. DeadlineExceeded after `timeout` seconds.

        There need not be a server yet: the channel tries again until there is one.
        """
        require_open(self._caller.stop)
        watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(HEALTH_WATCH)
        calling = self._caller.calling
        call = watch(HEALTH_REQUEST, timeout=calling.seconds(timeout), metadata=calling.metadata, wait_for_ready=True)
        try:
            for status in call:
                if status == HEALTH_SERVING:
                    return
        except grpc.RpcError as error:
            raise not_ready(parse_error(error), self.target) from error
        finally:
            call.cancel()
        raise watch_ended(self.target)

    def close(self) -> None:
        """Closes the channel; what still runs on it, or waits to be tried again, is cancelled."""
        self._caller.stop.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
