"""Uploads and downloads of assets: data round-trips unchanged, or the call fails."""

import hashlib
import io
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import FakeServer, FakeService, image_bytes
from img2img.v1 import image_to_image_pb2 as messages
from img2img_client import (
    Asset,
    AssetNotFound,
    Client,
    Completed,
    Damaged,
    ImageInput,
    InvalidRequest,
    TransformedImage,
)
from img2img_client.assets import CHUNK_BYTES
from PIL import Image

LARGE = random.Random(0).randbytes(3 * CHUNK_BYTES + 17)


@pytest.fixture(params=[Client, Blocking])
def client(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Any]:
    with request.param(server.target, timeout=120, retries=None) as made:
        yield made


@pytest.mark.parametrize("data", [b"x", LARGE[:CHUNK_BYTES], LARGE])
@pytest.mark.parametrize("kind", ["path", "str", "bytes"])
def test_uploaded_file_downloads_unchanged(client: Client, server: FakeServer, tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    images: dict[str, ImageInput] = {"path": path, "str": str(path), "bytes": data}
    asset = client.upload(images[kind])
    digest = hashlib.sha256(data).hexdigest()
    assert asset == Asset(digest, "image/png", len(data), digest, datetime.fromtimestamp(1_800_000_000, UTC))
    assert server.assets.files == {digest: data}
    assert max(server.assets.chunks) <= CHUNK_BYTES
    assert client.download(asset) == client.download(digest) == client.download(asset.uri) == data


def test_a_pillow_image_is_uploaded_without_loss(client: Client, server: FakeServer) -> None:
    image = Image.effect_noise((9, 5), 80).convert("RGB")
    asset = client.upload(image)
    with Image.open(io.BytesIO(server.assets.files[asset.id])) as arrived:
        assert (arrived.format, arrived.tobytes()) == ("PNG", image.tobytes())


def test_only_files_are_uploaded(client: Client, server: FakeServer, tmp_path: Path) -> None:
    for address in ("asset:1f", "https://example.org/a.png", "data:image/png;base64,AAAA", Asset("1f", "", 1, "1f")):
        with pytest.raises(ValueError, match="cannot be uploaded"):
            client.upload(address)
    with pytest.raises(FileNotFoundError):
        client.upload(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="image must be a path"):
        client.upload(3)  # type: ignore[arg-type]
    assert server.assets.metadata == []


def test_upload_of_a_file_that_changes_is_not_stored(
    client: Client, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = tmp_path / "photo.png", 64 * 2**20  # far more than gRPC sends before the server reads
    path.write_bytes(b"x" * size)
    meet = server.assets.meet

    def change(context: Any, begun: bool = False) -> None:
        path.write_bytes(bytes(size))
        meet(context, begun)

    monkeypatch.setattr(server.assets, "meet", change)
    with pytest.raises(InvalidRequest, match="info"):
        client.upload(path)
    assert server.assets.files == {}


def test_read_errors_during_upload_are_reported(
    client: Client, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(LARGE)
    opened = Path.open
    opens: list[Path] = []

    class Torn(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error", str(path))
            return super().read(size)

    def tear(self: Path, *arguments: Any, **more: Any) -> Any:
        if self != path:
            return opened(self, *arguments, **more)
        opens.append(self)
        return Torn(LARGE) if len(opens) > 1 else opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", tear)
    with pytest.raises(OSError, match="Input/output error"):
        client.upload(path)
    assert server.assets.files == {}


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"y" + data[1:], lambda data: b""],
    ids=["short", "long", "changed", "nothing"],
)
def test_a_damaged_download_is_an_error(client: Client, server: FakeServer, damage: Any) -> None:
    asset = client.upload(LARGE)
    server.assets.damage = damage
    with pytest.raises(Damaged, match="damaged") as caught:
        client.download(asset)
    assert (caught.value.status, caught.value.request_id) == ("DATA_LOSS", "made")


def test_missing_assets_are_not_found(client: Client, server: FakeServer) -> None:
    asset = client.upload(b"file")
    client.delete_asset(asset)
    assert server.assets.files == {}
    for call in (client.download, client.delete_asset):
        with pytest.raises(AssetNotFound, match=asset.id):
            call(asset)


def test_image_stored_as_an_asset_has_its_id_and_no_data(client: Client, service: FakeService) -> None:
    service.script[-1].completed.images[0].asset_id = "kept"
    *_, completed = client.transform_stream(b"file", as_asset=True)
    assert isinstance(completed, Completed)
    for result in (client.transform(b"file", as_asset=True), completed.result):
        (image,) = result.images
        assert (image.asset_id, image.data, image.width) == ("kept", b"", 4)
        with pytest.raises(ValueError, match=r"client\.download\('kept'\)"):
            _ = result.image
        with pytest.raises(ValueError, match=r"client\.download\('kept'\)"):
            result.save("nowhere.png")
    assert all(request.output == messages.OutputOptions(as_asset=True) for request in service.requests)
    assert not Path("nowhere.png").exists()


def test_inline_results_are_not_assets(client: Client) -> None:
    assert client.transform(b"file").images == (TransformedImage(image_bytes(), "png", 4, 2, 7, None),)
