"""Converts a model in one safetensors file, with the key names of the original trainers, to diffusers' layout.

The file has weights only. Configurations and tokenizers come from a template: a directory or hub repository in diffusers'
layout, of which only texts are read.
"""

import dataclasses
import gc
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read.checkpoint import INDEX_NAME, Layout, choose_texts, names_below, read_index
from img2img_export.read.digests import Digests
from img2img_export.read.identify import refuse_channels, refuse_part
from img2img_export.read.prediction import MARKERS, Sampling, apply, rename_scheduler, sampling_of
from img2img_export.read.scaled import FLOAT8, dequantize, describes_scaling, refuse_other_quantization, scales_of
from img2img_export.read.weights_file import TensorInfo, read_header, require_safetensors

if TYPE_CHECKING:
    import torch

_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
"""Prefixes of a component's tensors, used to find precision and scales. (diffusers converts the names.)"""

_CLIP = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.\d|text_encoders\.clip_[lg])\.transformer)\.((?:embeddings|encoder|final_layer_norm)\..*)"
)
"""Names of a CLIP text encoder without `text_model`, as written by old trainers and transformers 5."""
_UNET = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\..*")
_DIFFUSION_MODEL = "model.diffusion_model."

_CONVERT_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, IndexError)


def canonical(names: Mapping[str, Any]) -> dict[str, str]:
    """Maps the tensor names that diffusers expects to the names in the file.

    Names of a CLIP text encoder may lack `text_model`, and those of a UNet all or the first word of their prefix.
    """
    bare = not any(name.startswith(_DIFFUSION_MODEL) for name in names)
    found = {}
    for name in names:
        new = name
        if match := _CLIP.fullmatch(name):
            new = f"{match[1]}.text_model.{match[2]}"
        elif bare and (name.startswith("diffusion_model.") or _UNET.fullmatch(name)):
            new = _DIFFUSION_MODEL + name.removeprefix("diffusion_model.")
        found[name if new in names else new] = name
    return found


def refuse_unreadable(path: Path) -> None:
    """Raises ExportError unless a single file is a complete model in a supported format; reads its header only."""
    require_safetensors(path)
    tensors, notes = read_header(path)
    refuse_other_quantization(str(path), tensors, notes)
    refuse_part(path, tensors)


def find_template(options: ExportOptions, digest: str, digests: Digests, progress: Progress) -> tuple[Path, Layout, list[str]]:
    """The template directory for a single file (configurations and tokenizers), its layout, and its files to read.

    `digest` is the file's SHA-256. Raises ExportError if the file or the template is refused.
    """
    if options.config is not None and Path(options.config).is_dir():
        template, directory = options.config, Path(options.config).resolve()
        names = names_below(directory)
    else:
        from img2img_export.read.hub import download

        # Cached, so that diffusers is loaded the first time only.
        question = f"which template diffusers {metadata.version('diffusers')} has for {digest}"
        template = options.config or digests.recall(question, lambda: _infer_template(Path(options.source)))
        progress.stage(f"finding the configurations of {template}")
        directory, names = download(template, None, lambda index, names: choose_texts(index, names, template)[1], progress)
    layout, files = choose_texts(read_index(directory / INDEX_NAME), names, template)
    refuse_channels(options.source, read_header(Path(options.source))[0], layout.pipeline_class)
    return directory, layout, files


def _infer_template(path: Path) -> str:
    """The repository that diffusers detects for a checkpoint with these tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    header, _ = read_header(path)
    tensors = {name: header[own] for name, own in canonical(header).items()}
    try:
        return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
    except (KeyError, TypeError, ValueError, AttributeError, UnboundLocalError) as error:
        raise ExportError(
            f"diffusers cannot detect the kind of {path} ({first_line(error)}): choose its base model with --config"
        ) from None


def convert(path: Path, layout: Layout, directory: Path, progress: Progress) -> Layout:
    """Writes the weights of each component of `layout` in stored precision (scaled float8 in fp32) into `directory`, which has
    the template's texts. Applies the file's sampling to the configurations, and returns the changed layout.

    At most one component is in memory at a time. Raises ExportError if the file does not fit the template, or contains weights
    that no component uses.
    """
    import torch
    from safetensors.torch import load_file

    from img2img_export.read.unused import refuse_unused, untraced

    header, notes = read_header(path)
    stored = load_file(path)
    layout = _apply_sampling(sampling_of(header, notes, stored), layout, directory)
    scales = scales_of(header)
    used = {*MARKERS, *scales.values(), *filter(describes_scaling, header)}
    for name, (library, class_name) in layout.components.items():
        kind = _find_class(library, class_name)
        if issubclass(kind, torch.nn.Module):
            progress.stage(f"converting {name}")
            checkpoint = dict(_of_component(path, name, stored, scales))
            precision = _precision(header, name, scales)
            module = _load(path, checkpoint, name, (library, class_name), directory, precision)
            del checkpoint
            used |= untraced(module)
            for link in (directory / name).iterdir():
                link.unlink()  # else save_pretrained would write through the link into the template
            module.save_pretrained(directory / name, safe_serialization=True)
            del module
            gc.collect()
    idle = set(_idle(stored, layout))
    refuse_unused(str(path), header.keys() - used - idle, used, " (wrong --config?)")
    return layout


def _apply_sampling(sampling: Sampling, layout: Layout, directory: Path) -> Layout:
    """Writes the file's sampling into the configurations, and returns the changed layout."""
    if "scheduler" not in layout.components:
        return layout
    library, before = layout.components["scheduler"]
    after = apply(sampling, directory, before)
    if after == before:
        return layout
    rename_scheduler(directory / INDEX_NAME, after)
    return dataclasses.replace(layout, components={**layout.components, "scheduler": (library, after)})


