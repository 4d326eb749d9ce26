"""Colours come out as sRGB: ICC profiles, deep gray and floats."""

import io
import struct
from typing import Any

import icc_profiles
import numpy as np
import pytest
from img2img_server import images
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from PIL import Image, ImageCms

LIMITS = ImageLimits()
GREEN = (60, 200, 80)
GREEN_OF_P3 = (0, 203, 58)  # by the matrices of both, clipped
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def decoded(image: Image.Image, file_format: str, **options: Any) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return np.asarray(images.decode(file.getvalue(), LIMITS, "image.data"), int)


def assert_near(found: np.ndarray, expected: Any, tolerance: int) -> None:
    assert np.abs(found - np.asarray(expected)).max() <= tolerance


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_is_converted_to_srgb_in_every_container(file_format: str) -> None:
    found = decoded(Image.new("RGB", (16, 16), GREEN), file_format, icc_profile=icc_profiles.display_p3())
    assert_near(found, GREEN_OF_P3, 3)


def test_a_profile_in_a_bmp_is_converted_to_srgb() -> None:
    pixels, profile = bytes(reversed(GREEN)) * 256, icc_profiles.display_p3()
    header = struct.pack("<LllHHLLllLL", 124, 16, 16, 1, 24, 0, len(pixels), 2835, 2835, 0, 0).ljust(124, b"\0")
    header = header[:56] + b"DEBM" + header[60:112] + struct.pack("<LL", 124 + len(pixels), len(profile)) + header[120:]
    data = b"BM" + struct.pack("<LLL", 138 + len(pixels) + len(profile), 0, 138) + header + pixels + profile
    assert_near(np.asarray(images.decode(data, LIMITS, "image.data"), int), GREEN_OF_P3, 3)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_profile_is_converted_in_every_mode_of_the_same_colours(mode: str) -> None:
    image = Image.new("RGB", (16, 16), GREEN)
    image = image.quantize() if mode == "P" else image.convert(mode)
    assert_near(decoded(image, "PNG", icc_profile=icc_profiles.display_p3()), GREEN_OF_P3, 3)


def test_transparent_pixels_are_white_with_or_without_a_profile() -> None:
    image = Image.new("RGBA", (16, 16), (*GREEN, 255))
    image.paste((*GREEN, 0), (8, 0, 16, 16))
    found = decoded(image, "PNG", icc_profile=icc_profiles.display_p3())
    assert_near(found[:, :8], GREEN_OF_P3, 3)
    assert (found[:, 8:] == 255).all()


def test_jpeg_profile_in_several_segments_is_joined() -> None:
    profile = icc_profiles.display_p3()
    padded = profile + bytes(150_000)
    whole = (len(padded)).to_bytes(4, "big") + padded[4:]
    assert_near(decoded(Image.new("RGB", (16, 16), GREEN), "JPEG", icc_profile=whole), GREEN_OF_P3, 3)


def test_srgb_profile_changes_no_pixel() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decoded(noise, "PNG", icc_profile=profile) == np.asarray(noise)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_is_converted_by_its_profile(mode: str) -> None:
    values = np.full((16, 16), 100, np.uint8)
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    # Half the light is much brighter than half the value: sRGB's curve of 100 / 255.
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    assert_near(decoded(image, "PNG", icc_profile=icc_profiles.gray(1.0)), expected, 2)


def test_gray_with_an_rgb_profile_uses_its_tone_curve() -> None:
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)
    assert_near(decoded(Image.new("L", (16, 16), 100), "PNG", icc_profile=icc_profiles.linear_srgb()), expected, 2)


