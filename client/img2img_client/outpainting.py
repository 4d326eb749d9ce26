"""Outpainting: a canvas around an image, and the mask with which a model paints the margins."""

from dataclasses import dataclass

from PIL import Image, ImageOps

OVERLAP = 8
"""Pixels of the image next to the margins that are redrawn, too, for a smooth transition: the side of a latent of most models."""


@dataclass(frozen=True, slots=True)
class Margins:
    """Pixels to add to each side of an image."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


def expand(image: Image.Image, margins: Margins, overlap: int = OVERLAP) -> tuple[Image.Image, Image.Image]:
    """The image on a canvas that is larger by `margins`, in RGB, and the canvas's mask, in mode L.

    The margins repeat the image's edges; a strength below 1 starts from these. The mask is white there and in the next `overlap`
    pixels of the image. Pass both as `image` and `mask` of a transform. Raises ValueError for a negative margin or overlap, and
    if all margins are 0.
    """
    sides = (margins.left, margins.top, margins.right, margins.bottom)
    if min(*sides, overlap) < 0 or not any(sides):
        raise ValueError(
            f"margins must be 0 or more pixels, and one above 0, not {', '.join(map(str, sides))}; overlap: {overlap}"
        )
    source = ImageOps.exif_transpose(image).convert("RGB")
    width, height = source.size
    size = (margins.left + width + margins.right, margins.top + height + margins.bottom)
    canvas = Image.new("RGB", size)
    row = Image.new("RGB", (size[0], height))  # the image with its left and right edges repeated
    row.paste(source, (margins.left, 0))
    if margins.left:
        row.paste(source.crop((0, 0, 1, height)).resize((margins.left, height)), (0, 0))
    if margins.right:
        row.paste(source.crop((width - 1, 0, width, height)).resize((margins.right, height)), (margins.left + width, 0))
    canvas.paste(row, (0, margins.top))
    if margins.top:
        canvas.paste(row.crop((0, 0, size[0], 1)).resize((size[0], margins.top)), (0, 0))
    if margins.bottom:
        canvas.paste(row.crop((0, height - 1, size[0], height)).resize((size[0], margins.bottom)), (0, margins.top + height))
    mask = Image.new("L", size, 255)
    left, top = (margin + overlap if margin else 0 for margin in (margins.left, margins.top))
    right = size[0] - (margins.right + overlap if margins.right else 0)
    bottom = size[1] - (margins.bottom + overlap if margins.bottom else 0)
    if left < right and top < bottom:
        mask.paste(0, (left, top, right, bottom))
    return canvas, mask
