"""`img2img transform IN --output OUT`: one image through a server, with its progress."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.errors import Img2ImgError
from img2img_client.output import Output, plan_output
from img2img_client.reporting import attempt, complain, describe_error
from img2img_client.values import Completed, ModelReference, TransformEvent, TransformResult

if TYPE_CHECKING:
    from img2img_client.options import Fit, ImageInput, TransformOptions
    from img2img_client.progress import Show

PROGRAM = "img2img transform"

_EPILOG = """\
examples:
  img2img transform photo.jpg --output winter.png --prompt "the same place in winter" --fit native
  img2img transform photo.jpg --output tries.jpg --image-count 4 --seed 1 --strength 0.6 --steps 40
  img2img transform photo.jpg --output lake.png --scheduler "DPM++ 2M Karras" --steps 15 --preview-every 3
  cat photo.jpg | img2img transform - --output - --format webp --quiet > sunset.webp
  img2img transform https://example.org/lake.jpg --as-asset --target https://gpu-box:50051 --token-file ~/.img2img-token
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags. One that is not given leaves the matter to the server."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "image",
        metavar="IN",
        help="the source picture: a file, - for standard input, or an address that the server reads (asset:ID, https://...)",
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output", metavar="OUT", help="where to write; - for standard output")
    place.add_argument("--as-asset", action="store_true", help="have the server keep the picture, and print its address")
    parser.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="every N steps, write a small picture of what becomes of it, beside OUT: OUT-step-N.jpg, ...",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only, and addresses")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    _add_wishes(parser)
    model = parser.add_argument_group("which model (needed where the server has several and no default)")
    model.add_argument("--model", metavar="ID", help="its id on the server, as `img2img models` lists it")
    model.add_argument("--repo-id", metavar="OWNER/NAME", help="the repository it was exported from")
    model.add_argument("--variant", metavar="NAME", help="the variant of its weights, such as fp16")
    model.add_argument("--revision", metavar="REVISION", help="the revision it was exported from")
    add_connection_flags(parser)


def _add_wishes(parser: argparse.ArgumentParser) -> None:
    wish = parser.add_argument_group("what to make of it (defaults are the server's)")
    wish.add_argument("--prompt", metavar="TEXT", help="what the picture should become")
    wish.add_argument("--negative-prompt", metavar="TEXT", help="what it should not become")
    wish.add_argument("--strength", type=float, metavar="S", help="how far to leave the source, above 0 and up to 1")
    wish.add_argument("--steps", "--num-inference-steps", type=int, metavar="N", dest="steps", help="steps of the whole schedule")
    wish.add_argument("--guidance-scale", type=float, metavar="G", help="0 to 30; 1 and below: none")
    wish.add_argument(
        "--scheduler",
        metavar="NAME",
        help='the way from noise to picture, such as "DPM++ 2M Karras"; `img2img models --schedulers` lists the names',
    )
    wish.add_argument("--seed", type=int, metavar="N", help="-1 draws one")
    wish.add_argument("--image-count", type=int, metavar="N", help="above 1, OUT becomes OUT-1, OUT-2, ... before its suffix")
    wish.add_argument("--width", type=int, metavar="PIXELS")
    wish.add_argument("--height", type=int, metavar="PIXELS")
    wish.add_argument(
        "--fit",
        type=_fit,
        metavar="RULE",
        help="in place of both, with the aspect kept: native, for the area that the model was trained on, or the longest side in"
        " pixels; for photos, which are larger than models draw well",
    )
    wish.add_argument("--format", choices=("png", "jpeg", "webp"), help="default: what OUT's suffix says")
    wish.add_argument("--quality", type=int, metavar="Q", help="of JPEG and WebP, 1 to 100")


def run(arguments: argparse.Namespace) -> int:
    """Transforms and writes. Returns 0, 1 for a failure, 2 for arguments that cannot work; Ctrl-C cancels the call."""

    def work() -> None:
        output = plan_output(arguments)
        output.check_writable()
        result = _transform(arguments, output)
        places = output.write(result)
        for warning in () if arguments.quiet else result.warnings:
            complain(PROGRAM, f"warning: {warning.field}: {warning.description}")
        if not arguments.quiet:
            _report(result, places, output, as_json=arguments.json)
        elif output.as_asset:  # the ids are the only way to the images
            print("\n".join(places))

    return attempt(PROGRAM, target_of(arguments), work)


def _fit(text: str) -> "Fit":
    if text == "native":
        return "native"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither native nor a number of pixels") from None


def _source(image: str) -> "ImageInput":
    """The image that IN means."""
    from img2img_client.options import ADDRESS_SCHEMES

    if image == "-":
        return sys.stdin.buffer.read()
    return image if image.startswith(ADDRESS_SCHEMES) else Path(image)


def _transform(arguments: argparse.Namespace, output: Output) -> TransformResult:
    def say(made: int, error: Img2ImgError, wait: float) -> None:
        complain(PROGRAM, f"{describe_error(error, target_of(arguments))}; trying again in {wait:.1f} s")

    options: TransformOptions = {
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
        "format": output.format,
        "quality": arguments.quality,
        "scheduler": arguments.scheduler,
        "preview_interval": arguments.preview_every,
        "as_asset": arguments.as_asset or None,
    }
    with (
        connect(arguments, None if arguments.quiet else say) as client,
        client.transform_stream(_source(arguments.image), **options) as events,
        _progress(arguments.quiet) as show,
    ):
        for event in events:
            show(event)
            output.write_preview(event)
            if isinstance(event, Completed):
                return event.result
    raise AssertionError("a stream ends with a Completed event or an error")


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
    """Shows nothing."""


def _report(result: TransformResult, places: tuple[str, ...], output: Output, *, as_json: bool) -> None:
    """Prints what was made: to standard output, or to standard error where the image went to standard output."""
    timings = asdict(result.timings)
    where = "asset" if output.as_asset else "path"
    if as_json:
        images = [
            {where: place, "seed": image.seed, "width": image.width, "height": image.height, "format": image.format}
            for place, image in zip(places, result.images, strict=True)
        ]
        model = {"id": result.model_id, "revision": result.model_revision}
        made = {"images": images, "model": model, "engine": result.engine, "timings": timings, "request_id": result.request_id}
        made["warnings"] = [asdict(warning) for warning in result.warnings]
        print(json.dumps(made))
        return
    stream = sys.stderr if output.path is None and not output.as_asset else sys.stdout
    for place, image in zip(places, result.images, strict=False):
        print(f"{place}  {image.width} x {image.height}, seed {image.seed}", file=stream)
    print(f"{result.model_id} on {result.engine}", file=stream)
    print(", ".join(f"{name.removesuffix('_ms')} {value:.0f} ms" for name, value in timings.items()), file=stream)
