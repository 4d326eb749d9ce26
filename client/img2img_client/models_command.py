"""`img2img models`: lists a server's models as a table or JSON, and loads or unloads them."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from img2img_client.connection import add_connection_flags, connect, target_of
from img2img_client.reporting import attempt
from img2img_client.values import ModelReference

if TYPE_CHECKING:
    from img2img_client.client import Client
    from img2img_client.values import EngineStatus, FieldInfo, ModelInfo, SpeedupInfo

PROGRAM = "img2img models"

_EPILOG = """\
examples:
  img2img models
  img2img models --schedulers
  img2img models --fields
  img2img models --controlnets
  img2img models --image-adapters
  img2img models --loras
  img2img models --load sdxl
  img2img models --load-repo stabilityai/sdxl-turbo --variant fp16
  img2img models --target gpu-box:50051 --json
"""

_WIDTH_OF_A_PIPE = 200
_SECONDS_TO_LIST = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--schedulers", action="store_true", help="list the schedulers that requests to each model can choose")
    parser.add_argument(
        "--fields", action="store_true", help="list the options that requests to each model can set, with defaults and bounds"
    )
    parser.add_argument(
        "--speedups", action="store_true", help="list how much faster each model is with --fidelity, and what it changes"
    )
    parser.add_argument("--controlnets", action="store_true", help="list the ControlNets that requests to each model can name")
    parser.add_argument(
        "--image-adapters", action="store_true", help="list the image adapters that image prompts to each model can name"
    )
    parser.add_argument("--loras", action="store_true", help="list the server's LoRAs instead, which requests may name")
    parser.add_argument("--json", action="store_true", help="print every field of every model as JSON")
    change = parser.add_argument_group("load or unload a model").add_mutually_exclusive_group()
    change.add_argument("--load", metavar="ID", help="load this model, and wait until it is ready")
    change.add_argument("--load-repo", metavar="OWNER/NAME", help="load a model by its repository, which the server may download")
    change.add_argument("--unload", metavar="ID", help="free the model's memory after its running requests, and wait for that")
    parser.add_argument("--variant", metavar="NAME", help="with --load-repo: the variant of the weights, such as fp16")
    parser.add_argument("--revision", metavar="REVISION", help="with --load-repo: a branch, tag or commit")
    add_connection_flags(parser, patience=f"{_SECONDS_TO_LIST:g} to list, never to load and unload")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command. Returns 0, 1 for a failure, or 2 for invalid arguments."""

    def work() -> None:
        if arguments.loras:
            _list_loras(arguments)
            return
        with connect(arguments) as client:
            models = _ask(client, arguments)
        if arguments.json:
            print(json.dumps([asdict(model) for model in models]))
        else:
            _print_table(models, arguments)

    return attempt(PROGRAM, target_of(arguments), work)


def _list_loras(arguments: argparse.Namespace) -> None:
    if arguments.load or arguments.load_repo or arguments.unload:
        raise ValueError("--loras only lists: leave out --load, --load-repo and --unload")
    with connect(arguments) as client:
        loras = client.loras(timeout=_SECONDS_TO_LIST if arguments.timeout is None else arguments.timeout)
    if arguments.json:
        print(json.dumps([asdict(lora) for lora in loras]))
        return
    for lora in loras:
        print(f"{lora.id}  {_mebibytes(lora.size)}")


def _ask(client: "Client", arguments: argparse.Namespace) -> "tuple[ModelInfo, ...]":
    """The models to print: all, or the one that was loaded or unloaded."""
    if not arguments.load_repo and (arguments.variant or arguments.revision):
        raise ValueError("--variant and --revision require --load-repo")
    if arguments.load or arguments.load_repo:
        reference = ModelReference(repo_id=arguments.load_repo, variant=arguments.variant, revision=arguments.revision)
        return (client.load_model(arguments.load or reference),)
    if arguments.unload:
        freed = client.unload_model(arguments.unload)
        print(f"{arguments.unload}: {_mebibytes(freed)} freed", file=sys.stderr)
        return (client.model(arguments.unload),)
    return client.models(timeout=_SECONDS_TO_LIST if arguments.timeout is None else arguments.timeout)


def _print_table(models: "tuple[ModelInfo, ...]", arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    engines = any(model.engines for model in models)
    details = any(model.detail for model in models)
    asked = {name: getattr(arguments, name) for name in ("schedulers", "fields", "speedups", "controlnets", "image_adapters")}
    shown = {"detail": details, "promotion": engines, **asked}
    more = [column.replace("_", " ") for column, is_shown in shown.items() if is_shown]
    table = Table("id", "family", "backend", "engine", "state", "memory", "default", *more)
    for model in models:
        memory = _mebibytes(model.memory_bytes) if model.memory_bytes and model.state == "ready" else ""
        default = "yes" if model.is_default else ""
        cells = [model.id, model.family, model.backend, model.engine, model.state, memory, default]
        if details:
            cells.append(model.detail)
        if engines:
            cells.append("\n".join(map(_describe_engine, model.engines)))
        if arguments.schedulers:
            cells.append("\n".join(model.schedulers))
        if arguments.fields:
            cells.append("\n".join(map(_describe_field, model.fields)))
        if arguments.speedups:
            cells.append("\n".join(map(_describe_speedup, model.speedups)))
        if arguments.controlnets:
            cells.append("\n".join(model.controlnets))
        if arguments.image_adapters:
            cells.append("\n".join(model.image_adapters))
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))  # Text, since a str would be read as markup.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    console.print(table)


def _describe_engine(engine: "EngineStatus") -> str:
    done = f" {engine.progress:.0%}" if engine.state in ("building", "checking") else ""
    return f"{engine.name} {engine.state}{done}" + (f": {engine.detail}" if engine.detail else "")


def _describe_speedup(speedup: "SpeedupInfo") -> str:
    bounds = f"{speedup.min_psnr_db:.1f} dB, SSIM {speedup.min_ssim:.3f}"
    return f"{speedup.times_faster:.2f} x at {bounds}: {speedup.name}"


def _describe_field(field: "FieldInfo") -> str:
    """A line such as "strength: 0.8, above 0 to 1"."""
    parts = ["required"] if field.required else []
    if field.default is not None:
        parts.append(json.dumps(field.default) if isinstance(field.default, str | bool) else f"{field.default:g}")
    if field.minimum is not None or field.maximum is not None:
        least = "" if field.minimum is None else f"{'above ' if field.exclusive_minimum else 'from '}{field.minimum:.20g} "
        parts.append(f"{least}{'' if field.maximum is None else f'to {field.maximum:.20g}'}".strip())
    if field.max_count:
        parts.append(f"at most {field.max_count}")
    if field.needs:
        parts.append(f"only with {field.needs}")
    return f"{field.name}: {', '.join(parts)}" if parts else field.name


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
