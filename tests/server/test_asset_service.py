"""Assets over a real channel: uploads are checked while they come, and results can be kept in place of being sent."""

import asyncio
import hashlib
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from asset_calls import download, messages, noise, upload
from assets_store import files_of
from fakes import FakePipeline
from img2img.v1 import asset_pb2 as pb
from img2img.v1 import image_to_image_pb2 as images_pb
from img2img.v1.asset_pb2_grpc import AssetServiceStub
from img2img.v1.image_to_image_pb2_grpc import ImageToImageServiceStub
from img2img_server import images
from img2img_server.api import assets as asset_service
from img2img_server.config import AssetSettings
from messages import failure, png, request
from PIL import Image
from running import RunningServer, running, store

UNKNOWN = "0" * 64


def test_uploaded_assets_are_returned_in_chunks(assets: AssetServiceStub) -> None:
    data = noise()
    assert len(data) > 2**20
    before = time.time()
    asset = upload(assets, data, media_type="image/png", sha256=hashlib.sha256(data).hexdigest())
    assert (asset.id, asset.sha256) == (hashlib.sha256(data).hexdigest(),) * 2
    assert (asset.media_type, asset.size) == ("image/png", len(data))
    assert before <= asset.expire_time.ToMicroseconds() / 1e6 - AssetSettings().max_age <= time.time() + 1
    described, chunks = download(assets, asset.id)
    assert (described.id, described.size, described.media_type) == (asset.id, len(data), "image/png")
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= 256 * 2**10
    assets.DeleteAsset(pb.DeleteAssetRequest(id=asset.id))
    for call in (lambda: download(assets, asset.id), lambda: assets.DeleteAsset(pb.DeleteAssetRequest(id=asset.id))):
        code, details = failure(call)
        assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "ASSET_NOT_FOUND")


@pytest.mark.parametrize("format_", images.READ_FORMATS)
def test_every_readable_format_can_be_stored(assets: AssetServiceStub, format_: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "teal").save(file, format_)
    asset = upload(assets, file.getvalue())
    assert asset.media_type == f"image/{format_.lower()}"
    assert download(assets, asset.id)[0].media_type == asset.media_type


