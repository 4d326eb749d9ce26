"""`img2img export SOURCE --output DIR`: its flags and output."""

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

from img2img_server.bundle.manifest import Precision, WeightFormat

from img2img_export.cli.terminal import Display, as_json, choose
from img2img_export.errors import ExportError
from img2img_export.options import GROUP_SIZES, Backend, ExportOptions, LoraFile
from img2img_export.progress import Progress
from img2img_export.report import open_console

if TYPE_CHECKING:
    from img2img_export.build import Outcome

_DESCRIPTION = """\
Converts a diffusers model into a bundle that `img2img serve` loads: ONNX graphs of all parts if possible, else (hybrid) a
graph of the denoiser with PyTorch for the rest, else PyTorch weights. The bundle records the reason for a fallback.

SOURCE is one of:
  OWNER/NAME           a repository on the Hugging Face hub
  a directory          in diffusers' layout (with a model_index.json)
  a .safetensors file  a complete checkpoint in one file; --config names the model whose configurations and tokenizers it uses
  an ONNX directory    exported by optimum-cli; --reference names the PyTorch model it was made from

Before the bundle appears at DIR, every graph is compared with PyTorch in fp32, and final images are compared with those of
diffusers' AutoPipelineForImage2Image for the same seeds. If a comparison fails, no bundle is published. `img2img inspect DIR`
shows the measurements and the images. Only safetensors weights are read, and code in a model repository is never run.
"""

_EPILOG = """\
examples:
  a model on the hub, or a local directory:
    img2img export stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --output models/sdxl
    img2img export ./my-model --output models/my-model
  show the plan, the sizes and the memory required, without loading weights:
    img2img export ./my-model --output models/my-model --dry-run
  half the size, for a GPU; a quarter of the size, for a CPU:
    img2img export ./my-model --output models/my-model-fp16 --precision fp16
    img2img export ./my-model --output models/my-model-int8 --precision int8
  a single-file checkpoint, with the configurations of its base model:
    img2img export dreams.safetensors --config stable-diffusion-v1-5/stable-diffusion-v1-5 --output models/dreams
  graphs made by optimum-cli, compared with the model they were made from:
    img2img export ./sd15-onnx --reference ./sd15 --output models/sd15
  images in four steps, with the LCM-LoRA and its scheduler; a style LoRA at scale 0.7:
    img2img export ./my-model --lora lcm.safetensors --scheduler lcm --output models/my-model-lcm
    img2img export ./my-model --lora style.safetensors:0.7 --output models/my-model-style

The command is idempotent: it does nothing if the source, the options and the installed tool versions have not changed.
An interrupted export leaves DIR unchanged and no temporary files. `img2img inspect DIR` shows the measurements.
Exit status: 0 the bundle exists, 1 the export failed, 2 wrong arguments.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="a hub repository, a directory or a safetensors file (see above)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="directory of the bundle to create")
    parser.add_argument("--force", action="store_true", help="replace another bundle at DIR (anything else is never replaced)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, without doing it")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line: stages, progress, result")
    _add_reading(parser.add_argument_group("input"))
    _add_making(parser.add_argument_group("output"))


def _add_reading(group: Any) -> None:
    group.add_argument("--variant", metavar="V", help="variant of the weights to read, such as fp16")
    group.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    for flag, meaning in (("--allow-pattern", "read only files that match"), ("--ignore-pattern", "read no files that match")):
        group.add_argument(flag, metavar="P", action="append", default=[], help=f"{meaning}, such as 'unet/*' (repeatable)")
    group.add_argument(
        "--config",
        metavar="DIR_OR_REPO",
        help="for a single file: a model in diffusers' layout with its configurations and tokenizers (default: detected)",
    )
    group.add_argument(
        "--reference", metavar="MODEL", help="for an ONNX directory of optimum-cli: the PyTorch model to compare with"
    )


def _add_making(group: Any) -> None:
    group.add_argument(
        "--lora",
        metavar="FILE[:SCALE]",
        type=parse_lora,
        action="append",
        default=[],
        help="LoRA to fuse into the weights, at this scale (default: 1; repeatable)",
    )
    group.add_argument(
        "--scheduler",
        metavar="NAME",
        type=parse_scheduler,
        help='default scheduler of the bundle, such as "lcm" or "DPM++ 2M Karras"',
    )
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="precision of the weights (default: %(default)s); int8 calibrates UNet and VAE decoder",
    )
    group.add_argument(
        "--weight-format",
        choices=[name for name in get_args(WeightFormat) if name],
        default="",
        help="store the matrices of transformers and text encoders in 8 or 4 bits; products compute in --precision",
    )
    group.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=GROUP_SIZES[0],
        help="weights that share a scale with --weight-format (default: %(default)s); more are smaller and less accurate",
    )
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="auto",
        help="onnx: graphs of all parts, or fail; hybrid: a graph of the denoiser only, or fail; torch: no graphs; "
        "auto (default): the first of these that works",
    )
    group.add_argument(
        "--no-lora-graphs",
        action="store_false",
        dest="lora_graphs",
        help="make no graphs for requests with LoRAs of their own; such graphs take no space (they share the weights), but each "
        "is traced and compared, too",
    )
    group.add_argument(
        "--control-graphs",
        action="store_true",
        help="also make Flux's graphs for requests with ControlNets, which are traced and compared, too; they take no space "
        "(UNets always have them)",
    )
    group.add_argument(
        "--speedups",
        action="store_true",
        help="measure how much faster requests run that need not be exact (fidelity), and how much their images change; takes as "
        "long as a few hundred images",
    )
    group.add_argument(
        "--allow-unverified",
        action="store_true",
        help="publish the bundle even if verification fails; it is marked as not verified",
    )


def parse_lora(text: str) -> LoraFile:
    """Parses FILE or FILE:SCALE: the text after the last colon is the scale if it is a number."""
    name, colon, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        return LoraFile(Path(text))
    if not colon or not name:
        return LoraFile(Path(text))
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"the scale of a LoRA must be a finite number, not {last}")
    return LoraFile(Path(name), scale)


def parse_scheduler(text: str) -> str:
    """The server's name of a scheduler, whatever the case of `text`."""
    from img2img_server.runtime.schedulers import registry

    name = registry.find(text)
    if name is None:
        names = ", ".join(dict.fromkeys((*registry.NAMES, *registry.FLOW_NAMES)))
        raise argparse.ArgumentTypeError(f"unknown scheduler {text!r}: choose from {names}")
    return name


