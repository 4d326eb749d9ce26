"""`img2img reproduce FILE`: repeats the request recorded in an image file, and compares the images."""

import argparse
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.reporting import attempt, print_error, retry_report
from img2img_client.values import Control, ImageInput, ImagePrompt

if TYPE_CHECKING:
    from PIL import Image

    from img2img_client.options import TransformOptions

PROGRAM = "img2img reproduce"

_EPILOG = """\
examples:
  img2img reproduce sunset.png --image photo.jpg
  img2img reproduce sunset.png --image photo.jpg --output again.png --max-difference 2
  img2img reproduce hat.png --image photo.jpg --mask head.png
  img2img reproduce house.png --image photo.jpg --control edges.png
  img2img reproduce sunset.png                        if the source was an asset that the server still has

FILE is an image that a server made with --provenance text or c2pa. The file contains the settings, but not the source image.

exit status: 0 reproduced; 1 the images differ by more than --max-difference, or the request failed; 2 invalid arguments
"""


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """The difference of two images of the same size: the largest and the mean difference per channel in steps of 1/255, and the
    PSNR in dB (None if they are identical)."""

    largest: int
    mean: float
    psnr: float | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE", type=Path, help="the image to reproduce: PNG, JPEG or WebP")
    parser.add_argument(
        "--image", metavar="SOURCE", help="the source image: a file, or an address that the server reads (default: FILE's asset)"
    )
    parser.add_argument(
        "--mask", metavar="MASK", help="the mask, if FILE was made with one: a file, or an address (default: FILE's asset)"
    )
    parser.add_argument(
        "--reference",
        action="append",
        metavar="FILE",
        dest="references",
        help="a reference image, as a file or an address; repeat in the order of the request (default: FILE's assets)",
    )
    parser.add_argument(
        "--control",
        action="append",
        metavar="FILE",
        dest="controls",
        help="a control image, as a file or an address; repeat in the order of the request (default: FILE's assets)",
    )
    parser.add_argument(
        "--image-prompt",
        action="append",
        metavar="FILE",
        dest="prompt_images",
        help="an image of an image prompt, as a file or an address; repeat in the order of the request (default: FILE's assets)",
    )
    parser.add_argument("--output", type=Path, metavar="OUT", help="write the new image here (default: only compare)")
    parser.add_argument(
        "--max-difference", type=int, metavar="N", help="fail if a channel of a pixel differs by more than N of 255"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_connection_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Reproduces and compares. Returns 0, 1 for a failure or too large a difference, or 2 for invalid arguments."""
    failed: list[str] = []

    def work() -> None:
        from img2img_client.options import taken_options
        from img2img_client.provenance import read_provenance, recorded_options

        original = arguments.file.read_bytes()
        record = read_provenance(original)
        if record is None:
            raise ValueError(f"{arguments.file}: the image has no img2img record: was it made with --provenance none?")
        source, options = _source(arguments, record), recorded_options(record)
        options.update(_mask(arguments, record))
        options["reference_images"] = _references(arguments, record)
        options["controls"] = _controls(arguments, record)
        options["image_prompts"] = _image_prompts(arguments, record)
        with connect(arguments, retry_report(PROGRAM, target_of(arguments))) as client:
            # An older server recorded also what its model did not take.
            result = client.transform(source, **taken_options(options, client.models()))
        data = result.images[0].data
        if arguments.output is not None:
            arguments.output.write_bytes(data)
        difference = compare(original, data)
        notes = _changed(record, read_provenance(data))
        _report(difference, notes, as_json=arguments.json)
        if arguments.max_difference is not None and difference.largest > arguments.max_difference:
            failed.append(f"the images differ by {difference.largest} of 255, the limit is {arguments.max_difference}")

    status = attempt(PROGRAM, target_of(arguments), work)
    return print_error(PROGRAM, failed[0]) if failed else status


def compare(first: bytes, second: bytes) -> ImageDifference:
    """The difference of two image files. Raises ValueError if their sizes differ."""
    from PIL import Image, ImageChops, ImageStat

    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in (first, second)]
    if images[0].size != images[1].size:
        sizes = [f"{image.width} x {image.height}" for image in images]
        raise ValueError(f"the image has {sizes[0]} pixels and its reproduction {sizes[1]}")
    difference = ImageChops.difference(*images)
    statistics = ImageStat.Stat(difference)
    squared = sum(statistics.sum2) / sum(statistics.count)
    return ImageDifference(
        largest=max(most for _, most in statistics.extrema),
        mean=sum(statistics.sum) / sum(statistics.count),
        psnr=None if squared == 0 else 10 * math.log10(255**2 / squared),
    )


def _source(arguments: argparse.Namespace, record: Mapping[str, Any]) -> str:
    if arguments.image is None:
        if not isinstance(record.get("source_asset"), str):
            raise ValueError("--image SOURCE is needed: the source image of FILE was not an asset")
        return f"asset:{record['source_asset']}"
    return str(arguments.image)


def _mask(arguments: argparse.Namespace, record: Mapping[str, Any]) -> "TransformOptions":
    """The options about the mask; none if the image was made without one."""
    recorded = record.get("mask")
    if recorded is None:
        if arguments.mask is not None:
            raise ValueError("--mask: the image was made without a mask")
        return {}
    kinds = {"blur": int | float, "invert": bool, "by_alpha": bool, "paste": bool}
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"the img2img record in the image is damaged: mask is {recorded!r}")
    mask: ImageInput | None = arguments.mask
    if mask is None and isinstance(recorded.get("asset"), str):
        mask = f"asset:{recorded['asset']}"
    if mask is None:
        raise ValueError("--mask MASK is needed: the mask of FILE was not an asset")
    if recorded["by_alpha"]:
        mask = _from_transparency(str(mask))
    return {
        "mask": mask,
        "mask_blur": recorded["blur"],
        "mask_invert": recorded["invert"],
        "mask_paste": recorded["paste"],
    }


def _from_transparency(mask: str) -> "Image.Image":
    """A mask of the HTTP API, whose transparent areas are redrawn, as one of which the white ones are."""
    from PIL import Image, ImageOps

    from img2img_client.options import ADDRESS_SCHEMES

    if mask.startswith(ADDRESS_SCHEMES):
        raise ValueError("--mask MASK is needed, as a file: the mask of FILE was sent over HTTP, and redraws transparent areas")
    with Image.open(mask) as image:
        return ImageOps.invert(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def _references(arguments: argparse.Namespace, record: Mapping[str, Any]) -> list[str]:
    recorded, given = record.get("reference_digests") or [], arguments.references
    if given is not None and len(given) != len(recorded):
        raise ValueError(f"--reference is given {len(given)} times, but the request had {len(recorded)} reference images")
    assets = record.get("reference_assets") or []
    if given is None and not all(isinstance(asset, str) for asset in assets):
        raise ValueError(f"--reference FILE is needed {len(recorded)} times: not all reference images of FILE were assets")
    return [f"asset:{asset}" for asset in assets] if given is None else list(given)


def _controls(arguments: argparse.Namespace, record: Mapping[str, Any]) -> list[Control]:
    recorded, given = record.get("controls") or [], arguments.controls
    kinds = {"model": str, "scale": int | float, "start": int | float, "end": int | float}
    if not isinstance(recorded, list) or not all(
        isinstance(control, dict)
        and all(isinstance(control.get(name), kind) for name, kind in kinds.items())
        and isinstance(control.get("control_mode"), int | None)
        for control in recorded
    ):
        raise ValueError(f"the img2img record in the image is damaged: controls is {recorded!r}")
    if given is not None and len(given) != len(recorded):
        raise ValueError(f"--control is given {len(given)} times, but the request had {len(recorded)} control images")
    if given is None and not all(isinstance(control.get("asset"), str) for control in recorded):
        raise ValueError(f"--control FILE is needed {len(recorded)} times: not all control images of FILE were assets")
    images = [f"asset:{control['asset']}" for control in recorded] if given is None else given
    return [
        Control(control["model"] or None, image, control["scale"], control["start"], control["end"], control.get("control_mode"))
        for control, image in zip(recorded, images, strict=True)
    ]


def _image_prompts(arguments: argparse.Namespace, record: Mapping[str, Any]) -> list[ImagePrompt]:
    recorded, given = record.get("image_prompts") or [], arguments.prompt_images
    try:
        assets = [[image.get("asset") for image in prompt["images"]] for prompt in recorded]
        known = [(str(prompt["adapter"]), float(prompt["scale"])) for prompt in recorded]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"the img2img record in the image is damaged: image_prompts is {recorded!r}") from None
    count = sum(map(len, assets))
    if given is not None and len(given) != count:
        raise ValueError(f"--image-prompt is given {len(given)} times, but the request had {count} images in image prompts")
    if given is None and not all(isinstance(asset, str) for images in assets for asset in images):
        raise ValueError(f"--image-prompt FILE is needed {count} times: not all images of FILE's image prompts were assets")
    images = iter([f"asset:{asset}" for of in assets for asset in of] if given is None else given)
    return [ImagePrompt(adapter, [next(images) for _ in of], scale) for (adapter, scale), of in zip(known, assets, strict=True)]


_COMPARED = {
    "source_digest": "the source image is not the one that was used",
    "mask": "the mask is not the one that was used",
    "reference_digests": "the reference images are not the ones that were used",
    "bundle_digest": "the model was exported again since",
    "loras": "a LoRA's file was replaced",
    "speedup": "the model has other speedups",
    "controls": "a ControlNet or a control image is not the one that was used",
    "image_prompts": "an image adapter, its image encoder or an image of an image prompt is not the one that was used",
    "engine": "another engine runs the model",
    "img2img": "another version of img2img runs",
}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[str]:
    """Possible reasons for a difference, one per line, each with the entries of the record that differ."""
    if after is None:
        return []
    notes = []
    for name, reason in _COMPARED.items():
        first, second = (dict(_digests(name, record.get(name))) for record in (before, after))
        places = [place for place in {**first, **second} if first.get(place) != second.get(place)]
        if places:
            words = (f"{place}: {first.get(place)}, now {second.get(place)}" for place in places)
            notes.append(f"{reason} ({'; '.join(words)})")
    return notes


def _digests(place: str, value: object) -> Iterator[tuple[str, object]]:
    """The digests in an entry of a record, with their places, and not the ids of assets, which a file need not have."""
    if isinstance(value, dict):
        for name in ("bundle_digest", "encoder_digest", "digest", "images"):
            if name in value:
                yield from _digests(f"{place}.{name}", value[name])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _digests(f"{place}[{index}]", item)
    else:
        yield place, value


def _report(difference: ImageDifference, notes: list[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(difference), "notes": notes}))
        return
    if difference.psnr is None:
        print("identical")
    else:
        print(f"differs by at most {difference.largest} of 255, {difference.mean:.3f} on average; PSNR {difference.psnr:.1f} dB")
    for note in notes:
        print(f"note: {note}")