PNG = png()
BAD: dict[str, tuple[list[pb.UploadAssetRequest], str]] = {
    "nothing": ([], "info"),
    "a chunk first": ([pb.UploadAssetRequest(chunk=PNG)], "info"),
    "an empty message first": ([pb.UploadAssetRequest()], "info"),
    "info twice": ([*messages(PNG)[:1], *messages(PNG)], "info"),
    "no size": (messages(PNG, size=0), "info.size"),
    "a negative size": (messages(PNG, size=-1), "info.size"),
    "too large a size": (messages(bytes(3 * 2**20 + 1)), "info.size"),
    "fewer bytes than announced": (messages(PNG, size=len(PNG) + 1), "info.size"),
    "more bytes than announced": (messages(PNG, size=len(PNG) - 1), "info.size"),
    "info alone": (messages(PNG)[:1], "info.size"),
    "another digest": (messages(PNG, sha256=UNKNOWN), "info.sha256"),
    "no digest": (messages(PNG, sha256="ABC"), "info.sha256"),
    "another media type": (messages(PNG, media_type="image/jpeg"), "info.media_type"),
    "no image": (messages(b"hello, world"), "chunk"),
    "a torn header": (messages(PNG[:20]), "chunk"),
    "too many pixels": (messages(png((8000, 4001))), "chunk"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_upload_names_its_field_and_stores_nothing(
    assets: AssetServiceStub, server: RunningServer, folder: Path, name: str
) -> None:
    sent, field = BAD[name]
    code, details = failure(lambda: assets.UploadAsset(iter(sent)))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert files_of(folder) == []
    stats = server.server._assets.stats
    assert (stats.count, stats.bytes, stats.reserved) == (0, 0, 0)


def test_upload_larger_than_declared_is_aborted_at_once(assets: AssetServiceStub) -> None:
    endless = itertools.chain(messages(PNG)[:1], itertools.repeat(pb.UploadAssetRequest(chunk=bytes(50_000))))
    code, details = failure(lambda: assets.UploadAsset(endless, timeout=60))
    assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "info.size")


@pytest.mark.parametrize("asset_id", ["", "x", "../../../etc/passwd", "A" * 64, UNKNOWN + "0", "0" * 63 + "\n"])
def test_malformed_asset_id_is_refused(assets: AssetServiceStub, transforms: ImageToImageServiceStub, asset_id: str) -> None:
    calls: dict[str, list[Callable[[], object]]] = {
        "id": [
            lambda: download(assets, asset_id),
            lambda: assets.DeleteAsset(pb.DeleteAssetRequest(id=asset_id)),
        ],
        "image.asset_id": [lambda: transforms.Transform(request(image=images_pb.ImageSource(asset_id=asset_id)))],
        "image.uri": [lambda: transforms.Transform(request(image=images_pb.ImageSource(uri=f"asset:{asset_id}")))],
    }
    for field, several in calls.items():
        for call in several:
            code, details = failure(call)
            assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_without_a_store_assets_are_not_supported_and_the_setting_is_named(pipeline: FakePipeline) -> None:
    with (
        running(lambda: store(m=pipeline), assets=AssetSettings(url="none")) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        assets, transforms = AssetServiceStub(channel), ImageToImageServiceStub(channel)
        for call in (
            lambda: upload(assets, PNG),
            lambda: download(assets, UNKNOWN),
            lambda: assets.DeleteAsset(pb.DeleteAssetRequest(id=UNKNOWN)),
            lambda: transforms.Transform(request(image=images_pb.ImageSource(asset_id=UNKNOWN))),
            lambda: transforms.Transform(request(output=images_pb.OutputOptions(as_asset=True))),
        ):
            code, details = failure(call)
            assert (code, details["reason"]) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_SUPPORTED")
            assert "'assets'" in str(details["message"])


def test_stalled_upload_is_aborted_and_frees_its_memory(
    pipeline: FakePipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asset_service.AssetService.__init__, "__defaults__", (0.2,))
    over = threading.Event()

    def slowly() -> Iterator[pb.UploadAssetRequest]:
        yield from messages(PNG)[:1]
        over.wait(60)

    with (
        running(lambda: store(m=pipeline), assets=AssetSettings(url=str(folder))) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        try:
            code, details = failure(lambda: AssetServiceStub(channel).UploadAsset(slowly(), timeout=60))
        finally:
            over.set()
        assert (code, details["reason"]) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED")
        assert server.server._assets.stats.reserved == 0


def test_disconnecting_mid_call_releases_memory(
    assets: AssetServiceStub, server: RunningServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, given_back, over = threading.Event(), threading.Event(), threading.Event()
    data = asset_service.AssetService._data

    async def watched(self: asset_service.AssetService, info: pb.UploadAssetInfo, rest: object) -> bytes:
        held.set()
        try:
            return await data(self, info, rest)  # type: ignore[arg-type]
        finally:
            asyncio.get_running_loop().call_soon(given_back.set)

    monkeypatch.setattr(asset_service.AssetService, "_data", watched)

    def slowly() -> Iterator[pb.UploadAssetRequest]:
        yield from messages(PNG)[:1]
        over.wait(60)

    call = assets.UploadAsset.future(slowly())
    assert held.wait(120)
    assert server.server._assets.stats.reserved == len(PNG)
    call.cancel()
    over.set()
    assert given_back.wait(120)
    assert server.server._assets.stats.reserved == 0
    assert files_of(folder) == []


def test_memory_of_concurrent_uploads_is_bounded(
    server: RunningServer, assets: AssetServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.server._memory, "budget", 1000)
    begun, go = threading.Event(), threading.Event()

    def slowly() -> Iterator[pb.UploadAssetRequest]:
        yield messages(PNG, size=len(PNG))[0]
        begun.set()
        go.wait(60)
        yield from messages(PNG)[1:]

    first = assets.UploadAsset.future(slowly())
    assert begun.wait(120)
    refused = None
    for _ in range(100):  # until the server, too, has seen the first one's info
        big = noise((40, 40))
        try:
            upload(assets, big)
        except grpc.RpcError as error:
            refused = error
            break
    go.set()
    assert isinstance(refused, grpc.Call)
    assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert first.result(60).asset.size == len(PNG)
    upload(assets, noise((40, 40)))
