"""`img2img export --dry-run`: the plan, sizes and memory of an export, estimated from file headers.

No weights are loaded, and those of a hub repository are not downloaded: a safetensors file begins with the names, types and
shapes of its tensors, and the hub serves this header alone.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_server.bundle import companions, controls
from img2img_server.bundle.manifest import (
    WEIGHT_BYTES,
    Precision,
    Source,
    WeightFormat,
    is_text_encoder,
    numbers_in_words,
)

from img2img_export.cli.terminal import quantity
from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import CONFIG_NAME, DENOISERS, INDEX_NAME, LANGUAGE_MODELS, choose
from img2img_export.read.hub import download
from img2img_export.read.source import Checkpoint, resolve
from img2img_export.read.texts import read_json
from img2img_export.read.weights import Contents, Header, InGraph, Weights, is_graph, read_contents, weigh
from img2img_export.report import print_facts, print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from img2img_export.convert.models import Plan

_FUSED = ("unet", "vae", controls.FAMILY)
"""Components whose fp16 graphs get a second graph with fused operators."""

_MEMORY_FACTOR = 1.5
"""Memory required, as a multiple of the largest part's weights (mapped, so the system can evict them)."""
_GPUS = (8, 12, 16, 24, 32, 48, 80, 96, 141, 180)
"""Memory of common GPUs, in GB."""
_ACTIVATIONS = 2 * 10**9
"""Bytes of a GPU that are left for activations and libraries: a guess, since they grow with size and batch."""
_ALTERNATIVES: tuple[tuple[Precision, WeightFormat], ...] = (
    ("fp32", ""),
    ("fp16", ""),
    ("bf16", ""),
    ("fp32", "int8"),
    ("fp32", "int4"),
    ("fp16", "int8"),
    ("fp16", "int4"),
)
"""The precisions and weight formats whose sizes are shown."""
_NARROWED = ("diffusers", "single-file")
"""The kinds of checkpoints of which weights can be quantized."""
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
    weight_format: WeightFormat = ""
    gpu_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Alternative:
    """The same export in another precision and format of weights: bytes of the bundle, and of weights on a GPU, also without text
    encoders."""

    precision: str
    weight_format: WeightFormat
    bundle_bytes: int
    gpu_bytes: int
    offloaded_gpu_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """The plan of an export. Sizes are estimates in bytes; `temporary_bytes` is additional disk space during export. `gpu_bytes`
    are those of the weights on a GPU that serves the bundle, `offloaded_gpu_bytes` those without text encoders, whose weights
    `img2img serve --offload text-encoders` keeps in host memory."""

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
    gpu_bytes: int
    offloaded_gpu_bytes: int
    weight_format: WeightFormat = ""
    alternatives: tuple[Alternative, ...] = ()


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
    """Plans the export of `checkpoint`. `contents` is required if its files are not on this machine.

    Raises ExportError if a file is damaged or a LoRA is missing.
    """
    if missing := [lora.path for lora in options.loras if not lora.path.is_file()]:
        raise ExportError(f"no LoRA file at {missing[0]}")
    components = tuple(checkpoint.layout.components)
    contents = contents or read_contents(checkpoint)
    whole = weigh(contents, components, alone=checkpoint.kind == "companion")
    kinds = {**dict.fromkeys(whole, ""), **{name: kind for name, (_, kind) in checkpoint.layout.components.items()}}
    graphs = {name: InGraph(plan.last_state, plan.sees_images) for name in plan.graphs if kinds.get(name) in LANGUAGE_MODELS}
    weights = weigh(contents, components, alone=checkpoint.kind == "companion", in_graph=graphs)
    upcast = _is_upcast(checkpoint.directory / "vae" / "config.json")

    def sized(options: ExportOptions) -> tuple[PartForecast, ...]:
        return tuple(_forecast_part(name, kind, weights.get(name), options, plan, upcast) for name, kind in kinds.items())

    parts = sized(options)
    others = [(precision, narrow) for precision, narrow in _ALTERNATIVES if checkpoint.kind in _NARROWED or not narrow]
    source_bytes, bundle_bytes = sum(part.bytes for part in whole.values()), sum(part.bytes for part in parts)
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
        memory_bytes=max(round(_MEMORY_FACTOR * max((_in_memory(part, whole) for part in parts), default=0)), _LEAST_MEMORY),
        free_disk_bytes=_free_disk(options.output),
        gpu_bytes=sum(part.gpu_bytes for part in parts),
        offloaded_gpu_bytes=_without_text_encoders(parts),
        weight_format=options.weight_format,
        alternatives=tuple(
            Alternative(
                precision,
                narrow,
                sum(part.bytes for part in made),
                sum(part.gpu_bytes for part in made),
                _without_text_encoders(made),
            )
            for precision, narrow in others
            for made in [sized(replace(options, precision=precision, weight_format=narrow))]
        ),
    )


