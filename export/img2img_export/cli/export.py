"""`img2img export SOURCE --output DIR`: its flags, and what the person sees of it."""

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from img2img_server.bundle.limits import Precision

from img2img_export.cli.terminal import Display, as_json, choose
from img2img_export.errors import ExportError
from img2img_export.options import Backend, ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_export.report import open_console

if TYPE_CHECKING:
    from img2img_export.build import Outcome

_DESCRIPTION = """\
Turns a diffusers model into a bundle that `img2img serve` loads: ONNX graphs of all parts where they can be made, else
(hybrid) of the denoiser alone with PyTorch for the rest, else PyTorch weights. The bundle says the reason.

SOURCE is one of:
  OWNER/NAME           a repository of the Hugging Face hub
  a directory          in diffusers' layout (it has a model_index.json)
  a .safetensors file  a whole checkpoint in one file; --config names the model whose configurations and tokenizers it has
  a directory of ONNX  that optimum-cli exported; --reference names the PyTorch model that it was made from

Before the bundle appears at DIR, every graph is compared with PyTorch in fp32, and whole pictures with those of diffusers'
own AutoPipelineForImage2Image for the same seed. `img2img inspect DIR` shows the measurements and the pictures. Where they
fail there is no bundle. Only safetensors weights are read, and no code that a model brings is run.
"""

_EPILOG = """\
examples:
  a model of the hub, or a directory of your own:
    img2img export stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --output models/sdxl
    img2img export ./my-model --output models/my-model
  what would be done, how large it would be and what memory it would take, without loading any weights:
    img2img export ./my-model --output models/my-model --dry-run
  half the size, for a GPU; a quarter, for a CPU:
    img2img export ./my-model --output models/my-model-fp16 --precision fp16
    img2img export ./my-model --output models/my-model-int8 --precision int8
  one file, as the community shares them, with the configurations of the model that it was trained from:
    img2img export dreams.safetensors --config stable-diffusion-v1-5/stable-diffusion-v1-5 --output models/dreams
  graphs that optimum-cli made, compared with the model that they were made from:
    img2img export ./sd15-onnx --reference ./sd15 --output models/sd15
  pictures in four steps, with the LCM-LoRA and its scheduler; a style at seven tenths of its strength:
    img2img export ./my-model --lora lcm.safetensors --scheduler lcm --output models/my-model-lcm
    img2img export ./my-model --lora style.safetensors:0.7 --output models/my-model-style

The same command again does nothing as long as the source, the options and the installed tools are the same.
An export that is killed leaves DIR as it was, and nothing beside it. `img2img inspect DIR` shows what was measured.
Exit status: 0 the bundle is there, 1 it could not be made, 2 wrong arguments.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="a hub repository, a directory, or a safetensors file: see above")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the bundle is to be")
    parser.add_argument("--force", action="store_true", help="replace another bundle at DIR (never anything but a bundle)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object on each line: stages, progress, result")
    _add_reading(parser.add_argument_group("what is read"))
    _add_making(parser.add_argument_group("what is made of it"))


def _add_reading(group: Any) -> None:
    group.add_argument("--variant", metavar="V", help="which of the model's weights to read, such as fp16")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    for flag, meaning in (("--allow-pattern", "read only files that match"), ("--ignore-pattern", "read no files that match")):
        group.add_argument(flag, metavar="P", action="append", default=[], help=f"{meaning}, such as 'unet/*' (repeatable)")
    group.add_argument(
        "--config",
        metavar="DIR_OR_REPO",
        help="for a single file: the model in diffusers' layout with its configurations and tokenizers (default: by its kind)",
    )
    group.add_argument("--reference", metavar="MODEL", help="for ONNX of optimum-cli: the PyTorch model to compare it with")


def _add_making(group: Any) -> None:
    group.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        type=parse_lora,
        action="append",
        default=[],
        help="a LoRA to fuse into the weights, at this scale (default: 1; repeatable)",
    )
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        type=parse_scheduler,
        help='the bundle\'s own scheduler, such as "lcm" or "DPM++ 2M Karras"',
    )
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the weights (default: %(default)s); int8: of the matrices of the denoiser and the text encoders",
    )
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="auto",
        help="onnx: graphs of all parts or fail; hybrid: of the denoiser alone or fail; torch: none; auto (default): the first "
        "of the three that can be had",
    )
    group.add_argument(
        "--allow-unverified", action="store_true", help="publish a bundle that failed its verification, and say so in it"
    )


def parse_lora(text: str) -> LoraFile:
    """FILE or FILE:SCALE: what follows the last colon is a scale where it is a number."""
    name, colon, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        return LoraFile(Path(text))
    if not colon or not name:
        return LoraFile(Path(text))
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"a scale is a finite number, not {last}")
    return LoraFile(Path(name), scale)


def parse_scheduler(text: str) -> str:
    """A scheduler's name as the server knows it, from that name in any case."""
    from img2img_server.runtime.schedulers import registry

    name = registry.find(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"no scheduler {text!r}: choose from {', '.join(registry.NAMES)}")
    return name


