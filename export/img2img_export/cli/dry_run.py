"""`img2img export --dry-run`: the plan, sizes and memory of an export, estimated from file headers.

No weights are loaded, and those of a hub repository are not downloaded: a safetensors file begins with the names, types and
shapes of its tensors, and the hub serves this header alone.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.controls import FAMILY
from img2img_server.bundle.manifest import Precision, Source

from img2img_export.cli.terminal import quantity
from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import CONFIG_NAME, DENOISERS, INDEX_NAME, choose
from img2img_export.read.hub import download
from img2img_export.read.source import Checkpoint, resolve
from img2img_export.read.texts import read_json
from img2img_export.read.weights import WIDTHS, Contents, Header, Weights, is_graph, read_contents, weigh
from img2img_export.report import print_facts, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from img2img_export.convert.models import Plan

_FUSED = ("unet", "vae", FAMILY)
"""Components whose fp16 graphs get a second graph with fused operators."""

_MEMORY_FACTOR = 1.5
"""Memory required, as a multiple of the largest part's weights (mapped, so the system can evict them)."""
_LEAST_MEMORY = 2 * 10**9
"""Bytes: peak of libraries, activations and graphs, independent of the weights."""


@dataclass(frozen=True, slots=True)
class PartForecast:
    """The forecast for one component. `backend` is "onnx" or "torch", or "" for a component without weights, such as a tokenizer.

    `bytes` is the size of its weights in the bundle. `reason` says why its precision is not the requested one.
    """

    name: str
    kind: str
    backend: str
    parameters: int = 0
    stored: str = ""
    precision: str = ""
    bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an export would do. Sizes are estimates in bytes; `temporary_bytes` is additional disk space during export."""

    source: str
    output: str
    pipeline_class: str
    family: str
    backend: str
    backend_reason: str | None
    precision: str
    components: tuple[PartForecast, ...]
    loras: tuple[tuple[str, float], ...]
    scheduler: str | None
    source_bytes: int
    bundle_bytes: int
    temporary_bytes: int
    memory_bytes: int
    free_disk_bytes: int


def survey(options: ExportOptions, progress: Progress) -> tuple[Checkpoint, Contents]:
    """The checkpoint to export, and its contents. Raises ExportError if it is refused or not available."""
    is_here = Path(options.source).exists() or options.source.count("/") != 1 or options.config is not None
    if not is_here:
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            return _survey_hub(options, progress)
    checkpoint = resolve(options, progress)
    return checkpoint, read_contents(checkpoint)


def forecast(checkpoint: Checkpoint, options: ExportOptions, plan: "Plan", contents: Contents | None = None) -> Forecast:
    """What exporting `checkpoint` would do. `contents` is required if its files are not on this machine.

    Raises ExportError if a file is damaged or a LoRA is missing.
    """
    if missing := [lora.path for lora in options.loras if not lora.path.is_file()]:
        raise ExportError(f"no LoRA file at {missing[0]}")
    components = tuple(checkpoint.layout.components)
    weights = weigh(contents or read_contents(checkpoint), components, alone=checkpoint.kind == "controlnet")
    kinds = {**dict.fromkeys(weights, ""), **{name: kind for name, (_, kind) in checkpoint.layout.components.items()}}
    upcast = _is_upcast(checkpoint.directory / "vae" / "config.json")
    parts = tuple(_forecast_part(name, kind, weights.get(name), options.precision, plan, upcast) for name, kind in kinds.items())
    source_bytes, bundle_bytes = sum(part.bytes for part in weights.values()), sum(part.bytes for part in parts)
    rewritten = source_bytes if checkpoint.weights is not None or options.loras else 0
    return Forecast(
        source=options.source,
        output=str(options.output),
        pipeline_class=plan.pipeline_class,
        family=plan.family,
        backend=plan.backend,
        backend_reason=plan.reason,
        precision=options.precision,
        components=parts,
        loras=tuple((str(lora.path), lora.scale) for lora in options.loras),
        scheduler=options.scheduler,
        source_bytes=source_bytes,
        bundle_bytes=bundle_bytes,
        temporary_bytes=rewritten,
        memory_bytes=max(round(_MEMORY_FACTOR * max((_in_memory(part) for part in parts), default=0)), _LEAST_MEMORY),
        free_disk_bytes=_free_disk(options.output),
    )


def show(found: Forecast, console: "Console") -> None:
    """Prints the forecast as text."""
    print_line(console, f"dry run: nothing is written and no weights are loaded. {found.source} -> {found.output}")
    print_facts(
        console,
        [
            ("pipeline", f"{found.pipeline_class} (family {found.family})"),
            ("backend", found.backend + (f": {found.backend_reason}" if found.backend_reason else "")),
            ("precision", found.precision),
            ("scheduler", found.scheduler or ""),
            *(("LoRA", f"{name} at {scale:g}") for name, scale in found.loras),
            ("read", quantity(found.source_bytes)),
            ("bundle", f"about {quantity(found.bundle_bytes)}"),
            ("disk", f"about {quantity(found.bundle_bytes + found.temporary_bytes)} during the export{_warn(found)}"),
            ("memory", f"about {quantity(found.memory_bytes)} at its peak"),
        ],
    )
    rows = [
        (
            part.name,
            part.kind,
            {"onnx": "ONNX graph", "torch": "PyTorch"}.get(part.backend, "copied"),
            f"{part.parameters / 1e6:.1f} M" if part.parameters else "",
            part.stored,
            part.precision,
            quantity(part.bytes) if part.bytes else "",
            part.reason,
        )
        for part in found.components
    ]
    columns = ("component", "class", "becomes", ">parameters", "stored", "exported", ">in the bundle", "")
    print_table(console, "components", columns, rows)


def _survey_hub(options: ExportOptions, progress: Progress) -> tuple[Checkpoint, Contents]:
    """Fetches the configurations of a hub repository (a few kB), the headers of its weights and the sizes of its graphs."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, SafetensorsParsingError

    repo_id, hub, chosen = options.source, HfApi(), []

    def choose_texts(index: object, names: list[str]) -> list[str]:
        chosen.append(choose(index, names, options))
        return [name for name in names if name in (INDEX_NAME, CONFIG_NAME) or name.endswith(f"/{CONFIG_NAME}")]

    progress.stage(f"reading the metadata of {repo_id} on the hub")
    directory, _ = download(repo_id, options.revision, choose_texts, progress)
    ((kind, layout, files),) = chosen
    try:
        headers: dict[str, Header] = {
            name: hub.parse_safetensors_file_metadata(repo_id, name, revision=directory.name).tensors
            for name in files
            if name.endswith(".safetensors")
        }
        graphs = [name for name in files if is_graph(name)]
        found = hub.get_paths_info(repo_id, graphs, revision=directory.name) if graphs else []
    except (HTTPError, SafetensorsParsingError) as error:
        raise ExportError(f"cannot read the sizes of {repo_id} from the hub: {first_line(error)}") from None
    checkpoint = Checkpoint(directory, tuple(files), layout, Source(repo_id=repo_id), kind)
    return checkpoint, Contents(headers, {item.path: item.size for item in found})


