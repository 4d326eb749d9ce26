"""`img2img transform IN --output OUT`: transforms one image with a server, and shows the progress.

`img2img transform IN ... --output-dir DIR` transforms many (batch_transform.py).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.output import Output, plan_output
from img2img_client.reporting import attempt, print_error, retry_report
from img2img_client.values import (
    Completed,
    Control,
    ImageInput,
    ImagePrompt,
    Level,
    ModelReference,
    TransformEvent,
    TransformResult,
)

if TYPE_CHECKING:
    from img2img_client.options import Fit, TransformOptions
    from img2img_client.outpainting import Margins
    from img2img_client.progress import Show

PROGRAM = "img2img transform"
_SIDES = ("LEFT", "TOP", "RIGHT", "BOTTOM")
_CONTROL_SETTINGS = {"scale": float, "start": float, "end": float, "control_mode": int}
_PROMPT_SETTINGS = {"image": str, "scale": float}

_EPILOG = """\
examples:
  img2img transform photo.jpg --output winter.png --prompt "the same place in winter" --fit native
  img2img transform photo.jpg --output tries.jpg --image-count 4 --seed 1 --strength 0.6 --steps 40
  img2img transform photo.jpg --output hat.png --prompt "a red hat" --mask head.png --mask-blur 4
  img2img transform photo.jpg --output wide.png --prompt "a wide beach" --expand 128,0,128,0 --strength 1
  img2img transform photo.jpg --output style.png --lora ghibli:0.8 --lora sharp
  img2img transform photo.jpg --output house.png --control canny=edges.png,scale=0.8,end=0.6
  img2img transform photo.jpg --output painted.png --image-prompt ip-adapter_sd15=painting.jpg,scale=0.6
  img2img transform photo.jpg --output lake.png --scheduler "DPM++ 2M Karras" --steps 15 --preview-every 3
  cat photo.jpg | img2img transform - --output - --format webp --quiet > sunset.webp
  img2img transform room.jpg --reference chair.png --reference lamp.png --output new.png --prompt "put both into the room"
  img2img transform photos/*.jpg --output-dir winter --prompt "the same place in winter" --fit native
  img2img transform photo.jpg --output-dir ideas --prompts prompts.txt
  img2img transform https://example.org/lake.jpg --as-asset --target https://gpu-box:50051 --token-file ~/.img2img-token
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`. The server has the defaults."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "image",
        nargs="+",
        metavar="IN",
        help="source image: a file, - for standard input, or an address that the server reads (asset:ID, https://...); several "
        "with --output-dir",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output", metavar="OUT", help="output file; - for standard output")
    place.add_argument(
        "--output-dir",
        metavar="DIR",
        help="transform every IN, and write DIR/NAME.png and so on; files that exist are skipped, so the same command continues "
        "after an interruption",
    )
    place.add_argument("--as-asset", action="store_true", help="store the image on the server, and print its address")
    parser.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="write a preview beside OUT every N steps: OUT-step-N.jpg, ...",
    )
    parser.add_argument("--overwrite", action="store_true", help="with --output-dir: transform again what exists")
    parser.add_argument("--quiet", action="store_true", help="print only errors and asset addresses")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_options(parser)
    model = parser.add_argument_group("model (required if the server has several and no default)")
    model.add_argument("--model", metavar="ID", help="model id, as listed by `img2img models`")
    model.add_argument("--repo-id", metavar="OWNER/NAME", help="repository the model was exported from")
    model.add_argument("--variant", metavar="NAME", help="variant of its weights, such as fp16")
    model.add_argument("--revision", metavar="REVISION", help="revision it was exported from")
    add_connection_flags(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("transform (the server has the defaults)")
    group.add_argument("--prompt", metavar="TEXT", help="what the image should become")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="with --output-dir: one prompt per line; every IN is transformed with each"
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="what the image should not become")
    group.add_argument("--strength", type=float, metavar="S", help="how much to change the source, above 0 and up to 1")
    group.add_argument(
        "--steps",
        "--num-inference-steps",
        type=int,
        metavar="N",
        dest="steps",
        help="inference steps; at a strength below 1, only that fraction of them runs",
    )
    group.add_argument("--guidance-scale", type=float, metavar="G", help="0 to 30; 1 or below disables guidance")
    group.add_argument(
        "--true-cfg-scale",
        type=float,
        metavar="G",
        help="0 to 30: guidance by --negative-prompt, for models such as Qwen-Image and Flux Kontext",
    )
    group.add_argument(
        "--reference",
        action="append",
        metavar="FILE",
        dest="references",
        help="one more image to edit by, as a file or an address like IN; repeat for several. For models that take several, as "
        "`img2img models --fields` lists",
    )
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        help='sampling method, such as "DPM++ 2M Karras"; `img2img models --schedulers` lists the names',
    )
    group.add_argument(
        "--lora",
        type=_lora,
        action="append",
        default=[],
        metavar="ID[:SCALE]",
        help="LoRA of the server, at this scale (default: 1; repeatable); `img2img models --loras` lists them",
    )
    group.add_argument(
        "--control",
        type=_control,
        action="append",
        default=[],
        metavar="[MODEL=]FILE[,scale=S][,start=A][,end=B][,control_mode=M]",
        dest="controls",
        help="image for a ControlNet of the server, such as edges or a pose, as a file or an address; scale is the factor of its "
        "effect, start and end the fractions of the steps between which it applies, control_mode the kind of the image for a "
        "union (repeatable); `img2img models --controlnets` lists the ControlNets that fit each model; leave MODEL out if the "
        "model needs a control image but no ControlNet, as Flux Depth does",
    )
    group.add_argument(
        "--image-prompt",
        type=_image_prompt,
        action="append",
        default=[],
        metavar="ADAPTER=FILE[,image=FILE]...[,scale=S]",
        dest="image_prompts",
        help="image whose content and style the result takes over, as a file or an address, read by an image adapter "
        "(IP-Adapter) of the server; image adds one more image for the same adapter, scale is the factor of their effect "
        "(repeatable); `img2img models --image-adapters` lists the adapters that fit each model",
    )
    bound = group.add_mutually_exclusive_group()
    bound.add_argument(
        "--fidelity",
        choices=get_args(Level),
        help="how near the image must be to the exact one, for speed: high means at least 35 dB, fast 30 dB; "
        "`img2img models --speedups` lists what that buys",
    )
    bound.add_argument("--min-psnr", type=float, metavar="DB", help="allow any speedup whose images have at least this PSNR")
    bound.add_argument(
        "--min-ssim", type=float, metavar="S", help="allow any speedup whose images have at least this SSIM, 0 to 1"
    )
    group.add_argument("--seed", type=int, metavar="N", help="-1: random")
    group.add_argument(
        "--image-count", type=int, metavar="N", help="number of images; above 1, OUT.png becomes OUT-1.png, OUT-2.png, ..."
    )
    group.add_argument("--width", type=int, metavar="PIXELS")
    group.add_argument("--height", type=int, metavar="PIXELS")
    group.add_argument(
        "--fit",
        type=_fit,
        metavar="RULE",
        help="instead of width and height: resize to the model's training area (native) or to a longest side in pixels, keeping"
        " the aspect ratio; use it for photos, which are usually too large for models",
    )
    group.add_argument(
        "--mask",
        metavar="FILE",
        help="which part to redraw: an image, or an address that the server reads; white is redrawn, black is kept",
    )
    group.add_argument(
        "--expand",
        type=_margins,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="outpaint: add so many pixels to each side of IN, a file, and redraw what was added; best with --strength 1",
    )
    group.add_argument("--mask-blur", type=float, metavar="PIXELS", help="soften the mask's edges by so many pixels of the mask")
    group.add_argument("--mask-invert", action="store_true", default=None, help="redraw what is black in the mask")
    group.add_argument(
        "--no-mask-paste",
        action="store_false",
        default=None,
        dest="mask_paste",
        help="keep the whole image that the model made; by default it is pasted into the source by the mask",
    )
    group.add_argument("--format", choices=("png", "jpeg", "webp"), help="file format (default: from OUT's suffix)")
    group.add_argument("--quality", type=int, metavar="Q", help="quality of JPEG and WebP, 1 to 100")


def run(arguments: argparse.Namespace) -> int:
    """Transforms and writes. Returns 0, 1 for a failure, or 2 for invalid arguments. Ctrl-C cancels the call."""

    failed: list[int] = []

    def work() -> None:
        if arguments.output_dir is not None:
            failed.append(_transform_many(arguments))
            return
        _check_single(arguments)
        output = plan_output(arguments)
        output.check_writable()
        result = _transform(arguments, output)
        places = output.write(result)
        for warning in () if arguments.quiet else result.warnings:
            print_error(PROGRAM, f"warning: {warning.field}: {warning.description}")
        if not arguments.quiet:
            _report(result, places, output, as_json=arguments.json)
        elif output.as_asset:  # without the ids, the images could not be found
            print("\n".join(places))

    status = attempt(PROGRAM, target_of(arguments), work)
    return status or int(any(failed))


def _check_single(arguments: argparse.Namespace) -> None:
    """Raises ValueError for arguments that need --output-dir."""
    if len(arguments.image) > 1:
        raise ValueError(f"IN: {len(arguments.image)} images need --output-dir DIR")
    if arguments.expand is not None and arguments.mask is not None:
        raise ValueError("--expand makes a mask of its own: set only one of --expand and --mask")
    for flag in ("prompts", "overwrite"):
        if getattr(arguments, flag):
            raise ValueError(f"--{flag} needs --output-dir DIR")


def _transform_many(arguments: argparse.Namespace) -> int:
    """Transforms every image with every prompt. Returns how many failed."""
    from img2img_client.batch_transform import plan_tasks, transform_tasks

    if arguments.preview_every:
        raise ValueError("--preview-every needs --output: previews are written for a single image")
    if arguments.expand is not None:
        raise ValueError("--expand needs --output: it is for a single image")
    if arguments.prompt is not None and arguments.prompts is not None:
        raise ValueError("--prompt and --prompts both set the prompt: set only one of them")
    tasks = plan_tasks(arguments)
    with connect(arguments, None if arguments.quiet else retry_report(PROGRAM, target_of(arguments))) as client:
        return transform_tasks(client, tasks, _options(arguments), arguments, target_of(arguments))


def _fit(text: str) -> "Fit":
    if text == "native":
        return "native"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be native or a number of pixels, not {text!r}") from None


def _margins(text: str) -> "Margins":
    from img2img_client.outpainting import Margins

    sides = text.split(",")
    if len(sides) != len(_SIDES) or not all(side.strip().isdecimal() for side in sides) or not any(map(int, sides)):
        raise argparse.ArgumentTypeError(f"must be four numbers of pixels, {','.join(_SIDES)}, and one above 0, not {text!r}")
    return Margins(*map(int, sides))


def _expanded(arguments: argparse.Namespace) -> "tuple[ImageInput, ImageInput | None]":
    """The source image, and the mask: with --expand, those of a larger canvas."""
    source = _source(arguments.image[0])
    if arguments.expand is None:
        return source, arguments.mask
    import io

    from PIL import Image

    from img2img_client.options import ADDRESS_SCHEMES, read_file
    from img2img_client.outpainting import expand

    if isinstance(source, str) and source.startswith(ADDRESS_SCHEMES):
        raise ValueError("--expand needs a file: an address is read by the server")
    with Image.open(io.BytesIO(read_file(source))) as image:
        return expand(image, arguments.expand)


def _lora(text: str) -> tuple[str, float]:
    """The id and the scale: the text after the last colon is the scale if it is a number."""
    name, colon, last = text.rpartition(":")
    if colon and name:
        with suppress(ValueError):
            return name, float(last)
    return text, 1.0


def _loras(given: "list[tuple[str, float]]") -> dict[str, float]:
    loras = dict(given)
    if len(loras) < len(given):
        raise ValueError("--lora: name each LoRA once")
    return loras


def _control(text: str) -> Control:
    """A control: its model if it has one, its image, and numbers after commas."""
    model, equals, rest = text.partition("=")
    if not equals or model.rpartition(",")[2] in _CONTROL_SETTINGS:
        model, rest = "", text
    image, settings = _image_and_settings(rest, _CONTROL_SETTINGS)
    if not image:
        raise argparse.ArgumentTypeError(f"must be MODEL=FILE or FILE, not {text!r}")
    return Control(model or None, image, **dict(settings))


def _image_prompt(text: str) -> ImagePrompt:
    """An image prompt: its adapter, its first image, and after commas more images and a scale."""
    adapter, _, rest = text.partition("=")
    first, settings = _image_and_settings(rest, _PROMPT_SETTINGS)
    images = [first, *(value for name, value in settings if name == "image")]
    if not adapter or not all(images):
        raise argparse.ArgumentTypeError(f"must be ADAPTER=FILE or ADAPTER=FILE,image=FILE, not {text!r}")
    return ImagePrompt(adapter, images, dict(settings).get("scale"))


def _image_and_settings(text: str, kinds: Mapping[str, type]) -> tuple[str, list[tuple[str, Any]]]:
    """An image's name, and the settings after it, separated by commas. `kinds` are the settings' types by their names."""
    image, *parts = text.split(",")
    found = [("", image)]
    for part in parts:
        name, _, value = part.partition("=")
        last, before = found[-1]
        if name in kinds:
            found.append((name, value))
        elif kinds.get(last, str) is str:  # A file's name may contain commas.
            found[-1] = (last, f"{before},{part}")
        else:
            raise argparse.ArgumentTypeError(f"unknown setting {name!r}: use {', '.join(kinds)}")
    return found[0][1], [(name, _setting(name, value, kinds[name])) for name, value in found[1:]]


def _setting(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        words = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{name} must be {words}, not {value!r}") from None


def _source(image: str) -> "ImageInput":
    """The source image for the argument IN."""
    return sys.stdin.buffer.read() if image == "-" else image


def _transform(arguments: argparse.Namespace, output: Output) -> TransformResult:
    source, mask = _expanded(arguments)
    options: TransformOptions = {
        **_options(arguments),
        "mask": mask,
        "format": output.format,
        "preview_interval": arguments.preview_every,
        "as_asset": arguments.as_asset or None,
    }
    with (
        connect(arguments, None if arguments.quiet else retry_report(PROGRAM, target_of(arguments))) as client,
        client.transform_stream(source, **options) as events,
        _progress(arguments.quiet) as show,
    ):
        for event in events:
            show(event)
            output.write_preview(event)
            if isinstance(event, Completed):
                return event.result
    raise AssertionError("a stream ends with a Completed event or an error")


def _options(arguments: argparse.Namespace) -> "TransformOptions":
    """The options that do not depend on where the image goes."""
    return {
        "model": _model(arguments),
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "strength": arguments.strength,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
        "image_count": arguments.image_count,
        "width": arguments.width,
        "height": arguments.height,
        "fit": arguments.fit,
        "quality": arguments.quality,
        "scheduler": arguments.scheduler,
        "mask": arguments.mask,
        "mask_blur": arguments.mask_blur,
        "mask_invert": arguments.mask_invert,
        "mask_paste": arguments.mask_paste,
        "true_cfg_scale": arguments.true_cfg_scale,
        "reference_images": arguments.references,
        "loras": _loras(arguments.lora),
        "fidelity": arguments.fidelity,
        "min_psnr_db": arguments.min_psnr,
        "min_ssim": arguments.min_ssim,
        "controls": arguments.controls,
        "image_prompts": arguments.image_prompts,
    }


def _model(arguments: argparse.Namespace) -> ModelReference | None:
    reference = ModelReference(
        path=arguments.model, repo_id=arguments.repo_id, variant=arguments.variant, revision=arguments.revision
    )
    return None if reference == ModelReference() else reference


@contextmanager
def _progress(quiet: bool) -> "Iterator[Show]":
    from img2img_client.progress import show_progress

    if quiet:
        yield _ignore
        return
    with show_progress() as show:
        yield show


def _ignore(event: TransformEvent) -> None:
    """Displays nothing."""


def _report(result: TransformResult, places: tuple[str, ...], output: Output, *, as_json: bool) -> None:
    """Prints the result: to standard output, or to standard error if the image was written to standard output."""
    timings = asdict(result.timings)
    where = "asset" if output.as_asset else "path"
    if as_json:
        images = [
            {where: place, "seed": image.seed, "width": image.width, "height": image.height, "format": image.format}
            for place, image in zip(places, result.images, strict=True)
        ]
        model = {"id": result.model_id, "revision": result.model_revision}
        made: dict[str, Any] = {
            "images": images,
            "model": model,
            "engine": result.engine,
            "timings": timings,
            "request_id": result.request_id,
        }
        made["speedup"] = None if result.speedup is None else asdict(result.speedup)
        made["warnings"] = [asdict(warning) for warning in result.warnings]
        print(json.dumps(made))
        return
    stream = sys.stderr if output.path is None and not output.as_asset else sys.stdout
    for place, image in zip(places, result.images, strict=False):
        print(f"{place}  {image.width} x {image.height}, seed {image.seed}", file=stream)
    used = "" if result.speedup is None else f", {result.speedup.times_faster:.2f} x less work: {result.speedup.name}"
    print(f"{result.model_id} on {result.engine}{used}", file=stream)
    print(", ".join(f"{name.removesuffix('_ms')} {value:.0f} ms" for name, value in timings.items()), file=stream)
