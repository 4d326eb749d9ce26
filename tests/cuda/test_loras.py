"""LoRAs of requests on CUDA: calls with them are recorded by rows and padded rank, and read the slots in place."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu
from fakes import make_request
from img2img_server.bundle.adapter_files import LoraFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import LoraUse
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.support.device_lock import recording_at_once
from lora_making import make, write_diffusers
from PIL import Image

Get = Callable[[str], Path]


@pytest.fixture
def pipeline(bundle: Get, tiny_model: Get, tmp_path: Path) -> SteppedPipeline:
    for number in range(6):
        rank = 32 if number == 5 else 4
        write_diffusers(make(tiny_model("sd1"), number, ("to_q", "to_k"), (rank,)), tmp_path / f"{number}.safetensors")
    settings = LoraSettings(LoraFiles(tmp_path), Cache(2**28), 4)
    folder = bundle("sd1")
    loaded = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(2**24), loras=settings)
    assert isinstance(loaded, SteppedPipeline)
    assert loaded.engine == "onnx:cuda"
    return loaded


def steps(pipeline: SteppedPipeline, folder: Path, loras: Sequence[int | None], count: int = 1) -> None:
    """Runs `count` steps of requests that share each call, one row each."""
    files = LoraFiles(folder)
    uses = [() if lora is None else (LoraUse(str(lora), 1.0, files.find(str(lora)).digest),) for lora in loras]
    image = Image.new("RGB", (64, 64))
    requests = [make_request(image=image, guidance_scale=1.0, num_inference_steps=8, loras=use) for use in uses]
    states = pipeline.prepare(requests)
    for _ in range(count):
        pipeline.advance(states, pipeline.denoise(states))


def test_recorded_lora_call_is_one_launch_for_any_slot_contents(pipeline: SteppedPipeline, gpu: FakeGpu, tmp_path: Path) -> None:
    with recording_at_once():
        steps(pipeline, tmp_path, [0, None, 1, 2])
    for loras in ([0, None, 1, 2], [1, 0, None, None], [3, 4, 3, 0]):  # the last evicts
        steps(pipeline, tmp_path, loras)  # texts are encoded, slots are filled
        with gpu.counting() as counts:
            states = None
            steps(pipeline, tmp_path, loras, 4)
        del states
        assert counts["cudaStreamBeginCapture"] == counts["plan"] == 0
        assert counts["cudaGraphLaunch"] >= 4


def test_larger_lora_rank_gets_its_own_recording(pipeline: SteppedPipeline, gpu: FakeGpu, tmp_path: Path) -> None:
    with recording_at_once():
        steps(pipeline, tmp_path, [0])
        with gpu.counting() as counts:
            steps(pipeline, tmp_path, [1])
        assert counts["cudaStreamBeginCapture"] == 0
        with gpu.counting() as counts:
            steps(pipeline, tmp_path, [5])
        assert counts["cudaStreamBeginCapture"] == 1
        with gpu.counting() as counts:
            steps(pipeline, tmp_path, [5])
        assert counts["cudaStreamBeginCapture"] == 0


def test_lora_call_copies_only_step_numbers_and_slots(pipeline: SteppedPipeline, gpu: FakeGpu, tmp_path: Path) -> None:
    """All but the numbers of a step and the rows' slots."""
    (graph,) = pipeline._denoiser.graphs
    assert graph.row_buckets
    with recording_at_once():
        steps(pipeline, tmp_path, [0, 1])
    files = LoraFiles(tmp_path)
    image = Image.new("RGB", (64, 64))
    uses = [(LoraUse(str(lora), 1.0, files.find(str(lora)).digest),) for lora in (0, 1)]
    states = pipeline.prepare([make_request(image=image, guidance_scale=1.0, num_inference_steps=8, loras=use) for use in uses])
    pipeline.advance(states, pipeline.denoise(states))
    with gpu.counting() as counts:
        for _ in range(3):
            pipeline.advance(states, pipeline.denoise(states))
    assert counts["cudaGraphLaunch"] == 3
    assert not any("to host" in name for name in counts)
    copies = counts["cudaMemcpyAsync to device, pinned"] + counts["cudaMemcpyAsync to device, pageable"]
    assert copies <= 3 * 2
    assert torch.cuda.is_available()
