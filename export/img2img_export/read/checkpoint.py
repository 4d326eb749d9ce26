"""Selects the files of a checkpoint to read, and refuses checkpoints with pickles or custom code.

Uses only file names and model_index.json, so a hub repository is checked before anything is downloaded; the contents of weight
indexes and configurations are checked after the download.
"""

import fnmatch
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from img2img_server.bundle import controls, image_encoders
from img2img_server.bundle.companions import NAMES
from img2img_server.bundle.unsafe_files import INDEX, refuse_unsafe_config, refuse_unsafe_parts
from img2img_server.errors import BundleError

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.read.layout_checks import INDEX_NAME as INDEX_NAME
from img2img_export.read.layout_checks import refuse_incomplete
from img2img_export.read.texts import read_json
from img2img_export.read.weights_file import PICKLE_REASON, is_pickle, is_safetensors

GRAPH_NAME = "model.onnx"
LANGUAGE_MODELS = (
    "Qwen3Model",
    "Qwen3ForCausalLM",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
)
"""The classes that are language models."""
CONFIG_NAME = "config.json"
_COMPONENT_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""The names of a component's weights before the variant, of diffusers and of transformers."""

_UNFOLLOWED = dict.fromkeys(
    (
        "SD3ControlNetModel",
        "QwenImageControlNetModel",
        "ZImageControlNetModel",
        "HunyuanDiT2DControlNetModel",
        "SanaControlNetModel",
    ),
    "diffusers has no image-to-image pipeline with it to follow",
)
"""Why some classes of ControlNets are not exported."""

Kind = Literal["diffusers", "single-file", "onnx", "companion"]
"""The kind of a source: weights in diffusers' layout, all weights in one file, graphs made by optimum-cli, or a companion (a
ControlNet or an image encoder), which is a single component of diffusers or transformers: a config.json and its weights."""

TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_WEIGHTS = re.compile(r"[^.]+?(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.(?i:safetensors)")
_SHARD_INDEX = re.compile(r"[^.]+\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
DENOISERS = ("unet", "transformer")
_GRAPHS_OF_VAE = ("vae_encoder", "vae_decoder")
"""Optimum's folders for a VAE, which model_index.json does not name."""

DROPPED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of Stable Diffusion pipelines that image-to-image does not need; they are neither read nor exported."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The contents of model_index.json: the pipeline's class, each component's (library, class), and the components left out."""

    pipeline_class: str
    components: dict[str, tuple[str, str]]
    left_out: tuple[str, ...]


def read_layout(index: Mapping[str, Any]) -> Layout:
    """Parses a model_index.json. Raises ExportError if a class is not from diffusers or transformers."""
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise ExportError(f"{INDEX_NAME} names a pipeline with custom code ({pipeline_class!r}), which is never run")
    pipeline_class = pipeline_class.removeprefix("ORT")  # optimum's pipelines are those of diffusers with graphs
    components: dict[str, tuple[str, str]] = {}
    left_out = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or None in value:
            continue
        library, kind = value
        if name in DROPPED and pipeline_class.startswith("StableDiffusion"):
            left_out.append(name)
        elif not name.isidentifier() or not _is_known_library(library):
            raise ExportError(f"component {name!r} is a {library}.{kind}: only classes of diffusers and transformers are run")
        else:
            components[name] = (library, kind)
    return Layout(pipeline_class, components, tuple(left_out))


def choose(index: Any, names: Iterable[str], options: ExportOptions) -> tuple[Kind, Layout, list[str]]:
    """The kind and layout of a checkpoint with this model_index.json, and which of its files `names` to read for `options`.

    For a component (`is_component`), `index` is its config.json.
    """
    names = list(names)
    if is_component(names):
        return "companion", *_choose_component(index, names, options)
    layout = _parse_layout(index, options.source)
    if not _has_graphs_only(names):
        if not (options.allow_patterns or options.ignore_patterns):
            refuse_incomplete(options.source, layout.components, names, wants_weights=True)
        weights = select_files(names, layout, options.variant, options.allow_patterns, options.ignore_patterns)
        return "diffusers", layout, weights
    if options.variant is not None:
        raise ExportError(f"{options.source} holds ONNX graphs, which have no variants: drop --variant")
    return "onnx", layout, _select_graphs(names, layout, options)


def is_component(names: Iterable[str]) -> bool:
    """Whether the files `names` are those of a component, and not of a pipeline."""
    names = set(names)
    return INDEX_NAME not in names and CONFIG_NAME in names and any(map(_is_component_weights, names))


def _is_component_weights(name: str) -> bool:
    """Whether a file has a component's weights: "model.fp16.safetensors", "model-00001-of-00002.safetensors"."""
    return re.split(r"[.-]", name)[0] in _COMPONENT_WEIGHTS and (is_safetensors(name) or is_pickle(name) or INDEX in name)


def _choose_component(config: Any, names: list[str], options: ExportOptions) -> tuple[Layout, list[str]]:
    """The layout of a companion, and its files to read. Raises ExportError for any other component."""
    library, name = _class_of_component(config)
    family = image_encoders.FAMILY if name == image_encoders.CLASS else controls.FAMILY
    if name not in (*controls.CLASSES, image_encoders.CLASS):
        kind = f"a {name}, a component" if name else "a component"
        if "ControlNet" in name:
            why = f" ({_UNFOLLOWED[name]})" if name in _UNFOLLOWED else ""
            raise ExportError(
                f"{options.source} is a {name}{why}: img2img exports the ControlNets of Stable Diffusion 1, 2 and XL and of Flux "
                f"({', '.join(controls.CLASSES)})"
            )
        raise ExportError(
            f"{options.source} is {kind} and not a model: it has no {INDEX_NAME}; choose the directory of the complete model"
        )
    if config.get("quantization_config") is not None:
        raise ExportError(
            f"{options.source} is quantized (quantization_config in its config.json): export it in fp16, bf16 or fp32"
        )
    _refuse_for_companions(options, NAMES[family])
    own = [name for name in names if "/" not in name]
    if code := [name for name in own if name.endswith(".py")]:
        raise ExportError(f"the checkpoint contains custom code ({code[0]}), which is never run")
    weights = _weights(options.source, list(filter(_is_component_weights, own)), options.variant)
    return Layout(name, {family: (library, name)}, ()), sorted([CONFIG_NAME, *weights])


def _class_of_component(config: Any) -> tuple[str, str]:
    """The library and the class of a component with this config.json; the class is "" if it names none."""
    if not isinstance(config, dict):
        return "", ""
    classes = config.get("architectures")
    if isinstance(classes, list) and len(classes) == 1 and isinstance(classes[0], str):
        return "transformers", classes[0]
    name = config.get("_class_name")
    return "diffusers", name if isinstance(name, str) else ""


def _refuse_for_companions(options: ExportOptions, what: str) -> None:
    """Raises ExportError for an option that a companion has no use for; `what` it is."""
    for flag, is_set in (
        ("--lora", bool(options.loras)),
        ("--scheduler", options.scheduler is not None),
        ("--reference", options.reference is not None),
        ("--control-graphs", options.control_graphs),
        ("--speedups", options.speedups),
        ("--backend", options.backend not in ("auto", "onnx")),
        ("--allow-pattern and --ignore-pattern", bool(options.allow_patterns or options.ignore_patterns)),
    ):
        if is_set:
            raise ExportError(f"{options.source} is {what}, which becomes one graph: {flag} does not apply")


def choose_texts(index: Any, names: Iterable[str], source: str) -> tuple[Layout, list[str]]:
    """The layout of a model_index.json, and which of the files `names` are its configurations and tokenizers."""
    layout = _parse_layout(index, source)
    names = list(names)
    refuse_incomplete(source, layout.components, names, wants_weights=False)
    parts = _by_component(names, tuple(layout.components))
    return layout, sorted([INDEX_NAME, *(name for files in parts.values() for name in _texts(files))])


def _parse_layout(index: Any, source: str) -> Layout:
    if not isinstance(index, dict):
        raise ExportError(f"{source}: {INDEX_NAME} must be a JSON object")
    return read_layout(index)


def read_index(path: Path) -> Any:
    """The contents of a model_index.json. Raises ExportError if it is missing or damaged."""
    try:
        return read_json(path)
    except FileNotFoundError:
        raise ExportError(f"{path.parent} is not in diffusers' layout: it has no {INDEX_NAME}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None


def refuse_unsafe(directory: Path, files: Iterable[str]) -> None:
    """Raises ExportError if one of the `files` in `directory` is a weight index that lists anything but safetensors beside it, or
    a configuration that refers to code or to other files."""
    for name in files:
        refuse = refuse_unsafe_parts if INDEX in name.rpartition("/")[2].lower() else refuse_unsafe_config
        try:
            refuse(directory / name)
        except BundleError as error:
            raise ExportError(str(error)) from None


def names_below(directory: Path) -> list[str]:
    """The files in a directory and its immediate folders (the depth of a checkpoint), as paths with slashes."""
    paths = [*directory.glob("*"), *directory.glob("*/*")]
    return sorted(path.relative_to(directory).as_posix() for path in paths if path.is_file())


def _is_known_library(name: object) -> bool:
    """Whether a library is diffusers, transformers or one of diffusers' pipeline packages, such as "stable_diffusion"."""
    if name in ("diffusers", "transformers"):
        return True
    diffusers = importlib.util.find_spec("diffusers")
    if diffusers is None or diffusers.origin is None or not isinstance(name, str) or not name.isidentifier():
        return False
    return (Path(diffusers.origin).parent / "pipelines" / name).is_dir()


def select_files(
    names: Iterable[str],
    layout: Layout,
    variant: str | None,
    allow_patterns: tuple[str, ...] = (),
    ignore_patterns: tuple[str, ...] = (),
) -> list[str]:
    """The files to read among `names` (paths with slashes), sorted: texts, and safetensors weights of `variant`.

    A component without weights of the variant is read without a variant, like diffusers does. Raises ExportError if the
    checkpoint contains code, or a component has no safetensors weights.
    """
    parts = _by_component(names, tuple(layout.components), allow_patterns, ignore_patterns)
    chosen = [INDEX_NAME]
    for component, files in parts.items():
        chosen += _texts(files)
        if any(name == f"{component}/config.json" for name in files):
            chosen += _weights(component, files, variant)
    return sorted(chosen)


def _select_graphs(names: Iterable[str], layout: Layout, options: ExportOptions) -> list[str]:
    """The texts and graphs of an optimum-cli directory, including weights beside a graph (`model.onnx_data`)."""
    folders = (*layout.components, *_GRAPHS_OF_VAE)
    parts = _by_component(names, folders, options.allow_patterns, options.ignore_patterns)
    files = [name for part in parts.values() for name in part]
    graphs = [name for name in files if name.rpartition("/")[2].startswith(GRAPH_NAME)]
    return sorted([INDEX_NAME, *_texts(files), *graphs])


def _has_graphs_only(names: list[str]) -> bool:
    """Whether the denoiser is a graph without PyTorch weights (a hub repository may have both)."""
    return any(
        f"{part}/{GRAPH_NAME}" in names
        and not any(name.startswith(f"{part}/") and (is_safetensors(name) or is_pickle(name)) for name in names)
        for part in DENOISERS
    )


def _by_component(
    names: Iterable[str], components: Iterable[str], allow: tuple[str, ...] = (), ignore: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """The selected files of each component. Raises ExportError if there is code among them."""
    parts: dict[str, list[str]] = {component: [] for component in components}
    for name in names:
        path = PurePosixPath(name)
        folder = path.parts[0] if len(path.parts) > 1 else ""
        if path.suffix == ".py" and (not folder or folder in parts):
            raise ExportError(f"the checkpoint contains custom code ({name}), which is never run")
        if folder in parts and _is_wanted(name, allow, ignore):
            parts[folder].append(name)
    return parts


def _is_wanted(name: str, allow_patterns: tuple[str, ...], ignore_patterns: tuple[str, ...]) -> bool:
    """Whether the name matches an allowed pattern (if any are given) and no ignored pattern, as on the hub."""

    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatch(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)

    return (not allow_patterns or matches(allow_patterns)) and not matches(ignore_patterns)


def _texts(files: list[str]) -> list[str]:
    """All texts except weight indexes: loaders would follow whatever they list."""
    return [name for name in files if name.endswith(TEXT_SUFFIXES) and INDEX not in name.rpartition("/")[2].lower()]


def _weights(component: str, files: list[str], variant: str | None) -> list[str]:
    """The safetensors of a component, and their index if there are several."""
    found: dict[str | None, list[str]] = {}
    indexes: dict[str | None, list[str]] = {}
    for name in files:
        base = name.rpartition("/")[2]
        if match := _WEIGHTS.fullmatch(base):
            found.setdefault(match["variant"], []).append(name)
        elif match := _SHARD_INDEX.fullmatch(base):
            indexes.setdefault(match["variant"], []).append(name)
    key = variant if variant in found else None
    if key in found:
        return found[key] + indexes.get(key, [])
    if found:
        others = ", ".join(str(name) for name in found)
        raise ExportError(f"{component} has no weights of variant {variant or 'none'}, only of {others}: choose with --variant")
    if any(is_pickle(name) for name in files):
        raise ExportError(f"{component} has pickled weights only: {PICKLE_REASON}")
    raise ExportError(f"{component} has no safetensors weights: add them, or choose a source that has them")
