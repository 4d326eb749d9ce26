"""The image sheet: all that was drawn to verify a bundle, side by side with what diffusers draws, as one image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from img2img_server.bundle.manifest import PictureParity
from PIL import Image, ImageChops, ImageDraw, ImageFont

from img2img_export.report import decibels, verdict

if TYPE_CHECKING:
    from img2img_export.verify.images import ImageCase

AMPLIFICATION = 16
"""What differences are multiplied by, to be seen: 16 steps of 1/255 are white."""
GREATEST_SIDE = 256
"""Pixels of an image's longer side on the sheet; larger ones are made smaller."""

_COLUMNS = ("source", "diffusers", "this bundle", f"difference x {AMPLIFICATION}")
_LEAST_COLUMN = 128
"""Pixels: room for the captions, which run over all columns."""
_MARGIN = 12
_LINE = 18
_FONT_SIZE = 13
_PAPER, _INK, _GOOD, _BAD = "#ffffff", "#202020", "#1a7f37", "#cf222e"


def make_sheet(
    cases: "Sequence[ImageCase]",
    references: Sequence[Image.Image],
    drawn: Sequence[Image.Image],
    parities: Sequence[PictureParity],
) -> Image.Image:
    """An RGB image with a row for each case: its source, diffusers' image, ours, their difference, and what was measured."""
    rows = [
        [_thumbnail(picture) for picture in (case.request.image, reference, ours, _difference(ours, reference))]
        for case, reference, ours in zip(cases, references, drawn, strict=True)
    ]
    side = max(_LEAST_COLUMN, *(picture.width for row in rows for picture in row))
    heights = [2 * _LINE + max(picture.height for picture in row) + _MARGIN for row in rows]
    width = len(_COLUMNS) * (side + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + _LINE + sum(heights)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    left = [_MARGIN + column * (side + _MARGIN) for column in range(len(_COLUMNS))]
    for x, title in zip(left, _COLUMNS, strict=True):
        draw.text((x, _MARGIN // 2), title, _INK, font)
    top = _MARGIN + _LINE
    for row, parity, height in zip(rows, parities, heights, strict=True):
        draw.text((_MARGIN, top), parity.case, _INK, font)
        draw.text((_MARGIN, top + _LINE), _caption(parity), _GOOD if parity.passed else _BAD, font)
        for x, picture in zip(left, row, strict=True):
            sheet.paste(picture, (x, top + 2 * _LINE))
        top += height
    return sheet


def _caption(parity: PictureParity) -> str:
    return (
        f"{verdict(parity.passed)}: PSNR {decibels(parity.psnr_db)}, SSIM {parity.ssim:.4f}, "
        f"greatest difference {parity.max_abs_error}/255"
    )


def _difference(picture: Image.Image, reference: Image.Image) -> Image.Image:
    """Amplified; all white where the two have not the same size."""
    if picture.size != reference.size:
        return Image.new("RGB", reference.size, _PAPER)
    difference = ImageChops.difference(picture.convert("RGB"), reference.convert("RGB"))
    return difference.point(lambda value: min(value * AMPLIFICATION, 255))


def _thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((GREATEST_SIDE, GREATEST_SIDE))
    return small
