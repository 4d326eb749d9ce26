"""Transformers that keep the residual of their inner blocks: images as diffusers draws them, if its transformer skips that."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers_oracle import drawn, oracle, source
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.request import Request
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.fidelity import EXACT, Fidelity

Get = Callable[[str], Path]

KEPT = Speedup("features", 0.1, 8, keeps_guidance=False, keeps_features=True, psnr_db=40.0, ssim=0.99)
MODELS = ("sd3", "flux-dev", "kontext", "klein", "flux2")


class Added(torch.nn.Module):
    """Replaces the skipped blocks of a transformer: adds their earlier addition to the image's tokens."""

    def __init__(self, residual: torch.Tensor) -> None:
        super().__init__()
        self._residual = residual

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return encoder_hidden_states, hidden_states + self._residual


@contextmanager
def skipping(transformer: Any, light: Sequence[bool]) -> Iterator[list[bool]]:
    """Within it, diffusers' `transformer` runs only its first block in light steps. Yields the steps that were called."""
    own, blocks, called = transformer.forward, transformer.transformer_blocks, list[bool]()
    singles = getattr(transformer, "single_transformer_blocks", None)
    kept: dict[str, torch.Tensor] = {}

    def forward(*arguments: Any, **named: Any) -> Any:
        called.append(light[len(called)])
        if called[-1]:
            transformer.transformer_blocks = torch.nn.ModuleList([blocks[0], Added(kept["last"] - kept["first"])])
            if singles is not None:
                transformer.single_transformer_blocks = torch.nn.ModuleList()
        try:
            return own(*arguments, **named)
        finally:
            transformer.transformer_blocks = blocks
            if singles is not None:
                transformer.single_transformer_blocks = singles

    def first(_: Any, __: Any, made: Any) -> None:
        if not called[-1]:
            kept["first"] = made[1]

    def last(_: Any, given: Any) -> None:
        if not called[-1]:
            kept["last"] = given[0]

    hooks = [blocks[0].register_forward_hook(first), transformer.norm_out.register_forward_pre_hook(last)]
    transformer.forward = forward
    try:
        yield called
    finally:
        del transformer.forward
        for hook in hooks:
            hook.remove()


def expected(pipe: Any, request: Request, light: Sequence[bool]) -> np.ndarray:
    """The image by diffusers' pipeline of a transformer that is called once a step."""
    known = inspect.signature(pipe.__call__).parameters
    width, height = request.result_size
    offered = {
        "strength": request.strength, "guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt,
        "true_cfg_scale": 1.0, "width": width, "height": height, "max_area": width * height,
    }  # fmt: skip
    settings = {key: value for key, value in offered.items() if key in known}
    generator = torch.Generator("cpu").manual_seed(request.seeds[0])
    with skipping(pipe.transformer, light) as called:
        images = pipe(
            image=request.image,
            prompt=request.prompt,
            num_inference_steps=request.num_inference_steps,
            generator=generator,
            **settings,
        ).images
    assert called == list(light)
    return np.asarray(images[0], int)


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("name", nightly_but(MODELS, "klein"))
def test_a_transformer_skips_its_inner_blocks_as_diffusers_would(bundle: Get, tiny_model: Get, name: str) -> None:
    directory = bundle(f"{name}:fp32:speedups")
    manifest = read_manifest(directory)
    pipeline: Any = load_pipeline(directory, manifest, Execution("cpu"))
    assert 0 < manifest.speedups.light_cost < 0.9
    assert any(one.keeps_features for one in manifest.speedups.table)
    pipeline.speedups.speedups = Speedups((KEPT,), 1, 4, 7.5, manifest.speedups.light_cost)
    guidance = 5.0 if name == "sd3" else 1.0
    fast = make_request(
        image=source(96, 64), prompt="a lake", seeds=(3,), num_inference_steps=6, strength=0.9, guidance_scale=guidance,
        fidelity=Fidelity("fast"),
    )  # fmt: skip
    other = replace(fast, prompt="winter mountains with fog", seeds=(4,), num_inference_steps=8)
    exact = replace(fast, seeds=(5,), fidelity=EXACT)
    pipe = oracle(tiny_model(name), manifest.pipeline_class)
    images: list[np.ndarray] = []
    for request, made in zip((fast, other, exact), drawn(pipeline, [fast, other, exact]), strict=True):
        count = pipeline.plan(replace(request, fidelity=EXACT)).step_count
        light = KEPT.light_steps(count) if request.fidelity is not EXACT else (False,) * count
        images.append(expected(pipe, request, light))
        assert difference(made[0], images[-1]) <= 1
    assert difference(images[0], expected(pipe, fast, (False,) * len(KEPT.light_steps(pipeline.plan(fast).step_count)))) > 1