def _of_component(
    path: Path, component: str, stored: Mapping[str, Any], scales: Mapping[str, str]
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yields the tensors by diffusers' names, each with its name in the file as its origin; those of `component` dequantized."""
    from img2img_export.read.unused import traced

    names = canonical(stored)
    whole = dequantize(path, stored, scales, [own for name, own in names.items() if _is_of(component, name)])
    for name, own in names.items():
        if own not in scales.values() and not describes_scaling(own):
            yield name, traced(own, whole.get(own, stored[own]))


def _idle(stored: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Yields the names of text encoder projections that have no effect."""
    from img2img_export.read.unused import is_idle_projection

    _, text_class = layout.components.get("text_encoder", ("", ""))
    yield from (name for name, value in stored.items() if is_idle_projection(name, value, text_class))


def _find_class(library: str, class_name: str) -> type:
    """A component's class. As in model_index.json, `library` may be one of diffusers' pipeline packages."""
    import importlib

    from diffusers import pipelines

    module = getattr(pipelines, library, None) or importlib.import_module(library)
    try:
        return getattr(module, class_name)  # type: ignore[no-any-return]
    except AttributeError:
        raise ExportError(f"{INDEX_NAME} names {library}.{class_name}, which the installed version does not provide") from None


def _load(
    path: Path, checkpoint: dict[str, Any], name: str, kind: tuple[str, str], directory: Path, precision: "torch.dtype"
) -> Any:
    """Loads one component on the CPU. Raises ExportError if its weights are missing or do not fit."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from img2img_server.runtime.common.weight_budget import within

    library, class_name = kind
    try:
        with within([path]):
            module = load_single_file_sub_model(
                library_name=library,
                class_name=class_name,
                name=name,
                checkpoint=checkpoint,
                pipelines=pipelines,
                is_pipeline_module=hasattr(pipelines, library),
                cached_model_config_path=str(directory),
                local_files_only=True,
                torch_dtype=precision,
            )
    except (SingleFileComponentError, *_CONVERT_FAILURES) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"{path} has no {name} that fits its configuration (wrong --config?): {reason}") from error
    if missing := [key for key, value in module.state_dict().items() if value.is_meta]:
        raise ExportError(f"{path} lacks {missing[0]} of {name}, which the configuration requires (wrong --config?)")
    return module


def _is_of(component: str, name: str) -> bool:
    """Whether a tensor may belong to a component: its canonical name has that component's prefix, or none of the prefixes."""
    own = _PREFIXES.get("text_encoder" if component.startswith("text_encoder") else component, ())
    return name.startswith(own) or not name.startswith(tuple(prefix for prefixes in _PREFIXES.values() for prefix in prefixes))


def _precision(tensors: Mapping[str, TensorInfo], component: str, scales: Mapping[str, str]) -> "torch.dtype":
    """The type that can represent all of a component's weights. Unscaled float8 becomes bfloat16, which diffusers requires."""
    import torch

    names = [own for name, own in canonical(tensors).items() if _is_of(component, name)]
    left_out = {*scales.values(), *filter(describes_scaling, names), *MARKERS}
    own = {name: tensors[name].dtype for name in names if "F" in tensors[name].dtype and name not in left_out}
    if any(name in scales for name in own):
        return torch.float32
    kinds = set(own.values())
    if kinds == {"F16"}:
        return torch.float16
    return torch.bfloat16 if kinds and kinds <= {"BF16", *FLOAT8} else torch.float32
