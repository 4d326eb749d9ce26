"""Calls of the control graph on CUDA: each shape of image prompts is recorded, and a later call is one launch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import nightly_but
from fake_gpu import PAGEABLE, FakeGpu
from img2img_server.bundle.controls import DOWN, is_residual
from img2img_server.bundle.image_prompts import BIAS, STATES, layer_widths, states_width
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once


@pytest.mark.parametrize("name", nightly_but(("sd1", "sdxl:fp16"), "sd1"))
def test_calls_with_residuals_and_with_image_prompts_are_recorded(name: str, bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    folder = bundle(name)
    pipeline: Any = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0), companions=Companions())
    assert pipeline.engine == "onnx:cuda"
    denoiser = pipeline._denoiser
    graph, types = denoiser.control.get(), denoiser.control.get().input_types
    fixed = {one: (width,) for one, width in graph.widths.items() if one in types}
    width = states_width(layer_widths(denoiser.config))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device="cuda")

    @torch_call
    def run(_: Any, rows: int, further: dict[str, torch.Tensor]) -> None:
        call = {one: zeros(rows, *fixed.get(one, ())) for one in types if not is_residual(one) and one not in (STATES, BIAS)}
        call["sample"] = zeros(rows, 4, 8, 8)
        call["encoder_hidden_states"] = zeros(rows, 77, *fixed["encoder_hidden_states"])
        named = {one: call.pop(one) for one in ("sample", "timestep", "encoder_hidden_states")}
        denoiser(**named, added_cond_kwargs=call, return_dict=False, **{DOWN: further})

    sizes = (8, 8, 4, 4, 4)
    residuals = [one for one in types if is_residual(one)]
    added = {one: (*fixed[one], size, size) for one, size in zip(residuals, sizes, strict=True)}
    shown = {STATES: (2, 16, width), BIAS: (2, 16)}
    for ends in (added, shown, added | shown):
        further = {one: zeros(3, *end) for one, end in ends.items()}
        with gpu.counting() as counts, recording_at_once():
            run(pipeline, 3, further)
        assert counts["cudaStreamBeginCapture"] == 1, "it is a shape of its own"
        for rows in (3, 4):
            further = {one: zeros(rows, *end) for one, end in ends.items()}
            with gpu.counting() as counts:
                run(pipeline, rows, further)
            assert counts["cudaGraphLaunch"] == 1, counts
            assert counts["cudaStreamBeginCapture"] == 0, counts
            assert sum(counts[one] for one in PAGEABLE) == 0, counts
    pipeline.close()
