"""Metadata: the EXIF's orientation turns an image, and nothing else in a file's metadata decides whether it is read."""

import io
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from covering import covering
from img2img_server import images
from img2img_server.errors import InvalidField
from img2img_server.images import ImageLimits
from PIL import Image, ImageOps, PngImagePlugin

LIMITS = ImageLimits()
ORIENTATION, RESOLUTION_UNIT = 0x0112, 0x0128
SIZE = (24, 16)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")


def image() -> Image.Image:
    """Smooth, so that JPEG keeps it nearly, and different in each corner."""
    y, x = np.mgrid[0:16, 0:24]
    return Image.fromarray(np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], -1).astype(np.uint8))


def saved(file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image().save(file, file_format, **({"lossless": True} if file_format == "WEBP" else {}), **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def in_png(*chunks: bytes, after: bool = False) -> bytes:
    """A PNG with more chunks, behind its header or before its end."""
    data = saved("PNG")
    at = len(data) - 12 if after else 33
    return data[:at] + b"".join(chunks) + data[at:]


def in_jpeg(*segments: bytes) -> bytes:
    data = saved("JPEG", quality=95)
    return data[:2] + b"".join(segments) + data[2:]


def in_webp(exif: bytes) -> bytes:
    """A WebP of the extended format, with EXIF behind its pixels."""
    pixels = saved("WEBP")[12:]
    size = struct.pack("<L", SIZE[0] - 1)[:3] + struct.pack("<L", SIZE[1] - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<L", 10) + b"\x08\0\0\0" + size + pixels
    body += b"EXIF" + struct.pack("<L", len(exif)) + exif + b"\0" * (len(exif) % 2)
    return b"RIFF" + struct.pack("<L", len(body)) + body


def in_tiff(*entries: bytes, big_endian: bool = False) -> bytes:
    """An uncompressed TIFF with these additional directory entries."""
    order = ">" if big_endian else "<"
    pixels = image().tobytes()
    tags = {256: SIZE[0], 257: SIZE[1], 259: 1, 262: 2, 273: 8, 277: 3, 278: SIZE[1], 279: len(pixels)}
    bits = 8 + len(pixels)
    own = [struct.pack(f"{order}HHLL", tag, 4, 1, value) for tag, value in tags.items()]
    own.append(struct.pack(f"{order}HHLL", 258, 3, 3, bits))
    all_entries = sorted((*own, *entries), key=lambda entry: struct.unpack(f"{order}H", entry[:2])[0])
    directory = struct.pack(f"{order}H", len(all_entries)) + b"".join(all_entries) + bytes(4)
    start = bits + 6
    head = (b"MM\0\x2a" if big_endian else b"II\x2a\0") + struct.pack(f"{order}L", start)
    return head + pixels + struct.pack(f"{order}3H", 8, 8, 8) + directory


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HHL", tag, kind, count) + value.ljust(4, b"\0")[:4]


def exif(*entries: bytes, order: str = "<", next_directory: int = 0) -> bytes:
    """A TIFF structure of one directory."""
    head = b"II\x2a\0" if order == "<" else b"MM\0\x2a"
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + struct.pack(f"{order}L", next_directory)
    return head + struct.pack(f"{order}L", 8) + directory


def oriented(orientation: int, order: str = "<") -> bytes:
    return entry(ORIENTATION, 3, 1, struct.pack(f"{order}H", orientation), order)


def in_hexadecimal(body: bytes) -> bytes:
    return zlib.compress(b"\nexif\n%8d\n%s\n" % (len(body) + 6, (b"Exif\0\0" + body).hex().encode()))


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "PNG eXIf": lambda body: in_png(chunk(b"eXIf", body)),
    "PNG eXIf behind the pixels": lambda body: in_png(chunk(b"eXIf", body), after=True),
    "PNG eXIf with JPEG's prefix": lambda body: in_png(chunk(b"eXIf", b"Exif\0\0" + body)),
    "PNG text of ImageMagick": lambda body: in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + in_hexadecimal(body))),
    "JPEG": lambda body: in_jpeg(segment(0xE1, b"Exif\0\0" + body)),
    "JPEG in two segments": lambda body: in_jpeg(segment(0xE1, b"Exif\0\0" + body[:9]), segment(0xE1, b"Exif\0\0" + body[9:])),
    "WebP": in_webp,
    "WebP with JPEG's prefix": lambda body: in_webp(b"Exif\0\0" + body),
}  # fmt: skip


