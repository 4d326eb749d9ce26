"""Bounds of an image file's structure: bombs are refused by a look, and what encoders write is not."""

import io
import struct
from contextlib import suppress
from typing import Any

import pytest
from img2img_server import images
from img2img_server.codecs import structure
from img2img_server.codecs.jobs import Inspect, LoadImage
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule, decode
from img2img_server.images.essentials import UPRIGHT, read_orientation
from PIL import Image, ImageCms, TiffImagePlugin
from soak_parts import image_bombs
from soak_parts.image_bombs import BOMBS, LARGEST


def nothing_more(size: int, seconds: float) -> None:
    """Grants everything."""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_a_decoder_sees_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOMBS[name]()
    assert len(data) <= LARGEST
    monkeypatch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("a decoder saw it"))
    for job in (LoadImage("image.data", ImageLimits(), SizeRule(), 8, "PNG"), Inspect("image.data", ImageLimits())):
        with pytest.raises(InvalidField, match=r"image\.data: the image cannot be decoded: it"):
            job.run(data, nothing_more)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if options.get("save_all"):
        options["append_images"] = [image.rotate(angle) for angle in range(10)]
    image.copy().save(file, file_format, **options)  # a copy, as some formats leave their settings behind
    return file.getvalue()


RGB = Image.effect_noise((900, 700), 90).convert("RGB")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRAMES: dict[str, Any] = {"save_all": True}
EXIF = Image.Exif()
EXIF[270] = "a" * 60_000
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {}),
    "JPEG, progressive": ("JPEG", {"progressive": True, "quality": 100, "subsampling": 0}),
    "JPEG with restarts": ("JPEG", {"restart_marker_blocks": 1}),
    "JPEG with metadata": ("JPEG", {"exif": EXIF, "icc_profile": PROFILE * 500, "comment": b"c" * 60_000}),
    "MPO": ("MPO", FRAMES),
    "PNG": ("PNG", {"compress_level": 0, "icc_profile": PROFILE, "exif": EXIF}),
    "PNG, animated": ("PNG", FRAMES),
    "GIF, animated": ("GIF", {**FRAMES, "comment": b"c" * 60_000}),
    "WebP, animated": ("WEBP", FRAMES),
    "WebP": ("WEBP", {"exif": EXIF, "icc_profile": PROFILE}),
    "TIFF": ("TIFF", {}),
    "TIFF, compressed": ("TIFF", {"compression": "tiff_lzw", "icc_profile": PROFILE}),
    "TIFF, big": ("TIFF", {"big_tiff": True}),
    "TIFF of pages": ("TIFF", FRAMES),
    "BMP": ("BMP", {}),
}


@pytest.mark.parametrize("name", REAL)
def test_files_written_by_encoders_pass(name: str) -> None:
    file_format, options = REAL[name]
    data = saved(RGB, file_format, **options)
    structure.check(data, "image.data")
    structure.check(data + bytes(200_000), "image.data")  # padding behind the end is no structure


def test_tiff_with_one_strip_per_row_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 1)
    structure.check(saved(Image.new("L", (10, 30_000)), "TIFF"), "image.data")


@pytest.mark.parametrize("name", REAL)
def test_damaged_files_pass_or_are_refused_without_crashing(name: str) -> None:
    """Cut anywhere, or with a byte changed: it is never more than refused."""
    file_format, options = REAL[name]
    data = saved(RGB.resize((40, 30)), file_format, **options)
    for at in range(0, len(data), max(1, len(data) // 200)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]):
            with suppress(InvalidField):
                structure.check(damaged, "image.data")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("start", [2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_tiff_directory_beyond_the_file_is_damage(order: str, start: int) -> None:
    """64 bits of an offset are more than `struct` takes: found by `scripts/fuzz`."""
    tiff = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HHHQ", 43, 8, 0, start) + bytes(40)
    structure.check(tiff, "image.data")
    assert read_orientation(tiff) == UPRIGHT
    with pytest.raises(InvalidField, match=r"image\.data"):
        decode(tiff, ImageLimits(), "image.data")


@pytest.mark.parametrize("count", [structure.MAX_SCANS - 12, structure.MAX_SCANS + 1])
def test_progressive_jpeg_scans_are_limited(count: int) -> None:
    """The scans of a real progressive JPEG, ten or fewer of gray, and so many more."""
    data = image_bombs.jpeg_scans(count, (64, 64))
    if count > structure.MAX_SCANS:
        with pytest.raises(InvalidField, match="more than 100 scans"):
            structure.check(data, "image.data")
    else:
        structure.check(data, "image.data")
        assert images.decode(data, ImageLimits(), "image.data").size == (64, 64)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": EXIF}, FRAMES])
def test_webp_size_is_checked_before_decoding(options: dict[str, Any]) -> None:
    assert structure.webp_pixels(saved(RGB, "WEBP", **options)) == RGB.width * RGB.height
    assert structure.webp_pixels(saved(RGB, "PNG")) == 0
    with pytest.raises(InvalidField, match="the maximum is 1000"):
        Inspect("f", ImageLimits(max_source_pixels=1000)).run(saved(RGB, "WEBP", **options), nothing_more)


def test_scans_in_thumbnails_or_trailing_data_are_not_counted() -> None:
    thumbnail = b"\xff\xda\x00\x02" * 1000
    data = image_bombs.jpeg_segments(0xE1, 1, b"Exif\0\0" + thumbnail)
    structure.check(data + image_bombs.jpeg_scans(200, (8, 8)), "image.data")
