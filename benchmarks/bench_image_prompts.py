"""Image prompts of requests: one call of the UNet whose rows have image tokens, against none; and the keys and values of an
image, which are made once for a request, at the sizes of real models.

The rows have one image each, without guidance. All variants are measured in turns in this process. Keys and values are random, as
their numbers make no difference to the time; so are the weights of adapters for Stable Diffusion 1.5 and XL.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_steps

_PROMPTS = {
    "1 adapter of 4 tokens in all rows": (1, 4),
    "1 adapter of 16 tokens": (1, 16),
    "4 adapters of 16 tokens": (4, 16),
    "1 adapter of 272 tokens": (1, 272),
}
"""Adapters, and tokens of each."""
_ADAPTERS = {"Stable Diffusion 1.5, 4 tokens": (12_480, 768, 1024, 4), "SDXL, 4 tokens": (83_200, 2048, 1280, 4)}
"""Widths of all cross-attentions together, of texts, and of the image encoder's embeddings, and tokens."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    bench_steps.configure(parser, "a bundle that takes image prompts")


def run(arguments: argparse.Namespace) -> int:
    """Measures the variants and prints a table: medians and minima in milliseconds."""
    pipeline, plain = _load(arguments.bundle, arguments.rows)
    variants: dict[str, Callable[[], Any]] = {"none: the plain graph": lambda: pipeline.denoise(plain)}
    for name, (adapters, tokens) in _PROMPTS.items():
        variants[name] = partial(pipeline.denoise, _with_prompts(pipeline, arguments.rows, adapters, tokens))
    for name, (widths, text, ins, count) in _ADAPTERS.items():
        variants[f"to make keys and values: {name}"] = _adapter(widths, text, ins, count)
    bench_steps.measure(variants, arguments)
    return 0


def _load(bundle: Path, rows: int) -> tuple[Any, Any]:
    """The pipeline, and the states of requests of one row each."""
    from img2img_server.bundle.manifest import read_manifest
    from img2img_server.runtime.execution import Execution
    from img2img_server.runtime.loader import load_pipeline

    pipeline: Any = load_pipeline(bundle, read_manifest(bundle), Execution("cpu"))
    if not pipeline._denoiser.control.image_prompts:
        raise SystemExit(f"{bundle} takes no image prompts: export it again")
    return pipeline, _states(pipeline, rows)


def _states(pipeline: Any, rows: int) -> Any:
    from img2img_server.engine.request import Request
    from PIL import Image

    image = Image.new("RGB", pipeline.native_size, (90, 120, 60))
    return pipeline.prepare([Request("m", image, "a lake", None, 1.0, 4, 1.0, (row,)) for row in range(rows)])


def _with_prompts(pipeline: Any, rows: int, adapters: int, tokens: int) -> Any:
    """The states of requests with random image prompts."""
    import torch
    from img2img_server.bundle.image_prompts import layer_widths, states_width
    from img2img_server.runtime.image_prompts.states import of_prompts

    width, states = states_width(layer_widths(pipeline._denoiser.config)), _states(pipeline, rows)
    for state in states:
        state.prompts = of_prompts([(torch.randn(tokens, width), None) for _ in range(adapters)], torch.float32)
    return states


def _adapter(widths: int, text: int, ins: int, tokens: int) -> Callable[[], Any]:
    """The work per image and request after the image encoder: a plain adapter with weights in fp16."""
    import torch
    from img2img_server.bundle.image_adapters import AdapterNeeds, PromptKind
    from img2img_server.runtime.image_prompts.projection import Projection
    from img2img_server.runtime.image_prompts.reading import AdapterWeights

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float16)

    weights = {"proj.weight": random(tokens * text, ins), "proj.bias": random(tokens * text)}
    weights |= {"norm.weight": random(text), "norm.bias": random(text)}
    needs = AdapterNeeds("plain", ins, PromptKind((widths,), text))
    adapter = AdapterWeights(needs, Projection("plain", weights), random(2 * widths, text))
    return lambda: adapter.states(torch.randn(1, ins))