def decoded(data: bytes) -> Image.Image:
    return images.decode(data, LIMITS, "image.data")


def assert_is(found: Image.Image, expected: Image.Image) -> None:
    assert (found.mode, found.size) == ("RGB", expected.size)
    assert np.abs(np.asarray(found, int) - np.asarray(expected.convert("RGB"), int)).max() <= 12, "as near as JPEG gets"


@covering(container=CONTAINERS, orientation=range(1, 9), order=["<", ">"])
def test_every_orientation_in_every_container_is_applied_as_pillow_does(container: str, orientation: int, order: str) -> None:
    data = CONTAINERS[container](exif(oriented(orientation, order), order=order))
    tag = Image.Exif()
    tag[ORIENTATION] = orientation
    expected = Image.open(io.BytesIO(saved("PNG", exif=tag)))
    assert_is(decoded(data), ImageOps.exif_transpose(expected))
    assert images.header_size(data, LIMITS, "image.data") == decoded(data).size


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_a_tiff_is_applied_as_pillow_does(orientation: int, big_endian: bool) -> None:
    order = ">" if big_endian else "<"
    data = in_tiff(oriented(orientation, order), big_endian=big_endian)
    expected = Image.open(io.BytesIO(data))
    expected.load()
    assert_is(decoded(data), expected)
    assert images.header_size(data, LIMITS, "image.data") == expected.size


