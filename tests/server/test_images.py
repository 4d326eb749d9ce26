"""Every mode and format of image is decoded upright, in RGB; errors name the problem."""

import base64
import io
import itertools
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from img2img_server import images
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits, SizeRule
from PIL import Image, ImageCms

LIMITS = ImageLimits(max_bytes=200_000, max_source_pixels=100_000, max_pixels=4096)
ORIENTATION = 0x0112


def sample() -> Image.Image:
    """Left half red above green, right half blue above white: every turn and flip of it is another image."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12], pixels[8:, :12], pixels[:8, 12:], pixels[8:, 12:] = (200, 0, 0), (0, 200, 0), (0, 0, 200), (255, 255, 255)
    return Image.fromarray(pixels)


def gray() -> np.ndarray:
    return np.asarray(sample().convert("L"))


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(sample(), *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def transparent() -> Image.Image:
    image = sample().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(24) < 12, 255, 0).astype(np.uint8)[None].repeat(16, 0)))
    return image


def white_right() -> Image.Image:
    image = sample()
    image.paste("white", (12, 0, 24, 16))
    return image


# The saved image, the file format, the expected pixels, and their tolerance (0 to 255).
CASES: dict[str, tuple[Callable[[], Image.Image], str, Callable[[], Image.Image], int]] = {
    "RGB": (sample, "PNG", sample, 0),
    "1": (
        lambda: sample().convert("1", dither=Image.Dither.NONE),
        "PNG",
        lambda: sample().convert("1", dither=Image.Dither.NONE),
        0,
    ),
    "L": (lambda: sample().convert("L"), "PNG", lambda: sample().convert("L"), 0),
    "LA": (lambda: transparent().convert("LA"), "PNG", lambda: white_right().convert("L"), 0),
    "P": (lambda: sample().quantize(8), "PNG", sample, 4),
    "P transparent": (lambda: transparent().quantize(8), "PNG", white_right, 4),
    "RGBA": (transparent, "PNG", white_right, 0),
    "CMYK": (lambda: sample().convert("CMYK"), "TIFF", sample, 0),
    "CMYK JPEG": (lambda: sample().convert("CMYK"), "JPEG", sample, 60),
    "YCbCr": (lambda: sample().convert("YCbCr"), "TIFF", sample, 3),
    "LAB": (lab, "TIFF", sample, 30),  # 8-bit LAB itself is that coarse at full saturation
    "I;16": (lambda: Image.fromarray(gray().astype(np.uint16) * 257), "PNG", lambda: sample().convert("L"), 1),
    "I;16 TIFF": (lambda: Image.fromarray(gray().astype(np.uint16) * 257), "TIFF", lambda: sample().convert("L"), 1),
    "I": (lambda: Image.fromarray(gray().astype(np.int32) * 2**20), "TIFF", lambda: sample().convert("L"), 1),
    "F to 1": (lambda: Image.fromarray(gray().astype(np.float32) / 255), "TIFF", lambda: sample().convert("L"), 1),
    "F to 255": (lambda: Image.fromarray(gray().astype(np.float32)), "TIFF", lambda: sample().convert("L"), 1),
    "JPEG": (sample, "JPEG", sample, 60),
    "WebP": (sample, "WEBP", sample, 60),
    "GIF": (sample, "GIF", sample, 4),
    "BMP": (sample, "BMP", sample, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_becomes_upright_rgb_of_the_same_size(name: str) -> None:
    make, file_format, expected, tolerance = CASES[name]
    decoded = images.decode(saved(make(), file_format), LIMITS, "image.data")
    assert (decoded.mode, decoded.size) == ("RGB", (24, 16))
    difference = np.abs(np.asarray(decoded, int) - np.asarray(expected().convert("RGB"), int))
    # Lossy formats smear the borders of the quarters: look inside them.
    inner = (
        difference[2:6, 2:10].max(),
        difference[10:14, 2:10].max(),
        difference[2:6, 14:22].max(),
        difference[10:14, 14:22].max(),
    )
    assert max(inner) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_photo_is_decoded_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])  # fmt: skip
    image = sample()
    for turn in stored:
        image = image.transpose(turn)
    decoded = images.decode(saved(image, "PNG", exif=exif), LIMITS, "image.data")
    assert decoded.size == (24, 16)
    assert np.array_equal(np.asarray(decoded), np.asarray(sample()))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    second = Image.new("RGB", (24, 16), "black")
    data = saved(sample(), file_format, save_all=True, append_images=[second], duration=50)
    decoded = images.decode(data, LIMITS, "image.data")
    assert np.abs(np.asarray(decoded, int)[2:6, 2:10] - (200, 0, 0)).max() <= 60


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        images.decode(data, limits, "image.data")
    assert caught.value.field == "image.data"
    return caught.value


def test_files_other_than_images_are_refused() -> None:
    assert "empty" in str(refusal(b""))
    assert "supported format" in str(refusal(b"GIF it is not"))
    assert "supported format" in str(refusal(saved(sample(), "PPM"))), "a format that is not on the list is not tried"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(file_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = saved(noise, file_format)
    refusal(data[: len(data) // 2])


def test_a_file_of_too_many_bytes_is_refused() -> None:
    assert "200001 bytes" in str(refusal(b"x" * 200_001))


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    # A PNG whose header announces 40000 x 40000 pixels and that has none: decoding would fail in another way.
    header = b"\x89PNG\r\n\x1a\n"
    body = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    header += (13).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    empty = b"IDAT"
    header += (0).to_bytes(4, "big") + empty + zlib.crc32(empty).to_bytes(4, "big")
    assert "40000 x 40000 pixels" in str(refusal(header))


def test_a_data_uri_gives_its_bytes() -> None:
    data = saved(sample(), "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert images.decode_data_uri(uri, LIMITS, "image.uri") == data
    assert images.decode_data_uri("data:,a%20b", LIMITS, "image.uri") == b"a b"


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:image/png;base64,@@@@", "data:image/png;base64,abc"])
def test_a_malformed_data_uri_is_refused(uri: str) -> None:
    with pytest.raises(InvalidField) as caught:
        images.decode_data_uri(uri, LIMITS, "image.uri")
    assert caught.value.field == "image.uri"


def test_an_endless_data_uri_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(InvalidField, match="too many"):
        images.decode_data_uri("data:," + "a" * 800_001, LIMITS, "image.uri")


def test_source_size_is_rounded_down_to_the_models_multiple() -> None:
    assert images.target_size((63, 40), SizeRule(), 8, LIMITS) == (56, 40)
    assert images.target_size((63, 40), SizeRule(100, 20), 8, ImageLimits()) == (96, 16)
    assert images.target_size((63, 40), SizeRule(height=32), 8, LIMITS) == (56, 32)


@pytest.mark.parametrize(
    ("source", "width", "height", "field"),
    [((7, 64), None, None, "image"), ((64, 64), 7, None, "width"), ((64, 64), None, 0, "height"), ((64, 64), -8, None, "width"),
     ((128, 128), None, None, "image"), ((64, 64), 128, None, "width"), ((64, 64), None, 128, "height")],
)  # fmt: skip
def test_a_size_out_of_bounds_names_its_field(source: tuple[int, int], width: int | None, height: int | None, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        images.target_size(source, SizeRule(width, height), 8, LIMITS)
    assert caught.value.field == field


NATIVE = SizeRule(area=512 * 512)


@pytest.mark.parametrize(
    ("source", "rule", "multiple", "expected"),
    [((3000, 2000), NATIVE, 8, (624, 416)), ((2000, 3000), NATIVE, 8, (416, 624)), ((512, 512), NATIVE, 8, (512, 512)),
     ((64, 64), NATIVE, 8, (512, 512)), ((1000, 1000), NATIVE, 64, (512, 512)), ((3000, 2000), NATIVE, 64, (576, 384)),
     ((3000, 2000), SizeRule(longest_side=1024), 8, (1024, 680)), ((2000, 3000), SizeRule(longest_side=1030), 8, (680, 1024)),
     ((30, 20), SizeRule(longest_side=96), 8, (96, 64)), ((5000, 3), SizeRule(longest_side=512), 8, (512, 8)),
     ((100_000, 3), NATIVE, 8, (32768, 8)), ((3, 100_000), NATIVE, 8, (8, 32768)), ((1, 1), NATIVE, 8, (512, 512))],
)  # fmt: skip
def test_fit_keeps_the_aspect_ratio(source: tuple[int, int], rule: SizeRule, multiple: int, expected: tuple[int, int]) -> None:
    assert images.target_size(source, rule, multiple, ImageLimits()) == expected


@pytest.mark.parametrize("multiple", [8, 16, 32, 64])
def test_native_size_rule_respects_limit_and_aspect_for_any_source(multiple: int) -> None:
    limits = ImageLimits(max_pixels=256 * 256)
    for width, height in itertools.product((1, 7, 64, 333, 1024, 4096, 50_000), repeat=2):
        fitted = images.target_size((width, height), NATIVE, multiple, limits)
        assert fitted[0] * fitted[1] <= limits.max_pixels
        assert all(side >= multiple and side % multiple == 0 for side in fitted)
        assert (fitted[0] >= fitted[1]) == (width >= height) or fitted[0] == fitted[1]


@pytest.mark.parametrize(
    ("longest", "source"), [(7, (64, 64)), (0, (64, 64)), (-8, (64, 64)), (2048, (64, 64)), (2**31 - 1, (9, 1))]
)
def test_a_longest_side_out_of_bounds_is_named(longest: int, source: tuple[int, int]) -> None:
    with pytest.raises(InvalidField) as caught:
        images.target_size(source, SizeRule(longest_side=longest), 8, ImageLimits(max_pixels=1024 * 1024))
    assert caught.value.field == "fit.longest_side"


def test_oversized_photo_error_mentions_fit() -> None:
    with pytest.raises(InvalidField, match=r"3000 x 2000 .*set fit") as caught:
        images.target_size((3000, 2000), SizeRule(), 8, ImageLimits())
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    ("file_format", "quality", "exact"), [("PNG", 1, True), ("JPEG", 95, False), ("WEBP", 95, False), ("WEBP", 100, True)]
)
def test_results_are_encoded_in_the_requested_format(file_format: images.WriteFormat, quality: int, exact: bool) -> None:
    encoded = Image.open(io.BytesIO(images.encode(sample(), file_format, quality)))
    assert (encoded.format, encoded.size) == (file_format, (24, 16))
    difference = np.abs(np.asarray(encoded.convert("RGB"), int) - np.asarray(sample(), int))
    assert (difference.max() == 0) == exact


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 5), (17, 9), (5, 256), (4, 257), (3, 700)])
def test_png_has_the_pixels_for_any_number_of_rows(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = images.encode(Image.fromarray(pixels), "PNG", 90)
    with Image.open(io.BytesIO(data)) as opened:
        opened.verify()
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(opened), pixels)


def test_png_is_about_as_small_as_pillows() -> None:
    photo = Image.blend(Image.linear_gradient("L"), Image.effect_noise((256, 256), 40), 0.3).convert("RGB")
    usual = io.BytesIO()
    photo.save(usual, "PNG", compress_level=1)
    assert len(images.encode(photo, "PNG", 90)) < 1.1 * len(usual.getvalue())


def test_lower_quality_makes_files_smaller() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for file_format in ("JPEG", "WEBP"):
        assert len(images.encode(noise, file_format, 20)) < len(images.encode(noise, file_format, 90))
