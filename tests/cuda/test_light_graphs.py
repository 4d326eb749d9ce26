"""Light graphs on CUDA: recorded in warm-up like the whole graph, and a light step is as few device calls as a full one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import PAGEABLE, WAITS, FakeGpu
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.bundle.speedups import Speedup, Speedups
from img2img_server.engine.cache import Cache
from img2img_server.engine.warmup import WarmUp
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.support.fidelity import Fidelity
from PIL import Image

ROWS = 4
BOTH = Speedup("both", 0.2, 2, keeps_guidance=True, keeps_features=True, psnr_db=40.0, ssim=0.99)


def test_light_step_is_one_launch_of_a_recording_from_warm_up(
    bundle: Callable[[str], Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No kernel computes anything there, so this would find that no image is finite.
    monkeypatch.setattr(torch, "isfinite", lambda tensor: torch.ones(tensor.shape, dtype=torch.bool))
    folder = bundle("sd1:fp32:speedups")
    pipeline: Any = load_pipeline(folder, read_manifest(folder), Execution("cuda", 1), Cache(0))
    assert pipeline.speedups.has_features
    buckets = [rows for rows in pipeline.row_buckets if rows <= ROWS]

    def captured(table: tuple[Speedup, ...]) -> int:
        """How many calls a warm-up records."""
        pipeline.speedups.speedups = Speedups(table, 1, 4, 7.5, 0.25)
        with gpu.counting() as counts:
            WarmUp(ROWS, 1.0).record("m", pipeline)
        return counts["cudaStreamBeginCapture"]

    captured(())
    assert captured((BOTH,)) == 2 * len(buckets), "at two sizes, for each number of rows, only the light graph is new"

    settings: dict[str, Any] = {"num_inference_steps": 8, "image": Image.new("RGB", (64, 64)), "guidance_scale": 5.0}
    states = pipeline.prepare([make_request(seeds=(number,), fidelity=Fidelity("fast"), **settings) for number in range(2)])
    found: dict[str, list[Counter[str]]] = {"full": [], "light": []}
    while states[0].step < states[0].step_count:
        kind = "light" if states[0].is_light else "full"
        with gpu.counting() as counts:
            pipeline.advance(states, pipeline.denoise(states))
        found[kind].append(counts)
    assert len(found["light"]) >= 2
    for counts in (*found["light"], *found["full"]):
        assert counts["cudaGraphLaunch"] == 1, counts
        assert counts["cudaStreamBeginCapture"] == counts["cudaMalloc"] == 0, counts
        assert sum(counts[name] for name in PAGEABLE) == 0, counts
    for name in (*WAITS, "cudaMemcpyAsync to device, pinned"):
        assert max(counts[name] for counts in found["light"]) <= max(counts[name] for counts in found["full"]), name
    for state in states:
        pipeline.release(state)