TIFFS: dict[str, tuple[str, dict[str, object]]] = {
    **{f"{mode} {name}": (mode, {"compression": name}) for mode in ("RGB", "L", "RGBA", "P", "CMYK") for name in
       ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd")},
    **{f"{mode} jpeg": (mode, {"compression": "jpeg"}) for mode in ("RGB", "L", "YCbCr")},
    **{f"1 {name}": ("1", {"compression": name}) for name in ("group3", "group4", "raw")},
    "predictor": ("RGB", {"compression": "tiff_lzw", "tiffinfo": {317: 2}}),
    "BigTIFF": ("RGB", {"big_tiff": True}),
    "several pages": ("RGB", {"save_all": True, "append_images": [Image.new("RGB", SIZE)]}),
}  # fmt: skip


@pytest.mark.parametrize("name", TIFFS)
def test_every_kind_of_tiff_keeps_its_pixels_without_its_other_tags(name: str) -> None:
    mode, options = TIFFS[name]
    file = io.BytesIO()
    image().convert(mode).save(file, "TIFF", software="a scanner", description="x" * 10_000, **options)
    expected = Image.open(file).convert("RGBA" if mode == "RGBA" else "RGB").convert("RGB")
    assert np.array_equal(np.asarray(decoded(file.getvalue())), np.asarray(expected))


ODD_EXIF = {
    "resolution unit as FLOAT": exif(oriented(6), entry(RESOLUTION_UNIT, 11, 1, struct.pack("<f", 2.0))),
    "orientation as LONG": exif(entry(ORIENTATION, 4, 1, struct.pack("<L", 6))),
    "orientation as BYTE": exif(entry(ORIENTATION, 1, 1, b"\6")),
    "tags of unknown types before it": exif(entry(1, 99, 7, b""), entry(2, 0, 2**32 - 1, b"\xff" * 4), oriented(6)),
    "values beyond the end": exif(entry(0x010F, 2, 2**31, b"\xff" * 4), oriented(6)),
    "sub-directories that point at themselves": exif(
        *(entry(tag, 4, 1, struct.pack("<L", 8)) for tag in (0x8769, 0x8825, 0xA005)), oriented(6), next_directory=8
    ),
    "cut off behind the orientation": exif(oriented(6), entry(RESOLUTION_UNIT, 3, 1, b"\2"))[:-10],
    "a count beyond the end": exif(oriented(6)).replace(b"\1\0\x12", b"\xff\xff\x12"),
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ODD_EXIF)
def test_readable_orientation_is_applied_despite_other_exif_errors(name: str, container: str) -> None:
    assert_is(decoded(CONTAINERS[container](ODD_EXIF[name])), image().transpose(Image.Transpose.ROTATE_270))


NO_ORIENTATION = {
    "nothing": b"",
    "an empty directory": bytes.fromhex("49492a000800"),
    "no header": b"Photoshop",
    "another magic": b"II\1\0\x08\0\0\0\0\0",
    "a start beyond the end": b"II\x2a\0\xff\xff\xff\xff",
    "a header that is cut off": b"MM\0\x2a\0",
    "orientation 0": exif(oriented(0)),
    "orientation 9": exif(oriented(9)),
    "orientation as text": exif(entry(ORIENTATION, 2, 4, b"six")),
    "orientation as a rational": exif(entry(ORIENTATION, 5, 1, b"\x08\0\0\0")),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", NO_ORIENTATION)
def test_unreadable_orientation_is_ignored(name: str, container: str) -> None:
    assert_is(decoded(CONTAINERS[container](NO_ORIENTATION[name])), image())


@pytest.mark.parametrize("container", [*CONTAINERS, "TIFF"])
def test_malformed_exif_never_prevents_decoding(container: str) -> None:
    """Directories of random tags, types, counts and values, some of them damaged again as a whole."""
    tags = (
        *range(0x0100, 0x0140),
        0x010F,
        ORIENTATION,
        0x011A,
        RESOLUTION_UNIT,
        0x02BC,
        0x8769,
        0x8825,
        0xA005,
        0x927C,
        34675,
        330,
    )
    draw = random.Random(14)
    pixels = {
        254,
        255,
        256,
        257,
        258,
        259,
        262,
        266,
        273,
        277,
        278,
        279,
        284,
        292,
        293,
        317,
        320,
        *range(322, 326),
        332,
        334,
        338,
        339,
    }
    for _ in range(600):
        order = draw.choice("<>")
        entries = [
            entry(tag, draw.choice((*range(20), 0xFFFF)), draw.choice((0, 1, 2, 8, 2**16, 2**32 - 1)), draw.randbytes(4), order)
            for tag in draw.choices(tags, k=draw.randrange(12))
            if container != "TIFF" or tag not in pixels
        ]
        if container == "TIFF":
            data = in_tiff(*entries, big_endian=order == ">")
        else:
            body = bytearray(exif(*entries, order=order, next_directory=draw.randrange(64)))
            for _ in range(draw.choice((0, 0, 1, 4))):
                body[draw.randrange(len(body))] = draw.randrange(256)
            data = CONTAINERS[container](bytes(body[: draw.choice((len(body), draw.randrange(len(body) + 1)))]))
        found = decoded(data)
        assert sorted(found.size) == sorted(SIZE)
        assert images.header_size(data, LIMITS, "image.data") == found.size


def test_every_damaged_file_decodes_or_is_refused() -> None:
    draw = random.Random(14)
    files = [build(exif(oriented(6))) for build in CONTAINERS.values()] + [in_tiff(oriented(6)), saved("GIF"), saved("BMP")]
    files += [saved("TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")]
    for data in files:
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(draw.choice((1, 3, 10))):
                damaged[draw.randrange(len(damaged))] = draw.choice((0, 0xFF, draw.randrange(256)))
            with suppress(InvalidField):
                images.decode(bytes(damaged), ImageLimits(max_source_pixels=10**6), "image.data")


LONG = b"x" * 2_500_000
LARGE_METADATA: dict[str, Callable[[], bytes]] = {
    "PNG tEXt": lambda: in_png(chunk(b"tEXt", b"workflow\0" + LONG)),
    "PNG zTXt": lambda: in_png(chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG))),
    "PNG iTXt": lambda: in_png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG))),
    "PNG iTXt behind the pixels": lambda: in_png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)), after=True),
    "PNG, a hundred texts": lambda: in_png(*[chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG))] * 100),
    "PNG iCCP": lambda: in_png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG * 4))),
    "PNG eXIf": lambda: in_png(chunk(b"eXIf", LONG)),
    "PNG raw profile": lambda: in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG))),
    "PNG, a checksum that is wrong in a text": lambda: in_png(chunk(b"tEXt", b"workflow\0x")[:-4] + b"oops"),
    "PNG of Pillow": lambda: saved("PNG", pnginfo=comfy()),
    "JPEG APPn and COM": lambda: in_jpeg(*(segment(marker, LONG[:65533]) for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE))),
    "JPEG, a malformed multi-picture index": lambda: in_jpeg(
        segment(0xE2, b"MPF\0" + exif(entry(0xB001, 4, 1, b"\2")))
    ),
    "JPEG, Photoshop's resources cut off": lambda: in_jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0")),
    "GIF comment": lambda: saved("GIF", comment=LONG),
    "TIFF texts": lambda: saved("TIFF", tiffinfo={270: LONG.decode(), 700: LONG}),
    "WebP": lambda: saved("WEBP", xmp=LONG, exif=b"Exif\0\0" + LONG),
}  # fmt: skip


