"""`img2img transform IN --output OUT`: one picture through a server, with its progress."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_client.errors import Img2ImgError, Unavailable
from img2img_client.values import (
    FORMAT_OF_SUFFIX,
    Completed,
    ImageFormat,
    ModelReference,
    Progress,
    TransformEvent,
    TransformResult,
)

if TYPE_CHECKING:
    from img2img_client.options import ImageInput, TransformOptions
    from img2img_client.progress import Show

PROGRAM = "img2img transform"

_EPILOG = """\
examples:
  img2img transform photo.jpg --output winter.png --prompt "the same place in winter"
  img2img transform photo.jpg --output tries.jpg --image-count 4 --seed 1 --strength 0.6 --steps 40
  img2img transform photo.jpg --output lake.png --scheduler "DPM++ 2M Karras" --steps 15 --preview-every 3
  cat photo.jpg | img2img transform - --output - --format webp --quiet > sunset.webp
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags. One that is not given leaves the matter to the server."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("image", metavar="IN", help="the source picture: a file, or - for standard input")
    parser.add_argument("--output", metavar="OUT", required=True, help="where to write; - for standard output")
    parser.add_argument(
        "--preview-every",
        type=int,
        metavar="N",
        help="every N steps, write a small picture of what becomes of it, beside OUT: OUT-step-N.jpg, ...",
    )
    parser.add_argument("--server", metavar="TARGET", default="localhost:50051", help="default: %(default)s; https://... for TLS")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long; default: never")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    _add_wishes(parser)
    model = parser.add_argument_group("which model (needed where the server has several and no default)")
    model.add_argument("--model", metavar="ID", help="its id on the server, as `img2img models` lists it")
    model.add_argument("--repo-id", metavar="OWNER/NAME", help="the repository it was exported from")
    model.add_argument("--variant", metavar="NAME", help="the variant of its weights, such as fp16")
    model.add_argument("--revision", metavar="REVISION", help="the revision it was exported from")


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
    wish.add_argument("--format", choices=("png", "jpeg", "webp"), help="default: what OUT's suffix says")
    wish.add_argument("--quality", type=int, metavar="Q", help="of JPEG and WebP, 1 to 100")


def run(arguments: argparse.Namespace) -> int:
    """Transforms and writes. Returns 0, 1 for a failure, 2 for arguments that cannot work; Ctrl-C cancels the call."""
    try:
        output = _plan_output(arguments)
    except ValueError as error:
        return complain(PROGRAM, str(error), status=2)
    try:
        output.check_writable()
        image: ImageInput = sys.stdin.buffer.read() if arguments.image == "-" else Path(arguments.image)
        result = _transform(arguments, image, output)
        written = output.write(result)
    except Img2ImgError as error:
        return complain(PROGRAM, describe_error(error, arguments.server))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return complain(PROGRAM, f"{name}{error.strerror or error}")
    except ValueError as error:  # A number that the contract's types cannot hold, or too large a picture.
        return complain(PROGRAM, str(error), status=2)
    if not arguments.quiet:
        _report(result, written, as_json=arguments.json)
    return 0


def complain(program: str, message: str, status: int = 1) -> int:
    """Prints one line of error and returns the exit status."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return status


def describe_error(error: Img2ImgError, server: str) -> str:
    """What went wrong in one line: the wrong fields by name, where to look, or how long to wait."""
    if error.fields:
        return "; ".join(f"{field}: {description}" for field, description in error.fields)
    if isinstance(error, Unavailable) and not error.reason:
        return f"no answer from {server}: {error.message}"
    wait = "" if error.retry_after is None else f" (try again in {error.retry_after:.3g} s)"
    return f"{error.message}{wait}"


@dataclass(frozen=True, slots=True)
class _Output:
    """Where the pictures go; `path` None is standard output. `format` None leaves it to the server."""

    path: Path | None
    count: int
    format: ImageFormat | None

    def paths(self, count: int) -> tuple[Path, ...]:
        """The files of so many pictures: OUT itself for one, numbered from 1 for more."""
        if self.path is None:
            return ()
        if count == 1:
            return (self.path,)
        return tuple(self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, count + 1))

    def check_writable(self) -> None:
        """OSError where a file cannot be written, found by opening it. What is there already stays as it is."""
        for path in self.paths(self.count):
            existed = path.exists()
            path.open("ab").close()
            if not existed:
                path.unlink()

    def write_preview(self, event: TransformEvent) -> None:
        """Writes an event's preview, if it has one, beside the picture."""
        if self.path is not None and isinstance(event, Progress) and event.preview is not None:
            number = str(event.step).zfill(len(str(event.step_count)))
            self.path.with_name(f"{self.path.stem}-step-{number}.jpg").write_bytes(event.preview)

    def write(self, result: TransformResult) -> tuple[Path, ...]:
        """Writes the pictures; returns their files, none for standard output."""
        paths = self.paths(len(result.images))
        for path, image in zip(paths, result.images, strict=False):
            path.write_bytes(image.data)
        if self.path is None:
            sys.stdout.buffer.write(result.images[0].data)
            sys.stdout.buffer.flush()
        return paths


def _plan_output(arguments: argparse.Namespace) -> _Output:
    """Where to write and in which format. ValueError for what cannot work, before anything is asked of the server."""
    count = max(1, arguments.image_count or 1)
    if arguments.output == "-":
        if count > 1:
            raise ValueError("--output -: standard output takes one picture, not --image-count of them")
        if arguments.json:
            raise ValueError("--output -: the picture and --json cannot both go to standard output")
        if arguments.preview_every:
            raise ValueError("--output -: --preview-every writes beside OUT, so OUT must be a file")
        return _Output(None, count, arguments.format)
    path = Path(arguments.output)
    promised = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if promised is None and arguments.format is None:
        raise ValueError(f"--output {path}: its name should end in {', '.join(FORMAT_OF_SUFFIX)}, or give --format")
    if promised is not None and arguments.format not in (None, promised):
        raise ValueError(f"--output {path}: its name says {promised}, --format says {arguments.format}")
    return _Output(path, count, arguments.format or promised)


def _transform(arguments: argparse.Namespace, image: "ImageInput", output: _Output) -> TransformResult:
    from img2img_client.client import Client

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
        "format": output.format,
        "quality": arguments.quality,
        "scheduler": arguments.scheduler,
        "preview_interval": arguments.preview_every,
    }
    with (
        Client(arguments.server, timeout=arguments.timeout) as client,
        client.transform_stream(image, **options) as events,
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


def _report(result: TransformResult, written: tuple[Path, ...], *, as_json: bool) -> None:
    """Prints what was made: to standard output, or to standard error where the picture went to standard output."""
    timings = asdict(result.timings)
    if as_json:
        images = [
            {"path": str(path), "seed": image.seed, "width": image.width, "height": image.height, "format": image.format}
            for path, image in zip(written, result.images, strict=True)
        ]
        model = {"id": result.model_id, "revision": result.model_revision}
        print(json.dumps({"images": images, "model": model, "engine": result.engine, "timings": timings}))
        return
    stream = sys.stdout if written else sys.stderr
    names = [str(path) for path in written] or ["standard output"]
    for name, image in zip(names, result.images, strict=False):
        print(f"{name}  {image.width} x {image.height}, seed {image.seed}", file=stream)
    print(f"{result.model_id} on {result.engine}", file=stream)
    print(", ".join(f"{name.removesuffix('_ms')} {value:.0f} ms" for name, value in timings.items()), file=stream)
