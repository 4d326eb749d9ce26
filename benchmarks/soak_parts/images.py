"""The requests of a soak, their reference images, and invalid image files."""

import functools
import io
import random
import struct
import zlib
from dataclasses import dataclass

from img2img.v1 import image_to_image_pb2 as pb
from PIL import Image, ImageChops

SIZES = ((64, 64), (96, 64), (128, 128))
STEPS = (4, 6, 8, 12)
TOLERANCE = 1
"""The guaranteed maximum difference, of 255 for each pixel, of an image in any batch from the same image alone."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A request that is repeated; its reference images are made alone at the start."""

    prompt: str
    source: bytes
    seed: int
    steps: int
    guidance: float
    count: int

    def message(self, **changes: object) -> pb.TransformRequest:
        """The request, with `changes`."""
        fields: dict[str, object] = {
            "prompt": self.prompt,
            "image": pb.ImageSource(data=self.source),
            "seed": self.seed,
            "num_inference_steps": self.steps,
            "strength": 0.8,
            "guidance_scale": self.guidance,
            "image_count": self.count,
        }
        return pb.TransformRequest(**{**fields, **changes})  # type: ignore[arg-type]


def subjects(count: int, seed: int) -> list[Subject]:
    """`count` requests of different sizes, steps, guidance and images."""
    dice = random.Random(seed)
    return [
        Subject(
            prompt=f"a landscape, number {index}",
            source=png(noise(SIZES[index % len(SIZES)], dice.randrange(2**32))),
            seed=dice.randrange(2**31),
            steps=dice.choice(STEPS),
            guidance=dice.choice((1.0, 7.5)),
            count=1 if index % 4 else 2,
        )
        for index in range(count)
    ]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """An image of colored patches, determined by the seed."""
    dice = random.Random(seed)
    patches = Image.frombytes("RGB", (8, 8), dice.randbytes(3 * 64))
    return patches.resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def difference(one: bytes, other: bytes) -> int:
    """The largest difference of any color value, of 255; 255 if the sizes differ."""
    with Image.open(io.BytesIO(one)) as first, Image.open(io.BytesIO(other)) as second:
        if first.size != second.size:
            return 255
        extrema = ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getextrema()
    return max(int(pair[1]) for pair in extrema)  # type: ignore[index]


def invalid_images(dice: random.Random) -> dict[str, bytes]:
    """Files that the server must refuse, by name."""
    good = png(noise((64, 64), dice.randrange(2**32)))
    return {
        "empty": b"",
        "garbage": dice.randbytes(2000),
        "truncated": good[: dice.randrange(60, len(good) - 20)],
        "huge header": _png_of(60_000, 60_000, b""),
        "bomb": _bomb(),
        "wrong checksum": good[:40] + bytes([good[40] ^ 0xFF]) + good[41:],
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }


@functools.cache
def _bomb() -> bytes:
    """30 KB that decode to 31 million pixels: just below the limit of a source, far above that of a result."""
    side = 5_600
    return _png_of(side, side, zlib.compress(bytes(side * (side + 1)), 9))


def _png_of(width: int, height: int, data: bytes) -> bytes:
    """A gray PNG file with this size in its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD_FIELDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("strength", {"strength": 1.5}),
    ("strength", {"strength": float("nan")}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": 2**31 - 1}),
    ("guidance_scale", {"guidance_scale": -1.0}),
    ("guidance_scale", {"guidance_scale": float("inf")}),
    ("seed", {"seed": -2}),
    ("image_count", {"image_count": 10_000}),
    ("prompt", {"prompt": "x" * 5000}),
    ("scheduler", {"scheduler": "../../etc/passwd"}),
    ("output.format", {"output": pb.OutputOptions(format=77)}),  # type: ignore[arg-type]
    ("output.quality", {"output": pb.OutputOptions(quality=0)}),
    ("width", {"width": -8}),
    ("height", {"height": 3}),
    ("preview_interval", {"preview_interval": -1}),
    ("image", {"image": pb.ImageSource()}),
    ("image.uri", {"image": pb.ImageSource(uri="gopher://127.0.0.1/")}),
    ("image.uri", {"image": pb.ImageSource(uri="data:image/png;base64,@@@")}),
)
"""Fields with values that the server must refuse."""