def comfy() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", LONG.decode(), zip=True)
    info.add_itxt("prompt", LONG.decode(), zip=True)
    return info


@pytest.mark.parametrize("name", LARGE_METADATA)
def test_large_metadata_is_skipped(name: str) -> None:
    data = LARGE_METADATA[name]()
    tolerance = 40 if name.startswith("GIF") else 12
    assert np.abs(np.asarray(decoded(data), int) - np.asarray(image(), int)).max() <= tolerance
    assert images.check_header(data, LIMITS, "chunk") == f"image/{name.split()[0].strip(',').lower()}"


def test_multi_picture_jpeg_decodes_to_its_first_image() -> None:
    file = io.BytesIO()
    image().save(file, "MPO", save_all=True, append_images=[Image.new("RGB", SIZE, "black")], quality=95)
    data = file.getvalue()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert images.check_header(data, LIMITS, "chunk") == images.media_type(data[:32]) == "image/jpeg"
    assert_is(decoded(data), image())


def test_animated_png_with_malformed_frames_decodes_to_its_default_image() -> None:
    control = chunk(b"acTL", struct.pack(">LL", 2, 0))
    frame = chunk(b"fcTL", struct.pack(">LLLLLHHBB", 7, 999, 999, 5, 5, 1, 1, 0, 0))
    assert_is(decoded(in_png(control, frame)), image())


def test_a_damaged_tiff_writes_nothing_to_standard_error() -> None:
    """libtiff writes there from C, beside the error that Pillow raises."""
    script = """
import io, sys
import numpy as np
from img2img_server import images
from img2img_server.errors import InvalidField
from PIL import Image
refused = 0
for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "lzma"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "TIFF", compression=compression)
    for seed in range(20):
        data, random = bytearray(file.getvalue()), np.random.default_rng(seed)
        for place in random.integers(8, len(data), 30):
            data[place] = random.integers(0, 256)
        try:
            images.decode(bytes(data), images.ImageLimits(), "image.data")
        except InvalidField:
            refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 20, "most of them are damaged beyond reading"
    assert done.stderr == ""
