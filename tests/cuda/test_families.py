"""Families with a transformer: all of their graphs open on CUDA, can be recorded, and run."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from covering import nightly_but
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once
from PIL import Image

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize("name", nightly_but(["flux", "flux-dev", "sd3", "sd3-no-t5"], "flux", "sd3"))
def test_a_transformer_opens_and_runs(
    name: str, bundle: Callable[[str], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding 20: Flux opened, and failed at run on a shape that it computed on the GPU."""
    folder = bundle(name)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    assert pipeline.engine == "onnx:cuda"
    placed = [record.message for record in caplog.records if " runs " in record.message]
    assert len(placed) >= 4
    assert all("recorded as CUDA graphs" in line for line in placed), placed
    request = make_request(prompt="a", image=Image.new("RGB", (64, 64)), num_inference_steps=3, strength=1.0, seeds=(1,))
    # Three images: their rows are padded to those of a recording, positions are not. The last two steps are replays.
    states = pipeline.prepare([request] * 3)
    with recording_at_once():
        while states[0].step < states[0].step_count:
            pipeline.advance(states, pipeline.denoise(states))
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))  # nothing is computed
    assert [image.mode for (image,) in pipeline.finish(states)] == ["RGB"] * 3
    for state in states:
        pipeline.release(state)
