"""`img2img export SOURCE --output DIR`: its flags, and what the person sees of it."""

import argparse
import os
import sys
import time
from pathlib import Path

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions

_DESCRIPTION = """\
Turns a diffusers model into a bundle that `img2img serve` loads: ONNX graphs where they can be made (Stable Diffusion 1
and 2, SDXL and its refiner), else PyTorch weights with the reason why.

Before the bundle appears at DIR, every graph is compared with PyTorch and whole pictures with those of diffusers' own
AutoPipelineForImage2Image for the same seed. The measurements are in DIR/manifest.json. Where they fail there is no bundle.
Only safetensors weights are read, and no code that a model brings is run.
"""

_EPILOG = """\
examples:
  img2img export ./my-model --output models/my-model
  img2img export stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 --output models/sdxl
  img2img export ./my-model --output models/my-model --backend torch --force

The same command again does nothing as long as the source, the options and the installed tools are the same.
An export that is killed leaves DIR as it was; the next one clears what it left beside it.
Exit status: 0 the bundle is there, 1 it could not be made, 2 wrong arguments.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SOURCE", help="a directory in diffusers' layout, or a hub repository (OWNER/NAME)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where the bundle is to be")
    parser.add_argument("--variant", metavar="V", help="which of the model's weights to read, such as fp16 (exported as fp32)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub repository")
    for flag, meaning in (("--allow-pattern", "read only files that match"), ("--ignore-pattern", "read no files that match")):
        parser.add_argument(flag, metavar="P", action="append", default=[], help=f"{meaning}, such as 'unet/*' (repeatable)")
    parser.add_argument(
        "--backend",
        choices=("auto", "onnx", "torch"),
        default="auto",
        help="onnx: fail where no graphs can be made; torch: make none; auto (default): graphs, or torch with the reason",
    )
    parser.add_argument("--force", action="store_true", help="replace another bundle at DIR (never anything but a bundle)")


def run(arguments: argparse.Namespace) -> int:
    """Exports. Returns the exit status: 0 done or up to date, 1 failed."""
    # Read at import by libraries that would report on their own imports.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read by OpenMP when torch is loaded: threads that spin while they wait lose much on a machine that is busy otherwise.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from img2img_export.build import export_model

    options = ExportOptions(
        source=arguments.source,
        output=arguments.output,
        variant=arguments.variant,
        revision=arguments.revision,
        allow_patterns=tuple(arguments.allow_pattern),
        ignore_patterns=tuple(arguments.ignore_pattern),
        backend=arguments.backend,
        force=arguments.force,
    )
    start = time.monotonic()
    try:
        outcome = export_model(options, lambda line: print(f"{time.monotonic() - start:7.1f} s  {line}", flush=True))
    except (ExportError, OSError) as error:
        print(f"img2img export: {error}", file=sys.stderr)
        return 1
    print(outcome.summary())
    return 0
