"""`img2img export --dry-run`: what would be done, how large it would be and what it would take, from the headers of files.

No weights are loaded, and those of a hub repository are not downloaded: a safetensors file begins with the names, types and
shapes of its tensors, and the hub gives just that part of it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle.limits import Precision
from img2img_server.bundle.manifest import Source

from img2img_export.cli.terminal import quantity
from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import DENOISERS, INDEX_NAME, choose
from img2img_export.read.hub import download
from img2img_export.read.source import Checkpoint, resolve
from img2img_export.read.texts import read_json
from img2img_export.read.weights import WIDTHS, Contents, Header, Weights, is_graph, read_contents, weigh
from img2img_export.report import print_facts, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from img2img_export.convert.models import Plan

_FUSED = ("unet", "vae")
"""The components whose graphs in fp16 have others with fused operators beside them."""

_MEMORY_FACTOR = 1.5
"""Memory that is enough, over the largest part's weights: they are mapped, and let go of where it is scarce."""
_LEAST_MEMORY = 2 * 10**9
"""What libraries, activations and graphs take at their peak, whatever the weights."""


@dataclass(frozen=True, slots=True)
class PartForecast:
    """What would become of a component. `backend` is "onnx" or "torch", and "" for one that has no weights, as a tokenizer.

    `bytes` are those of its weights in the bundle. `reason` says why its precision is not the one that was asked for.
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
    """What an export would do. Sizes in bytes, and estimates: `temporary_bytes` on disk beside the bundle's own while it runs."""

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
    """The checkpoint to be exported, and what its files hold. Raises ExportError where it is refused or cannot be had."""
    is_here = Path(options.source).exists() or options.source.count("/") != 1 or options.config is not None
    if not is_here:
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            return _survey_hub(options, progress)
    checkpoint = resolve(options, progress)
    return checkpoint, read_contents(checkpoint)


def forecast(checkpoint: Checkpoint, options: ExportOptions, plan: "Plan", contents: Contents | None = None) -> Forecast:
    """What exporting `checkpoint` would do; `contents` where its files are not on this machine.

    Raises ExportError where a file is damaged or a LoRA missing.
    """
    if missing := [lora.path for lora in options.loras if not lora.path.is_file()]:
        raise ExportError(f"there is no LoRA at {missing[0]}")
    weights = weigh(contents or read_contents(checkpoint), tuple(checkpoint.layout.components))
    kinds = {**dict.fromkeys(weights, ""), **{name: kind for name, (_, kind) in checkpoint.layout.components.items()}}
    upcast = _is_upcast(checkpoint.directory / "vae" / "config.json")
    parts = tuple(_foretell(name, kind, weights.get(name), options.precision, plan, upcast) for name, kind in kinds.items())
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


def show(told: Forecast, console: "Console") -> None:
    """Prints it for a person."""
    print_line(console, f"dry run: nothing is written, and no weights are loaded. {told.source} -> {told.output}")
    print_facts(
        console,
        [
            ("pipeline", f"{told.pipeline_class} (family {told.family})"),
            ("backend", told.backend + (f": {told.backend_reason}" if told.backend_reason else "")),
            ("precision", told.precision),
            ("scheduler", told.scheduler or ""),
            *(("LoRA", f"{name} at {scale:g}") for name, scale in told.loras),
            ("read", quantity(told.source_bytes)),
            ("bundle", f"about {quantity(told.bundle_bytes)}"),
            ("disk", f"about {quantity(told.bundle_bytes + told.temporary_bytes)} while it runs{_warn(told)}"),
            ("memory", f"about {quantity(told.memory_bytes)} at its peak"),
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
        for part in told.components
    ]
    columns = ("component", "class", "becomes", ">parameters", "stored", "exported", ">in the bundle", "")
    print_table(console, "components", columns, rows)


def _survey_hub(options: ExportOptions, progress: Progress) -> tuple[Checkpoint, Contents]:
    """Fetches the configurations (a few kB) of a hub repository, the headers of its weights and the sizes of its graphs."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, SafetensorsParsingError

    repo_id, hub, chosen = options.source, HfApi(), []

    def choose_texts(index: object, names: list[str]) -> list[str]:
        chosen.append(choose(index, names, options))
        return [name for name in names if name == INDEX_NAME or name.endswith("/config.json")]

    progress.stage(f"asking the hub about {repo_id}")
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
        raise ExportError(f"the hub does not tell how large {repo_id} is: {first_line(error)}") from None
    checkpoint = Checkpoint(directory, tuple(files), layout, Source(repo_id=repo_id), kind)
    return checkpoint, Contents(headers, {item.path: item.size for item in found})


def _foretell(name: str, kind: str, weights: Weights | None, asked: Precision, plan: "Plan", upcast: bool) -> PartForecast:
    if weights is None:
        return PartForecast(name, kind, "")
    part = "vae" if name.startswith("vae_") else name
    is_graph = part in plan.graphs
    precision, reason = str(asked), ""
    if asked == "int8" and not (is_graph and name.startswith((*DENOISERS, "text_encoder"))):
        precision, reason = "fp32", "only the matrices of graphs of denoisers and text encoders become int8"
    elif asked == "fp16" and part == "vae" and upcast:
        precision, reason = "fp32", "the model says that its VAE overflows in fp16"
    if precision == "int8":
        size = weights.matrices + 4 * (weights.parameters - weights.matrices)
    else:
        size = WIDTHS[precision] * weights.parameters
    if precision == "fp16" and is_graph and part in _FUSED:
        size *= 2  # A second graph, with fused operators for CUDA, has weights of its own.
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
    """Bytes that are free where the bundle is to be."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _warn(told: Forecast) -> str:
    lacks = told.bundle_bytes + told.temporary_bytes > told.free_disk_bytes
    return f"; only {quantity(told.free_disk_bytes)} are free" if lacks else ""
