"""A model in one safetensors file, with the key names of the original trainers -> components in diffusers' layout.

The file has weights only. Configurations and tokenizers come from a template: a directory or hub repository in diffusers'
layout, of which nothing but texts is read.
"""

import gc
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2img_export.checkpoint import INDEX_NAME, PICKLE_REASON, PICKLE_SUFFIXES, Layout, choose_texts, names_below, read_index
from img2img_export.digests import Digests
from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT = 100 * 10**6
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.", "text_encoders."),
}
"""How the names of a component's tensors begin. Only the precision is found out by them: diffusers knows all names."""

_CONVERT_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a safetensors file says of a tensor: its type, such as F16, and shape."""

    dtype: str
    shape: tuple[int, ...]


def require_safetensors(path: Path) -> None:
    """Raises ExportError unless `path` is a safetensors file by its name and its header."""
    if path.suffix in PICKLE_SUFFIXES:
        raise ExportError(f"{path} is a pickle: {PICKLE_REASON}")
    if not path.is_file():
        raise ExportError(f"{path} is no file")
    if path.suffix != ".safetensors":
        raise ExportError(f"{path} is no .safetensors file")
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata that a safetensors file names. Raises ExportError where it is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("its header is too long")
            data = json.loads(file.read(length))
        notes = data.pop("__metadata__", {})
        if 8 + length + max((item["data_offsets"][1] for item in data.values()), default=0) != path.stat().st_size:
            raise ValueError("it is not as long as its header says")
        return {name: TensorInfo(item["dtype"], tuple(item["shape"])) for name, item in data.items()}, notes
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ExportError(f"{path} is damaged or no safetensors file: {first_line(error)}") from None


def find_template(options: ExportOptions, digest: str, digests: Digests, progress: Progress) -> tuple[Path, Layout, list[str]]:
    """The directory with the configurations and tokenizers for a single file, what it says, and its files that are read.

    `digest` is the file's SHA-256. Raises ExportError where the file or the template is refused.
    """
    if options.config is not None and Path(options.config).is_dir():
        template, directory = options.config, Path(options.config).resolve()
        names = names_below(directory)
    else:
        from img2img_export.hub import download

        # Remembered, so that diffusers is loaded the first time only.
        question = f"which template diffusers {metadata.version('diffusers')} has for {digest}"
        template = options.config or digests.recall(question, lambda: _infer_template(Path(options.source)))
        progress.stage(f"finding the configurations of {template}")
        directory, names = download(template, None, lambda index, names: choose_texts(index, names, template)[1], progress)
    return directory, *choose_texts(read_index(directory / INDEX_NAME), names, template)


def _infer_template(path: Path) -> str:
    """The repository that diffusers names for a checkpoint with such tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    tensors, _ = read_header(path)
    try:
        return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
    except (KeyError, TypeError, ValueError, AttributeError, UnboundLocalError) as error:
        raise ExportError(f"diffusers does not know what {path} is ({first_line(error)}): choose --config") from None


def convert(path: Path, layout: Layout, directory: Path, progress: Progress) -> None:
    """Writes the weights of each component of `layout` into `directory`, which has the template's texts, in stored precision.

    One component after another: at most one of them is in memory. Raises ExportError where the file does not fit the template.
    """
    import torch
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    tensors, _ = read_header(path)
    checkpoint = load_single_file_checkpoint(str(path), local_files_only=True)
    for name, (library, class_name) in layout.components.items():
        kind = _find_class(library, class_name)
        if issubclass(kind, torch.nn.Module):
            progress.stage(f"converting {name}")
            module = _load(path, checkpoint, name, (library, class_name), directory, _precision(tensors, name))
            for link in (directory / name).iterdir():
                link.unlink()  # else what is saved would be written through it, into the template
            module.save_pretrained(directory / name, safe_serialization=True)
            del module
            gc.collect()


def _find_class(library: str, class_name: str) -> type:
    """A component's class. As in model_index.json, `library` may be one of diffusers' packages of pipelines."""
    import importlib

    from diffusers import pipelines

    module = getattr(pipelines, library, None) or importlib.import_module(library)
    try:
        return getattr(module, class_name)  # type: ignore[no-any-return]
    except AttributeError:
        raise ExportError(f"{INDEX_NAME} names {library}.{class_name}, which is not there") from None


def _load(
    path: Path, checkpoint: Mapping[str, Any], name: str, kind: tuple[str, str], directory: Path, precision: "torch.dtype"
) -> Any:
    """One component, on the CPU. Raises ExportError where its weights are missing or do not fit."""
    from diffusers import pipelines
    from diffusers.loaders.single_file import load_single_file_sub_model
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    library, class_name = kind
    try:
        module = load_single_file_sub_model(
            library_name=library,
            class_name=class_name,
            name=name,
            checkpoint=dict(checkpoint),  # some conversions take out what they have used
            pipelines=pipelines,
            is_pipeline_module=hasattr(pipelines, library),
            cached_model_config_path=str(directory),
            local_files_only=True,
            torch_dtype=precision,
        )
    except (SingleFileComponentError, *_CONVERT_FAILURES) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ExportError(f"{path} holds no {name} as configured (is another --config right?): {reason}") from error
    if missing := [key for key, value in module.state_dict().items() if value.is_meta]:
        raise ExportError(f"{path} lacks {missing[0]} of {name} as configured (is another --config right?)")
    return module


def _precision(tensors: Mapping[str, TensorInfo], component: str) -> "torch.dtype":
    """The one precision that holds all of a component's weights. Those of 8 bits become bfloat16, for diffusers' sake."""
    import torch

    prefixes = _PREFIXES.get("text_encoder" if component.startswith("text_encoder") else component, ("",))
    kinds = {info.dtype for name, info in tensors.items() if name.startswith(prefixes) and "F" in info.dtype}
    if kinds == {"F16"}:
        return torch.float16
    return torch.bfloat16 if kinds and kinds <= {"BF16", "F8_E4M3", "F8_E5M2"} else torch.float32