def show(found: Forecast, console: "Console") -> None:
    """Prints the forecast as text."""
    print_line(console, f"dry run: nothing is written and no weights are loaded. {found.source} -> {found.output}")
    print_facts(
        console,
        [
            ("pipeline", f"{found.pipeline_class} (family {found.family})"),
            ("backend", found.backend + (f": {found.backend_reason}" if found.backend_reason else "")),
            ("precision", numbers_in_words(found.precision, found.weight_format)),
            ("scheduler", found.scheduler or ""),
            *(("LoRA", f"{name} at {scale:g}") for name, scale in found.loras),
            ("read", quantity(found.source_bytes)),
            ("bundle", f"about {quantity(found.bundle_bytes)}"),
            ("disk", f"about {quantity(found.bundle_bytes + found.temporary_bytes)} during the export{_warn(found)}"),
            ("memory", f"about {quantity(found.memory_bytes)} at its peak"),
            ("served on a GPU", f"about {quantity(found.gpu_bytes)} of weights; {_card(found.gpu_bytes)}"),
            ("without text encoders", f"about {quantity(found.offloaded_gpu_bytes)}; {_card(found.offloaded_gpu_bytes)}"),
        ],
    )
    rows = [
        (
            part.name,
            part.kind,
            {"onnx": "ONNX graph", "torch": "PyTorch"}.get(part.backend, "copied"),
            f"{part.parameters / 1e6:.1f} M" if part.parameters else "",
            part.stored,
            numbers_in_words(part.precision, part.weight_format),
            quantity(part.bytes) if part.bytes else "",
            part.reason,
        )
        for part in found.components
    ]
    columns = ("component", "class", "becomes", ">parameters", "stored", "exported", ">in the bundle", "")
    print_table(console, "components", columns, rows)
    if found.backend != "torch":
        sizes = [
            (
                numbers_in_words(one.precision, one.weight_format),
                quantity(one.bundle_bytes),
                quantity(one.gpu_bytes),
                _card(one.gpu_bytes),
                quantity(one.offloaded_gpu_bytes),
                _card(one.offloaded_gpu_bytes),
            )
            for one in found.alternatives
        ]
        names = ("precision", ">bundle", ">weights on a GPU", "fits", ">without text encoders", "fits")
        print_table(console, "in other precisions", names, sizes)


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


def _without_text_encoders(parts: tuple[PartForecast, ...]) -> int:
    """The bytes of weights on a GPU if those of text encoders stay in host memory."""
    return sum(part.gpu_bytes for part in parts if not is_text_encoder(part.name))


def _card(weights: int) -> str:
    """The GPUs that weights of so many bytes fit into."""
    least = next((size for size in _GPUS if size * 10**9 >= weights + _ACTIVATIONS), None)
    return f"GPUs of {least} GB and more" if least is not None else f"more than a GPU of {_GPUS[-1]} GB has"


def _forecast_part(
    name: str, kind: str, weights: Weights | None, options: ExportOptions, plan: "Plan", upcast: bool
) -> PartForecast:
    if weights is None:
        return PartForecast(name, kind, "")
    requested = options.precision
    part = "vae" if name.startswith("vae_") else name
    is_graph = part in plan.graphs
    precision, reason = str(requested), ""
    if requested == "int8" and not (is_graph and name.startswith((*DENOISERS, "text_encoder", "vae", *companions.FAMILIES))):
        precision, reason = "fp32", "int8 applies only to the graphs of denoisers, ControlNets, encoders and VAE decoders"
    elif requested == "fp16" and part == "vae" and upcast:
        precision, reason = "fp32", "the model declares that its VAE overflows in fp16"
    if precision == "int8":
        products = weights.products
        if part == "vae":
            products, reason = products // 2, "only its decoder is in int8"
        size = products + 4 * (weights.parameters - products)
    else:
        size = WEIGHT_BYTES[precision] * weights.parameters
    narrow: WeightFormat = ""
    in_graph = is_graph and name.startswith(("transformer", "text_encoder"))
    if options.weight_format and (in_graph or (plan.graphs and is_text_encoder(name))):
        narrow = options.weight_format
        size -= round(weights.products * (WEIGHT_BYTES[precision] - _narrow_width(WEIGHT_BYTES[precision], options)))
    elif options.weight_format and name.startswith((*DENOISERS, "text_encoder")):
        reason = reason or "--weight-format applies only to transformers and text encoders, of bundles with graphs"
    on_gpu = size
    if plan.backend == "torch":
        on_gpu = WEIGHT_BYTES["bf16"] * weights.parameters  # PyTorch runs in half precision on a GPU
    if precision == "fp16" and is_graph and part in _FUSED:
        size *= 2  # The second graph, with fused CUDA operators, has its own weights.
    backend = "onnx" if is_graph else "torch"
    return PartForecast(name, kind, backend, weights.parameters, weights.stored, precision, size, reason, narrow, on_gpu)


def _narrow_width(width: int, options: ExportOptions) -> float:
    """Bytes of a quantized weight: its bits, and its part of a block's scale (of `width` bytes) and zero point."""
    bits = {"int8": 8, "int4": 4}[options.weight_format]
    return bits / 8 + (width + bits / 8) / options.group_size


def _in_memory(part: PartForecast, weights: Mapping[str, Weights]) -> int:
    parameters = weights[part.name].parameters if part.name in weights else 0
    return parameters * max(WEIGHT_BYTES.get(part.stored, 1), WEIGHT_BYTES.get(part.precision, 1))


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
