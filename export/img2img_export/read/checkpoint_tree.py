"""The view of a checkpoint: a directory that diffusers' from_pretrained loads, of links wherever nothing had to be made."""

import json
from pathlib import Path

from img2img_server.bundle.manifest import Lora
from img2img_server.runtime.common.pipe import latent_size

from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.read import lora, single_file
from img2img_export.read.checkpoint import Layout
from img2img_export.read.source import Checkpoint
from img2img_export.read.texts import read_json


def fill(checkpoint: Checkpoint, options: ExportOptions, directory: Path, progress: Progress) -> tuple[Layout, tuple[Lora, ...]]:
    """Makes the empty `directory` a checkpoint: what is in it, and the LoRAs that were fused into its weights.

    It loads with the variant of `options`. Raises ExportError where a single file or a LoRA does not fit.
    """
    if checkpoint.kind == "onnx" and options.loras:
        raise ExportError(f"{options.loras[0].path} cannot be fused: {options.source} holds graphs; export the weights with it")
    checkpoint.link_into(directory)
    layout = checkpoint.layout
    _use_plain_size(directory / "unet" / "config.json")
    if checkpoint.weights is not None:
        layout = single_file.convert(checkpoint.weights, layout, directory, progress)
    return layout, lora.fuse(directory, layout, options.loras, progress)


def _use_plain_size(config: Path) -> None:
    """Writes a square `sample_size` that is a list or a text as a number, in place of a link: some classes compare it to one."""
    if not config.is_file():
        return
    values = read_json(config)
    stated = values.get("sample_size") if isinstance(values, dict) else None
    size = latent_size(stated)
    if size is not None and size[0] == size[1] and not isinstance(stated, int):
        config.unlink()
        config.write_text(json.dumps({**values, "sample_size": size[0]}, indent=2) + "\n", encoding="utf-8")
