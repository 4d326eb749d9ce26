"""Families with a transformer: all of their graphs open on CUDA, can be recorded, and run; attention keeps no scores."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import nightly_but
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once
from PIL import Image

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize(
    "name",
    nightly_but(
        ["flux", "flux-dev", "sd3", "sd3-no-t5", "kontext", "flux2", "klein", "zimage", "chroma"], "flux", "sd3", "klein"
    ),
)
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


def test_a_text_encoder_that_sees_images_runs(bundle: Callable[[str], Path]) -> None:
    """Without its pipeline, which reads numbers back that no kernel has computed."""
    folder = bundle("qwenimage-edit")
    pipeline: Any = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    encoder = pipeline._pipe.text_encoder
    for height, width in ((4, 6), (10, 12)):
        ids = torch.full((1, 9 + height * width // 4), encoder.config.image_token_id)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(height * width, 1176),
                 "image_grid_thw": torch.tensor([[1, height, width]])}  # fmt: skip
        (*others, last) = encoder(**{name: value.to("cuda") for name, value in asked.items()}).hidden_states
        assert not any(state is not None for state in others)
        assert (last.device.type, last.shape[:2]) == ("cuda", ids.shape)


@pytest.mark.parametrize(
    "name",
    nightly_but(
        [
            "sd3",
            "flux-dev",
            "klein",
            "klein:bf16",
            "flux2:fp16",
            "qwenimage:bf16",
            "qwenimage",
            "zimage:fp16",
            "flux-dev:bf16",
            "chroma:bf16",
        ],
        "flux-dev",
        "klein:bf16",
        "chroma:bf16",
        "qwenimage",
    ),
)
def test_attention_of_transformer_graphs_is_fused(
    name: str,
    bundle: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every precision, with a bias and without: ONNX Runtime logs the selected kernel. In fp32 it keeps the scores of less
    than 256 tokens."""
    folder = bundle(name)
    monkeypatch.setenv("ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO", "1")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pipeline: Any = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    placed = [record.message for record in caplog.records if " runs " in record.message]
    assert placed
    assert all("recorded as CUDA graphs" in line for line in placed), placed
    config = pipeline._denoiser.config
    width, pooled = config.get("joint_attention_dim") or config["cap_feat_dim"], config.get("pooled_projection_dim")
    # A text encoder in PyTorch would read numbers back that no kernel has computed.
    vector = torch.zeros(1, pooled, device="cuda") if pooled else None
    if pipeline.pooled_name == "prompt_mask":
        vector = torch.ones(1, 40, device="cuda")
    texts = {"a": Embedding(torch.zeros(1, 40, width, device="cuda"), vector)}
    monkeypatch.setattr(pipeline, "_embed", lambda requests, *_: [texts for _ in requests])
    requests = [make_request(prompt="a", image=Image.new("RGB", size), num_inference_steps=2, strength=1.0, guidance_scale=0.0)
                for size in ((384, 256), (256, 384))]  # fmt: skip
    states = pipeline.prepare(requests)
    capfd.readouterr()
    while states[0].step < states[0].step_count:
        pipeline.advance(states, pipeline.denoise(states))
    kernels = re.findall(r"Operator=MultiHeadAttention .*SdpaKernel=(\w+)", capfd.readouterr().out)
    assert kernels
    assert "MATH" not in kernels
    for state in states:
        pipeline.release(state)
