"""Families that run whole: all of their graphs run on CUDA, in the middle of diffusers' own pipeline."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from covering import nightly_but
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("name", nightly_but(["flux", "flux-dev", "sd3", "sd3-no-t5"], "flux", "sd3"))
def test_a_transformer_opens_and_runs(name: str, bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """Finding 20: Flux opened, and failed at run on a shape that it computed on the GPU."""
    folder = bundle(name)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    assert pipeline.engine == "onnx:cuda"
    placed = [record.message for record in caplog.records if " runs " in record.message]
    assert len(placed) >= 4
    assert all("not recorded, 0 Memcpy nodes" in line for line in placed), placed
    request = make_request(prompt="a", image=Image.new("RGB", (64, 64)), num_inference_steps=2, strength=1.0, seeds=(1,))
    (state,) = pipeline.prepare([request])
    while state.step < state.step_count:
        pipeline.advance([state], pipeline.denoise([state]))
    ((image,),) = pipeline.finish([state])
    assert image.mode == "RGB"
    pipeline.release(state)
