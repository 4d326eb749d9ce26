"""OpenVINO on a UNet of four levels, as Stable Diffusion has: a row's bits, and graphs for any shape after small calls."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from img2img_export.convert.parts import denoiser_part, flatten
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_server.bundle.manifest import Component, Manifest, Verification
from img2img_server.bundle.manifest import Source as BundleSource
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.graph_sizes import Sizes, shapes_of
from img2img_server.runtime.onnx.runners import HostRunner
from img2img_server.runtime.onnx.sessions import SessionOptions, open_session
from img2img_server.runtime.providers.openvino import Compiler, Graphs
from img2img_server.support.device_lock import measuring
from tiny_parts import TEXT_WIDTH, unet

pytestmark = pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based:DeprecationWarning")

SIDE = 16
"""Latents of the native size: 2 x 2 at the deepest level."""
CHANNELS = (32, 32, 64, 128)
"""With these and two heads, OpenVINO's fused kernels are wrong after a first call of one place."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder with the UNet's graph and the settings that sizes depend on."""
    root = tmp_path_factory.mktemp("four-levels")
    cross, plain = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = unet(
            sample_size=SIDE,
            block_out_channels=CHANNELS,
            attention_head_dim=2,
            down_block_types=(*cross, "DownBlock2D"),
            up_block_types=("UpBlock2D", *plain),
        )
    call = {
        "sample": torch.randn(2, 4, 17, 19),
        "timestep": torch.tensor([5.0, 907.0]),
        "encoder_hidden_states": torch.randn(2, 77, TEXT_WIDTH),
    }
    part = denoiser_part("unet", module, [flatten(call), {**call, "sample": call["sample"][:, :, 8:, 8:]}], call)
    trace(module, part, flatten(call)).write(root / "unet", Progress(), "unet")
    configs = {
        "unet": {"sample_size": SIDE, "block_out_channels": CHANNELS},
        "vae_decoder": {"block_out_channels": [1, 2, 3, 4]},
        "text_encoder": {"max_position_embeddings": 77},
    }
    for name, config in configs.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root


def _feed(rows: int, side: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(rows, 4, side, side, generator=generator),
        "timestep": torch.linspace(1, 40, rows),  # in bfloat16 the angles of later ones are off, which is another matter
        "encoder_hidden_states": torch.randn(rows, 77, TEXT_WIDTH, generator=generator),
    }


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def _some(feed: Mapping[str, torch.Tensor], start: int, rows: int) -> dict[str, torch.Tensor]:
    return {name: tensor[start : start + rows] for name, tensor in feed.items()}


def _graphs(folder: Path, arithmetic: str) -> Graphs:
    component = Component("unet", "fp32", bytes=2**20)
    manifest = Manifest(BundleSource(), "", "", "onnx", (component,), {}, {}, Verification(True))
    return Graphs(Execution(), folder, manifest, open_session, Compiler(1, arithmetic))


@pytest.mark.parametrize("arithmetic", ["f32", "bf16"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch_before_and_after_graphs_are_opened(arithmetic: str, folder: Path) -> None:
    runner = _graphs(folder, arithmetic)("unet", folder / "unet" / "model.onnx")
    feed = _feed(11, SIDE)
    parts = [(start, rows) for rows in (1, 2, 3, 8, 11) for start in range(0, 11 - rows + 1, rows)]
    before = [runner.run(_some(feed, *part))[0] for part in parts]  # in the graph of 2 rows, until others are open
    with measuring():  # waits for the graphs of 1 and 8 rows
        (whole,) = runner.run(feed)
    after = [runner.run(_some(feed, *part))[0] for part in parts]
    for (start, rows), *results in zip(parts, before, after, strict=True):
        assert all(torch.equal(result, whole[start : start + rows]) for result in results), (start, rows)
    exact = HostRunner(open_session(folder / "unet" / "model.onnx", SessionOptions("cpu", 1)))
    assert _error(whole, exact.run(feed)[0]) < (1e-4 if arithmetic == "f32" else 0.1)


@pytest.mark.parametrize("arithmetic", ["f32", "bf16"])
@pytest.mark.parametrize("first", [8, 16])
def test_the_graph_for_any_shape_of_four_levels_is_right_after_its_first_call(first: int, arithmetic: str, folder: Path) -> None:
    """With one place at the deepest level, or four as in a trial run. With OpenVINO's fused kernels, one place first made all
    later results NaN in bfloat16, and wrong in float32."""
    graph = folder / "unet" / "model.onnx"
    exact = HostRunner(open_session(graph, SessionOptions("cpu", 1)))
    runner = Compiler(1, arithmetic)(graph)
    for rows, side in ((1, first), (2, 16), (3, 24), (1, 8), (2, 40)):
        feed = _feed(rows, side)
        (result,), (expected,) = runner.run(feed), exact.run(feed)
        assert torch.isfinite(result).all(), (rows, side)
        assert _error(result, expected) < (1e-4 if arithmetic == "f32" else 0.1), (rows, side)


def test_a_trial_run_has_two_by_two_places_at_the_deepest_of_four_levels(folder: Path) -> None:
    sizes = Sizes(folder)
    runner = Compiler(1, "bf16")(folder / "unet" / "model.onnx")
    axes = sizes.axes("unet", runner.inputs, sizes.trial())
    assert axes is not None
    assert shapes_of(runner.inputs, axes)[0] == (1, 4, 16, 16), "8 x 8 latents have one place there"
