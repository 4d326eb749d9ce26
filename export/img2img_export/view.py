"""The view of a checkpoint: a directory that diffusers' from_pretrained loads, of links wherever nothing had to be made."""

from pathlib import Path

from img2img_server.bundle import Lora

from img2img_export import lora, single_file
from img2img_export.checkpoint import Layout
from img2img_export.errors import ExportError
from img2img_export.options import ExportOptions
from img2img_export.progress import Progress
from img2img_export.source import Checkpoint


def fill(checkpoint: Checkpoint, options: ExportOptions, directory: Path, progress: Progress) -> tuple[Layout, tuple[Lora, ...]]:
    """Makes the empty `directory` a checkpoint: what is in it, and the LoRAs that were fused into its weights.

    It loads with the variant of `options`. Raises ExportError where a single file or a LoRA does not fit.
    """
    if checkpoint.kind == "onnx" and options.loras:
        raise ExportError(f"{options.loras[0].path} cannot be fused: {options.source} holds graphs; export the weights with it")
    checkpoint.link_into(directory)
    layout = checkpoint.layout
    if checkpoint.weights is not None:
        layout = single_file.convert(checkpoint.weights, layout, directory, progress)
    return layout, lora.fuse(directory, layout, options.loras, progress)
