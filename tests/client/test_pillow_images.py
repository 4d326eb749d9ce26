"""The server gets the same image from a Pillow image as from its file: upright, in the same colors; unsupported modes are
refused."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icc_profiles
import numpy as np
import pytest
from fake_image_service import FakeServer, FakeService
from img2img.v1 import image_to_image_pb2 as messages
from img2img_client import AsyncClient, Client, Completed, TransformWarning
from img2img_client.options import build_request, read_file
from img2img_server import images
from img2img_server.images import ImageLimits
from PIL import Image, ImageCms

ORIENTATION = 0x0112
SIZE = (24, 16)


def image() -> Image.Image:
    y, x = np.mgrid[0:16, 0:24]
    return Image.fromarray(np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], -1).astype(np.uint8))


def saved(source: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    source.save(file, file_format, **options)
    return file.getvalue()


def decoded(file: bytes) -> np.ndarray:
    return np.asarray(images.decode(file, ImageLimits(), "image.data"), int)


def same(file: bytes) -> bool:
    """Whether the file opened by Pillow arrives as the file itself does."""
    opened = Image.open(io.BytesIO(file))
    return bool((decoded(read_file(opened)) == decoded(file)).all())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_opened_photo_arrives_upright(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = saved(image(), file_format, exif=exif)
    assert same(file)
    assert decoded(file).shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))


def test_sending_a_photo_does_not_rotate_the_callers_image() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    opened = Image.open(io.BytesIO(saved(image(), "JPEG", exif=exif)))
    assert read_file(opened) == read_file(opened)
    assert (opened.size, opened.getexif()[ORIENTATION]) == (SIZE, 6)


@pytest.mark.parametrize(
    "body", [b"", b"II", b"II*\0\x08\0\0\0", b"Photoshop", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_malformed_exif_does_not_change_an_image(body: bytes) -> None:
    assert same(saved(image(), "PNG", exif=b"Exif\0\0" + body))


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image(), *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def premultiplied(mode: str) -> Image.Image:
    whole = image().convert("RGBA")
    whole.putalpha(200)
    return whole.convert("LA" if mode == "La" else "RGBA").convert(mode)


def shared(mode: str) -> np.ndarray:
    """The image with 200 of 255 in front of white."""
    front = np.asarray(image().convert("L").convert("RGB") if mode == "La" else image(), int)
    return front * 200 / 255 + 55


GRAY = np.asarray(image().convert("L"), int)
EXPECTED: dict[str, tuple[Callable[[], Image.Image], Callable[[], Any], int]] = {
    "1": (lambda: image().convert("1"), lambda: np.asarray(image().convert("1").convert("RGB"), int), 0),
    "L": (lambda: image().convert("L"), lambda: GRAY[..., None], 0),
    "LA": (lambda: premultiplied("La").convert("LA"), lambda: shared("La"), 2),
    "La": (lambda: premultiplied("La"), lambda: shared("La"), 2),
    "P": (lambda: image().quantize(), lambda: np.asarray(image().quantize().convert("RGB"), int), 0),
    "PA": (lambda: image().quantize().convert("PA"), lambda: np.asarray(image().quantize().convert("RGB"), int), 0),
    "RGB": (image, lambda: np.asarray(image(), int), 0),
    "RGBA": (lambda: premultiplied("RGBA"), lambda: shared("RGBA"), 2),
    "RGBa": (lambda: premultiplied("RGBa"), lambda: shared("RGBA"), 2),
    "RGBX": (lambda: image().convert("RGBX"), lambda: np.asarray(image(), int), 0),
    "CMYK": (lambda: image().convert("CMYK"), lambda: np.asarray(image(), int), 0),
    "YCbCr": (lambda: image().convert("YCbCr"), lambda: np.asarray(image(), int), 3),
    "HSV": (lambda: image().convert("HSV"), lambda: np.asarray(image().convert("HSV").convert("RGB"), int), 0),
    "LAB": (lab, lambda: np.asarray(image(), int), 40),
    "I of 8 bits": (lambda: Image.fromarray(GRAY.astype(np.int32)), lambda: GRAY[..., None], 1),
    "I of 16 bits": (lambda: Image.fromarray((GRAY * 257).astype(np.int32)), lambda: GRAY[..., None], 1),
    "F to 1": (lambda: Image.fromarray((GRAY / 255).astype(np.float32)), lambda: GRAY[..., None], 1),
    "F to 255": (lambda: Image.fromarray(GRAY.astype(np.float32)), lambda: GRAY[..., None], 1),
    "I;16": (lambda: Image.fromarray((GRAY * 257).astype(np.uint16)), lambda: GRAY[..., None], 1),
    "I;16B": (lambda: Image.fromarray((GRAY * 257).astype(">u2")), lambda: GRAY[..., None], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_every_image_mode_keeps_its_colors(name: str) -> None:
    make, expected, tolerance = EXPECTED[name]
    source = make()
    assert source.mode == name.split()[0]
    assert np.abs(decoded(read_file(source)) - expected()).max() <= tolerance


def test_unsupported_image_mode_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = image()
    monkeypatch.setattr(type(source), "mode", property(lambda _: "BGR;24"))
    with pytest.raises(ValueError, match=r"mode 'BGR;24' is not supported: convert it"):
        read_file(source)


@pytest.mark.parametrize(("mode", "profile"), [("RGB", "display_p3"), ("RGBA", "display_p3"), ("CMYK", "cmyk")])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_color_profile_is_sent_with_the_image(file_format: str, mode: str, profile: str) -> None:
    if (file_format, mode) in {("PNG", "CMYK"), ("JPEG", "RGBA")}:
        return
    data = getattr(icc_profiles, profile)()
    file = saved(Image.new("RGB", SIZE, (60, 200, 80)).convert(mode), file_format, icc_profile=data)
    assert same(file)
    assert np.abs(decoded(file)[0, 0] - (60, 200, 80)).max() > 3, "it says other colors"


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw"])
def test_a_tiff_is_not_compressed_with_loss_again(compression: str) -> None:
    assert same(saved(image().convert("CMYK"), "TIFF", compression=compression))


async def test_both_clients_send_the_same(client: Client, service: FakeService, server: FakeServer, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "phone.jpg"
    path.write_bytes(saved(image(), "JPEG", exif=exif))
    client.transform(Image.open(path), fit="native")
    client.transform(Image.open(path), fit=1024)
    async with AsyncClient(server.target, timeout=120) as other:
        await other.transform(Image.open(path), fit="native")
    first, second, third = service.requests
    assert first.image.data == second.image.data == third.image.data
    assert (decoded(first.image.data) == decoded(path.read_bytes())).all()
    assert first.fit.HasField("native_area")
    assert third.fit.HasField("native_area")
    assert second.fit.longest_side == 1024


def test_warnings_are_returned_with_the_result(client: Client, service: FakeService) -> None:
    assert client.transform(b"file").warnings == ()
    service.warnings = [messages.Warning(field="prompt", description="it was too long", code="PROMPT_TRUNCATED")]
    assert client.transform(b"file").warnings == (TransformWarning("prompt", "it was too long", "PROMPT_TRUNCATED"),)
    service.script[-1].completed.warnings.extend(service.warnings)
    *_, completed = client.transform_stream(b"file")
    assert isinstance(completed, Completed)
    assert [warning.code for warning in completed.result.warnings] == ["PROMPT_TRUNCATED"]


@pytest.mark.parametrize("fit", ["wide", 1.5, True, b"native"])
def test_a_fit_that_the_contract_cannot_express_is_refused(fit: Any) -> None:
    with pytest.raises(ValueError, match="fit must be 'native' or the longest side"):
        build_request(b"file", {"fit": fit})
