"""Masks on CUDA: the latents stay on the device, and a step is as many replays and waits as without a mask."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_gpu import PAGEABLE, WAITS, FakeGpu
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Mask
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.device_lock import recording_at_once
from PIL import Image


def test_masked_step_replays_the_same_recording_without_waiting(bundle: Callable[[str], Path], gpu: FakeGpu) -> None:
    folder = bundle("sd1")
    pipeline: Any = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    mask = Mask(Image.new("L", (64, 64), 255))

    def step(masks: list[Mask | None]) -> Counter[str]:
        """The device calls in the last of five steps of requests with these masks."""
        settings: dict[str, Any] = {"num_inference_steps": 5, "strength": 1.0, "image": Image.new("RGB", (64, 64)), "prompt": "a"}
        states = pipeline.prepare([make_request(seeds=(number,), mask=each, **settings) for number, each in enumerate(masks)])
        with recording_at_once():
            while states[0].step < states[0].step_count - 1:
                pipeline.advance(states, pipeline.denoise(states))
            with gpu.counting() as counts:
                pipeline.advance(states, pipeline.denoise(states))
        assert all(state.latents.is_cuda and (state.blend is None or state.blend.original.is_cuda) for state in states)
        for state in states:
            pipeline.release(state)
        return counts

    without, some, every = step([None] * 4), step([mask, None, mask, None]), step([mask] * 4)
    assert without["cudaGraphLaunch"] == some["cudaGraphLaunch"] == every["cudaGraphLaunch"] == 1
    for name in (*WAITS, *PAGEABLE):
        assert without[name] == some[name] == every[name], name
    assert some["launch"] == every["launch"], "requests share the operations of their masks"
