"""Assets in transforms: as sources, and in place of results; each client has its own."""

import errno
import os
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
from img2img_server.access import tokens
from img2img_server.assets.files import LocalAssetFiles
from img2img_server.config import AssetSettings
from messages import failure, png, request
from PIL import Image
from running import RunningServer, running, store

UNKNOWN = "0" * 64
PNG = png()


def test_an_asset_is_a_source(assets: AssetServiceStub, transforms: ImageToImageServiceStub, pipeline: FakePipeline) -> None:
    asset_id = upload(assets, png((32, 48))).id
    transforms.Transform(request(image=images_pb.ImageSource(asset_id=asset_id)))
    transforms.Transform(request(image=images_pb.ImageSource(uri=f"asset:{asset_id}")))
    assert [state.request.image.size for state in pipeline.prepared] == [(32, 48)] * 2
    for source in (images_pb.ImageSource(asset_id=UNKNOWN), images_pb.ImageSource(uri=f"asset:{UNKNOWN}")):
        code, details = failure(lambda source=source: transforms.Transform(request(image=source)))  # type: ignore[misc]
        assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "ASSET_NOT_FOUND")


def test_damaged_asset_is_refused_as_a_source(
    assets: AssetServiceStub, transforms: ImageToImageServiceStub, folder: Path
) -> None:
    asset_id = upload(assets, PNG).id
    files_of(folder)[0].write_bytes(png((8, 8)))
    code, details = failure(lambda: transforms.Transform(request(image=images_pb.ImageSource(asset_id=asset_id))))
    assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED")
    assert upload(assets, PNG).id == asset_id
    transforms.Transform(request(image=images_pb.ImageSource(asset_id=asset_id)))


@pytest.mark.parametrize("format_", [images_pb.OUTPUT_FORMAT_PNG, images_pb.OUTPUT_FORMAT_JPEG, images_pb.OUTPUT_FORMAT_WEBP])
def test_results_are_stored_as_assets_on_request(
    assets: AssetServiceStub, transforms: ImageToImageServiceStub, server: RunningServer,
    format_: images_pb.OutputFormat.ValueType,
) -> None:  # fmt: skip
    sent = transforms.Transform(request(output=images_pb.OutputOptions(format=format_)))
    asked = request(image_count=2, output=images_pb.OutputOptions(format=format_, as_asset=True))
    answer = transforms.Transform(asked)
    *_, last = transforms.TransformStream(images_pb.TransformStreamRequest(request=asked))
    for response in (answer, last.completed):
        assert [image.WhichOneof("content") for image in response.images] == ["asset_id"] * 2
        assert [image.seed for image in response.images] == [5, 6]
    described, chunks = download(assets, answer.images[0].asset_id)
    assert b"".join(chunks) == sent.images[0].data, "what is kept is what would have been sent"
    assert described.media_type == f"image/{images_pb.OutputFormat.Name(format_)[14:].lower()}"
    assert server.server._assets.stats.reserved == 0


def test_results_beyond_the_asset_quota_are_refused_before_generation(
    assets: AssetServiceStub, transforms: ImageToImageServiceStub, pipeline: FakePipeline, server: RunningServer
) -> None:
    for _ in range(7):
        upload(assets, noise((840, 840)))
    asked = request(image=images_pb.ImageSource(data=png((1024, 1024))), output=images_pb.OutputOptions(as_asset=True))
    code, details = failure(lambda: transforms.Transform(asked))
    assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ASSET_QUOTA_FULL")
    assert pipeline.prepared == []
    code, details = failure(lambda: upload(assets, noise((900, 900))))
    assert (code, details["reason"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ASSET_QUOTA_FULL")
    assert server.server._assets.stats.reserved == 0


def test_full_disk_fails_only_requests_that_store_assets(
    assets: AssetServiceStub, transforms: ImageToImageServiceStub, server: RunningServer, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(self: LocalAssetFiles, owner: str, asset_id: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(LocalAssetFiles, "write", full)
        for call in (
            lambda: upload(assets, PNG),
            lambda: transforms.Transform(request(output=images_pb.OutputOptions(as_asset=True))),
        ):
            code, details = failure(call)
            assert (code, details["reason"]) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED")
            assert str(folder) not in str(details["message"])
        transforms.Transform(request())
    assert server.server._assets.stats.reserved == 0
    transforms.Transform(request(output=images_pb.OutputOptions(as_asset=True)))


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (333, 77), (512, 512)])
def test_quota_reserved_for_a_result_is_sufficient(format_: images.WriteFormat, size: tuple[int, int]) -> None:
    from img2img_server.api.transform import _BYTES_PER_FILE, _BYTES_PER_PIXEL

    image = Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3))
    assert len(images.encode(image, format_, 100)) <= size[0] * size[1] * _BYTES_PER_PIXEL + _BYTES_PER_FILE


def test_other_fields_are_checked_before_the_source_is_read(transforms: ImageToImageServiceStub, server: RunningServer) -> None:
    source = images_pb.ImageSource(asset_id=UNKNOWN)
    wrong: dict[str, dict[str, object]] = {
        "strength": {"strength": 2.0},
        "width": {"width": 1},
        "height": {"height": 10**9},
        "output.quality": {"output": images_pb.OutputOptions(quality=101)},
    }
    for field, fields in wrong.items():
        code, details = failure(lambda fields=fields: transforms.Transform(request(image=source, **fields)))  # type: ignore[misc]
        assert (code, details["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_tokens_cannot_use_each_others_assets(pipeline: FakePipeline, tmp_path: Path) -> None:
    path, secrets = tmp_path / "tokens.toml", {}
    with tokens.editing(path) as known:
        for name in ("alice", "bob"):
            secrets[name] = tokens.make_secret()
            known[name] = tokens.Token(name, tokens.digest(secrets[name]))
    settings = AssetSettings(url=str(tmp_path / "assets"))
    with (
        running(lambda: store(m=pipeline), assets=settings, tokens=path) as server,
        grpc.insecure_channel(f"localhost:{server.port}") as channel,
    ):
        assets, transforms = AssetServiceStub(channel), ImageToImageServiceStub(channel)
        alice, bob = ((("authorization", f"Bearer {secrets[name]}"),) for name in ("alice", "bob"))
        asset_id = assets.UploadAsset(iter(messages(PNG)), metadata=alice).asset.id
        source = request(image=images_pb.ImageSource(asset_id=asset_id), output=images_pb.OutputOptions(as_asset=True))
        for call in (
            lambda: list(assets.GetAsset(pb.GetAssetRequest(id=asset_id), metadata=bob)),
            lambda: assets.DeleteAsset(pb.DeleteAssetRequest(id=asset_id), metadata=bob),
            lambda: transforms.Transform(source, metadata=bob),
        ):
            code, details = failure(call)
            assert (code, details["reason"]) == (grpc.StatusCode.NOT_FOUND, "ASSET_NOT_FOUND")
        result = transforms.Transform(source, metadata=alice).images[0].asset_id
        assert len(list(assets.GetAsset(pb.GetAssetRequest(id=result), metadata=alice))) == 2
        with pytest.raises(grpc.RpcError):
            list(assets.GetAsset(pb.GetAssetRequest(id=result), metadata=bob))
        assert failure(lambda: list(assets.GetAsset(pb.GetAssetRequest(id=result))))[0] == grpc.StatusCode.UNAUTHENTICATED