@pytest.mark.parametrize("file_format", ["TIFF", "JPEG"])
def test_cmyk_is_converted_by_its_profile(file_format: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    assert_near(decoded(image, file_format, icc_profile=icc_profiles.cmyk()), (255, 0, 255), 6)


P3 = icc_profiles.display_p3()
DAMAGED = {
    "not a profile": b"this is not a profile", "cut off": P3[:200], "only a header": P3[:128],
    "tags that point beyond the end": P3[:136] + b"\xff" * 60 + P3[196:], "another kind of colours": icc_profiles.cmyk(),
    "a curve of no known type": P3.replace(b"para", b"nada"), "a kind that does not exist": P3[:16] + b"XXXX" + P3[20:],
}  # fmt: skip


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_profile_is_ignored(name: str, file_format: str) -> None:
    found = decoded(Image.new("RGB", (16, 16), GREEN), file_format, icc_profile=DAMAGED[name])
    assert_near(found, GREEN, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_of_other_colours_than_the_images_is_ignored(mode: str) -> None:
    plain, image = Image.new("RGB", (16, 16), GREEN), Image.new("RGB", (16, 16), GREEN).convert(mode)
    profile = icc_profiles.cmyk() if mode == "L" else icc_profiles.display_p3()
    expected = plain.convert("L").getpixel((0, 0)) if mode == "L" else GREEN
    assert_near(decoded(image, "TIFF", icc_profile=profile), expected, 3)


def floats(scale: float) -> Image.Image:
    return Image.fromarray((RAMP / 255 * scale).astype(np.float32))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("highest", [0.4, 1.0, 1.5, 10.0])
def test_float_images_map_one_to_white_and_clip_above(highest: float, compression: str) -> None:
    expected = np.clip(RAMP.astype(float) * highest, 0, 255)[..., None]
    assert_near(decoded(floats(highest), "TIFF", compression=compression), expected, 1)


@pytest.mark.parametrize(("highest", "white"), [(255.0, 255), (280.0, 255), (4000.0, 4095), (65535.0, 65535)])
def test_integer_valued_floats_are_scaled_by_their_bit_depth(highest: float, white: float) -> None:
    expected = np.clip(RAMP * (highest / white), 0, 255)[..., None]
    assert_near(decoded(floats(highest), "TIFF"), expected, 1)


def test_non_finite_floats_become_black() -> None:
    values = (RAMP / 255).astype(np.float32)
    values[0, :4] = np.nan, np.inf, -np.inf, -1
    found = decoded(Image.fromarray(values), "TIFF")
    assert_near(found[1:], RAMP[1:, :, None], 1)
    assert (found[0, :4] == 0).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 16, 20, 31])
def test_32_bit_integers_are_scaled_by_their_used_bits(bits: int) -> None:
    values = (RAMP / 255 * (2**bits - 1)).astype(np.int32)
    assert_near(decoded(Image.fromarray(values), "TIFF"), RAMP[..., None], 1)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_preserves_every_8_bit_value(file_format: str) -> None:
    assert (decoded(Image.fromarray(RAMP.astype(np.uint16) * 257), file_format) == RAMP[..., None]).all()


def test_a_dark_image_of_32_bits_stays_dark() -> None:
    assert_near(decoded(Image.fromarray((RAMP // 16).astype(np.int32)), "TIFF"), (RAMP // 16)[..., None], 1)


def tiff(values: bytes, bits: int, photometric: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of 16 x 16 unsigned values, which Pillow writes as signed or not at all."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 16, 279: len(values)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II\x2a\0" + struct.pack("<L", 8 + len(values)) + values + directory


def test_unsigned_integers_of_32_bits_keep_their_upper_half() -> None:
    data = tiff((RAMP.astype(np.uint64) * (2**32 - 1) // 255).astype(np.uint32).tobytes(), 32)
    assert_near(np.asarray(images.decode(data, LIMITS, "image.data"), int), RAMP[..., None], 1)


def test_samples_of_12_bits_are_scaled_by_12_bits() -> None:
    values = (RAMP.astype(np.uint32).ravel() * 4095 // 255).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], -1)
    data = tiff(packed.astype(np.uint8).tobytes(), 12)
    assert_near(np.asarray(images.decode(data, LIMITS, "image.data"), int), RAMP[..., None], 1)


def test_16_bit_white_is_zero_gray_is_inverted() -> None:
    data = tiff((65535 - RAMP.astype(np.uint16) * 257).tobytes(), 16, photometric=0)
    assert_near(np.asarray(images.decode(data, LIMITS, "image.data"), int), RAMP[..., None], 1)


def test_transparent_value_of_16_bit_gray_becomes_white() -> None:
    found = decoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", transparency=100 * 257)
    expected = np.where(RAMP == 100, 255, RAMP)[..., None]
    assert_near(found, expected, 1)


@pytest.mark.parametrize(("file_format", "side", "fits"), [("WEBP", 16384, "PNG, JPEG"), ("JPEG", 65501, "PNG")])
def test_oversized_output_error_names_formats_that_support_it(file_format: images.WriteFormat, side: int, fits: str) -> None:
    images.check_side((side - 1, 8), file_format)
    images.encode(Image.new("RGB", (side - 1, 8)), file_format, 90)
    for size in ((side, 8), (8, side)):
        with pytest.raises(InvalidField, match=f"choose {fits}") as caught:
            images.check_side(size, file_format)
        assert caught.value.field == "output.format"
