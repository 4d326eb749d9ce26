"""A denoiser split into two graphs gives the same result, and only the sine and cosine are rounded to bfloat16, never the
angle."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from img2img_export.convert.split_graph import split
from img2img_server.bundle.manifest import BODY_NAME, HEAD_NAME, read_manifest
from img2img_server.runtime.onnx.runners import HostRunner, SplitGraphRunner

Get = Callable[[str], Path]


def runner(path: Path) -> HostRunner:
    return HostRunner(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


def feed_of(graph: HostRunner, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feed = {}
    for item in graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes.get(axis, 2) for axis in item.shape]
        feed[item.name] = torch.randn(shape, generator=generator)
    feed["timestep"] = torch.tensor([981.5, 21.0])
    return feed


@pytest.mark.parametrize("name", ["sd1", "sdxl", "lcm"])
def test_head_and_body_together_match_the_whole_graph(name: str, bundle: Get) -> None:
    folder = bundle(name) / "unet"
    assert {f"unet/{HEAD_NAME}", f"unet/{BODY_NAME}"} <= set(read_manifest(bundle(name)).files)
    whole, parts = runner(folder / "model.onnx"), SplitGraphRunner(runner(folder / HEAD_NAME), runner(folder / BODY_NAME))
    assert {item.name for item in parts.inputs} == {item.name for item in whole.inputs}
    assert [item.name for item in parts.outputs] == [item.name for item in whole.outputs]
    feed = feed_of(whole, {"height": 9, "width": 6, "sequence_length": 77})
    expected, found = whole.run(feed)[0], parts.run(feed)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_body_contains_no_sine_or_cosine(bundle: Get) -> None:
    folder = bundle("sdxl") / "unet"
    body = onnx.load(folder / BODY_NAME, load_external_data=False)
    assert not {node.op_type for node in body.graph.node} & {"Sin", "Cos"}
    assert not {item.name for item in body.graph.input} & {"timestep", "time_ids"}
    assert not any(item.data_location for item in onnx.load(folder / HEAD_NAME, load_external_data=False).graph.initializer)


def test_the_weights_are_stored_once(bundle: Get) -> None:
    folder = bundle("sd1") / "unet"
    assert sum(path.suffix == ".onnx_data" for path in folder.iterdir()) == 1
    assert (folder / BODY_NAME).stat().st_size < 2 * (folder / "model.onnx").stat().st_size


def test_bfloat16_sine_is_accurate_only_for_fp32_angles() -> None:
    """The accuracy that the split preserves."""
    timesteps = torch.arange(1000.0)
    wave = torch.sin(timesteps)
    by_angle = torch.sin(timesteps.bfloat16().float())
    assert (by_angle - wave).abs().max() > 0.9
    assert (wave.bfloat16().float() - wave).abs().max() < 0.004


def test_graph_without_sine_or_cosine_is_not_split(bundle: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("sd1") / "vae_decoder", tmp_path / "vae_decoder"))
    before = sorted(folder.iterdir())
    assert not split(folder)
    assert sorted(folder.iterdir()) == before
    assert np.isfinite(runner(folder / "model.onnx").run({"latent_sample": torch.zeros(1, 4, 8, 8)})[0]).all()
