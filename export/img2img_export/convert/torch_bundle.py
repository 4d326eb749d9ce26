"""Saves the parts of a bundle that are not graphs: safetensors weights, tokenizers, schedulers and model_index.json.

The layout is diffusers', so AutoPipeline loads it.
"""

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from img2img_server.bundle.manifest import Component, WeightFormat, is_text_encoder
from transformers import PreTrainedTokenizerBase

from img2img_export.convert.graphs import quiet
from img2img_export.convert.weight_only import quantize_layers

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""The type of a PyTorch component's weights by the requested precision. int8 applies to graphs only."""


def save(
    pipeline: Any,
    graphs: tuple[str, ...],
    precision: str,
    bundle: Path,
    weight_format: WeightFormat = "",
    group_size: int = 32,
) -> tuple[Component, ...]:
    """Saves all of `pipeline` except the components `graphs` into the directory `bundle`; returns the components with weights.

    The pipeline's weights are converted in place, and dropped. The layers of text encoders are stored in `weight_format`, in
    blocks of `group_size` weights. Replaces the files of an earlier call.
    """
    saved = []
    with quiet():
        pipeline.save_config(bundle)
        for name, part in pipeline.components.items():
            if part is None or name in graphs:
                continue
            if isinstance(part, torch.nn.Module):
                part.to(DTYPES[precision])
                narrow: WeightFormat = weight_format if is_text_encoder(name) else ""
                if narrow:
                    quantize_layers(part, narrow, group_size)
                shutil.rmtree(bundle / name, ignore_errors=True)
                cast(Any, part).save_pretrained(bundle / name, safe_serialization=True)
                saved.append(_describe(name, part, narrow))
                part.to("meta")  # a converted component is in memory, and the next one need not be beside it
            else:
                part.save_pretrained(bundle / name)
            if isinstance(part, PreTrainedTokenizerBase):
                _keep_vocabulary(part, bundle / name)
    return tuple(saved)


def _keep_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copies the tokenizer's source files that transformers 5 does not write: older versions and other programs require them."""
    source = Path(tokenizer.name_or_path)
    for name in (*tokenizer.vocab_files_names.values(), "special_tokens_map.json"):
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _describe(name: str, module: torch.nn.Module, weight_format: WeightFormat) -> Component:
    weights = list(module.parameters())
    kinds = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    counts = [kinds.get(weight.dtype, "fp32") for weight in weights if weight.is_floating_point()]
    precision = max(sorted(set(counts)), key=counts.count, default="fp32")
    size = sum(weight.nbytes for weight in weights)
    return Component(name, precision, backend="torch", bytes=size, weight_format=weight_format)