def run(arguments: argparse.Namespace) -> int:
    """Exports, or says what would be done. Returns the exit status: 0 done or up to date, 1 failed."""
    # Read at import by libraries that would report on their own imports.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Bars for each model's weights: transformers obeys it too.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Read by OpenMP when torch is loaded: threads that spin while they wait lose much on a machine that is busy otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    display = choose(arguments.json, sys.stdout)
    try:
        if arguments.dry_run:
            _foretell(options_of(arguments), display, arguments.json)
        else:
            with _terminable():
                _export(options_of(arguments), display)
    except (ExportError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, say: the system does not name the file
            message = f"{error.filename or arguments.output}: {error.strerror}"
        display.error(message)
        print(f"img2img export: {message}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the process as Ctrl-C does, with what is half done cleared away."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def options_of(arguments: argparse.Namespace) -> ExportOptions:
    """What was asked for, as the exporter takes it."""
    return ExportOptions(
        source=arguments.source,
        output=arguments.output,
        variant=arguments.variant,
        revision=arguments.revision,
        allow_patterns=tuple(arguments.allow_pattern),
        ignore_patterns=tuple(arguments.ignore_pattern),
        config=arguments.config,
        reference=arguments.reference,
        loras=tuple(arguments.lora),
        scheduler=arguments.scheduler,
        precision=arguments.precision,
        backend=arguments.backend,
        force=arguments.force,
        allow_unverified=arguments.allow_unverified,
    )


def _export(options: ExportOptions, display: Display) -> None:
    from img2img_export.build import export_model

    outcome = export_model(options, display)
    display.result(outcome.summary(), record_of(outcome))


def _foretell(options: ExportOptions, display: Display, json: bool) -> None:
    from img2img_export.cli.dry_run import forecast, show, survey
    from img2img_export.convert.models import plan

    # With JSON the forecast is the only line.
    checkpoint, contents = survey(options, Progress() if json else display)
    told = forecast(checkpoint, options, plan(checkpoint.layout, options.backend), contents)
    if json:
        print(as_json(dataclasses.asdict(told)))
    else:
        show(told, open_console(sys.stdout))


def record_of(outcome: "Outcome") -> dict[str, Any]:
    """What a program is told of a bundle that is there."""
    manifest = outcome.manifest
    return {
        "path": str(outcome.path),
        "family": manifest.family,
        "pipeline_class": manifest.pipeline_class,
        "backend": manifest.backend,
        "backend_reason": manifest.backend_reason,
        "precision": manifest.precision,
        "bytes": sum(path.stat().st_size for path in outcome.path.rglob("*") if path.is_file()),
        "up_to_date": outcome.up_to_date,
        "verification": dataclasses.asdict(manifest.verification),
    }