def run(arguments: argparse.Namespace) -> int:
    """Exports, or shows what would be done. Returns the exit status: 0 done or up to date, 1 failed."""
    # The libraries read these at import; without them they log warnings about their own imports.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # No progress bar per weights file; transformers reads this too.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Read by OpenMP when torch is loaded: waiting threads that spin waste much CPU time on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    display = choose(arguments.json, sys.stdout)
    try:
        if arguments.dry_run:
            _dry_run(options_of(arguments), display, arguments.json)
        else:
            with _terminable():
                _export(options_of(arguments), display)
    except (ExportError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk: strerror does not name the file
            message = f"{error.filename or arguments.output}: {error.strerror}"
        display.error(message)
        print(f"img2img export: {message}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM exit like Ctrl-C, so that partial output is removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def options_of(arguments: argparse.Namespace) -> ExportOptions:
    """The export options given on the command line."""
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
        lora_graphs=arguments.lora_graphs,
        control_graphs=arguments.control_graphs,
        speedups=arguments.speedups,
        weight_format=arguments.weight_format,
        group_size=arguments.group_size,
    )


def _export(options: ExportOptions, display: Display) -> None:
    from img2img_export.build import export_model

    outcome = export_model(options, display)
    display.result(outcome.summary(), record_of(outcome))


def _dry_run(options: ExportOptions, display: Display, json: bool) -> None:
    from img2img_export import companion
    from img2img_export.build import check_weight_format
    from img2img_export.cli.dry_run import forecast, show, survey
    from img2img_export.convert.models import plan

    # With --json the forecast is the only output.
    checkpoint, contents = survey(options, Progress() if json else display)
    check_weight_format(options, checkpoint.kind)
    planned = companion.plan(checkpoint.layout) if checkpoint.kind == "companion" else plan(checkpoint.layout, options.backend)
    found = forecast(checkpoint, options, planned, contents)
    if json:
        print(as_json(dataclasses.asdict(found)))
    else:
        show(found, open_console(sys.stdout))


def record_of(outcome: "Outcome") -> dict[str, Any]:
    """The JSON result for a published bundle."""
    manifest = outcome.manifest
    return {
        "path": str(outcome.path),
        "family": manifest.family,
        "pipeline_class": manifest.pipeline_class,
        "backend": manifest.backend,
        "backend_reason": manifest.backend_reason,
        "precision": manifest.precision,
        "weight_format": manifest.weight_format,
        "bytes": sum(path.stat().st_size for path in outcome.path.rglob("*") if path.is_file()),
        "up_to_date": outcome.up_to_date,
        "verification": dataclasses.asdict(manifest.verification),
        "speedups": dataclasses.asdict(manifest.speedups),
    }
