"""Requests with image prompts on CUDA: their images are read without waiting for the device, and a step is one launch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_gpu import PAGEABLE, FakeGpu
from fakes import make_request
from img2img_server.bundle.image_adapters import ImageAdapterFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.runtime.companions import Companions
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.image_prompts.prompts import ImageAdapterSettings
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once
from PIL import Image
from tiny_image_adapters import ENCODER, prompt, write_all

Get = Callable[[str], Path]
Prompts = Sequence[tuple[str, str, float]]


@pytest.fixture
def files(tiny_model: Get, tiny_image_encoder: Get, tmp_path: Path) -> ImageAdapterFiles:
    return write_all(tmp_path / "adapters", tiny_model("sd1"), tiny_image_encoder(ENCODER))


@pytest.fixture
def pipeline(bundle: Get, image_encoder_bundle: Get, files: ImageAdapterFiles, tmp_path: Path) -> SteppedPipeline:
    companions, encoder = Companions(), tmp_path / ENCODER
    encoder.symlink_to(image_encoder_bundle(ENCODER))
    load_pipeline(encoder, read_manifest(encoder), Execution("cuda", 1), companions=companions)
    settings, folder = ImageAdapterSettings(files, Cache(2**24)), bundle("sd1")
    loaded = load_pipeline(
        folder, read_manifest(folder), Execution("cuda", 1), Cache(2**24), companions=companions, image_adapters=settings
    )
    assert isinstance(loaded, SteppedPipeline)
    assert loaded.engine == "onnx:cuda"
    return loaded


def steps(pipeline: SteppedPipeline, files: ImageAdapterFiles, prompts: Sequence[Prompts], count: int = 1) -> None:
    """Runs `count` steps of guided requests that share each call."""
    requests = [
        make_request(
            image=Image.new("RGB", (64, 64)),
            image_digest=b"source",
            guidance_scale=5.0,
            num_inference_steps=8,
            image_prompts=tuple(prompt(files, *one) for one in own),
        )
        for own in prompts
    ]
    states = pipeline.prepare(requests)
    for _ in range(count):
        pipeline.advance(states, pipeline.denoise(states))


def test_a_recorded_call_is_one_launch_for_any_adapters_of_its_token_count(
    pipeline: SteppedPipeline, files: ImageAdapterFiles, gpu: FakeGpu
) -> None:
    with recording_at_once():
        steps(pipeline, files, [[("plain", "a", 1.0)], []])
    for prompts in ([[], [("plain", "b", 0.5)]], [[("plain", "a", -1.0)], [("plain", "b", 1.0)]]):
        steps(pipeline, files, prompts)  # images are read
        with gpu.counting() as counts:
            steps(pipeline, files, prompts, 4)
        assert counts["cudaStreamBeginCapture"] == 0, counts
        assert counts["cudaGraphLaunch"] >= 4, counts
    with recording_at_once(), gpu.counting() as counts:
        steps(pipeline, files, [[("plain", "abc", 1.0)], []])
    assert counts["cudaStreamBeginCapture"] == 1, "16 tokens are a shape of its own"


def test_images_are_read_without_waiting_for_the_device(
    pipeline: SteppedPipeline, files: ImageAdapterFiles, gpu: FakeGpu
) -> None:
    steps(pipeline, files, [[("plain", "a", 1.0), ("plus", "b", 0.5)]])
    with gpu.counting() as counts:
        steps(pipeline, files, [[("plain", "b", 0.7), ("plus", "a", 1.0)]], 0)
    assert sum(counts[one] for one in PAGEABLE) == 0, counts