def _forecast_part(
    name: str, kind: str, weights: Weights | None, requested: Precision, plan: "Plan", upcast: bool
) -> PartForecast:
    if weights is None:
        return PartForecast(name, kind, "")
    part = "vae" if name.startswith("vae_") else name
    is_graph = part in plan.graphs
    precision, reason = str(requested), ""
    if requested == "int8" and not (is_graph and name.startswith((*DENOISERS, "text_encoder", "vae", FAMILY))):
        precision, reason = "fp32", "int8 applies only to the graphs of denoisers, ControlNets, text encoders and VAE decoders"
    elif requested == "fp16" and part == "vae" and upcast:
        precision, reason = "fp32", "the model declares that its VAE overflows in fp16"
    if precision == "int8":
        products = weights.products
        if part == "vae":
            products, reason = products // 2, "only its decoder is in int8"
        size = products + 4 * (weights.parameters - products)
    else:
        size = WIDTHS[precision] * weights.parameters
    if precision == "fp16" and is_graph and part in _FUSED:
        size *= 2  # The second graph, with fused CUDA operators, has its own weights.
    backend = "onnx" if is_graph else "torch"
    return PartForecast(name, kind, backend, weights.parameters, weights.stored, precision, size, reason)


def _in_memory(part: PartForecast) -> int:
    return part.parameters * max(WIDTHS.get(part.stored, 1), WIDTHS.get(part.precision, 1))


def _is_upcast(config: Path) -> bool:
    try:
        return bool(read_json(config).get("force_upcast"))
    except (OSError, ValueError, AttributeError):
        return False


def _free_disk(output: Path) -> int:
    """Free bytes on the file system of the output."""
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    return shutil.disk_usage(nearest).free


def _warn(found: Forecast) -> str:
    lacks = found.bundle_bytes + found.temporary_bytes > found.free_disk_bytes
    return f"; only {quantity(found.free_disk_bytes)} are free" if lacks else ""
