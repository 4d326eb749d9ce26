"""The VAE of Qwen-Image as graphs of single images: diffusers' module on a video of one frame is the oracle."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from img2img_export.convert.external_weights import GRAPH_NAME
from img2img_export.convert.frame_vae import FrameVae
from img2img_export.convert.fusion import fuse
from img2img_export.convert.parts import traced, vae_parts
from img2img_export.convert.tracing import trace
from img2img_export.progress import Progress
from img2img_export.verify.parity import open_graph


@pytest.fixture(scope="module")
def vae() -> Any:
    """A tiny one, of which no parameter is at its neutral value."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 4], num_res_blocks=1).eval()
        for value in made.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return made


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(64, 64), (40, 104)])
def test_single_images_match_one_frame_of_diffusers(vae: Any, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) * 2 - 1
    frames: Any = FrameVae(vae)
    with torch.no_grad():
        expected = vae.encode(images[:, :, None]).latent_dist.parameters
        assert error(frames.encode(images).latent_dist.parameters, expected[:, :, 0]) < 1e-5
        latents = torch.randn(2, 4, size[0] // 8, size[1] // 8)
        decoded = vae.decode(latents[:, :, None]).sample
        assert decoded.abs().max() == 1, "else it would not show that pixels are clamped"
        assert error(frames.decode(latents).sample, decoded[:, :, 0]) < 1e-5


def test_weights_are_shared_and_only_the_last_slice_in_time_is_used(vae: Any) -> None:
    frames: Any = FrameVae(vae)
    convolution, ours = vae.encoder.conv_in, frames.encoder.conv_in
    assert (ours.weight.shape, convolution.weight.shape) == ((8, 3, 3, 3), (8, 3, 3, 3, 3))
    assert ours.weight.untyped_storage().data_ptr() == convolution.weight.untyped_storage().data_ptr()
    assert any("time_conv" in name for name, _ in vae.named_parameters())
    assert not any("time_conv" in name for name, _ in frames.named_parameters())
    assert isinstance(vae.encoder.conv_in, torch.nn.Conv3d), "the module itself is as it was"


@pytest.mark.parametrize("half", [0, 1], ids=["encoder", "decoder"])
def test_graphs_have_four_axes_take_any_batch_and_size_and_are_fused(vae: Any, half: int, tmp_path: Path) -> None:
    part = vae_parts(vae)[half]
    (name,) = part.inputs
    channels, side = ((3, 64), (4, 8))[half]
    example = {name: torch.randn(2, channels, side + side // 8, side)}
    graph = trace(traced(vae), part, example)
    assert all(len(weight.shape) <= 4 for weight in graph.weights.values())
    convolutions = [node for node in graph.model.graph.node if node.op_type == "Conv"]
    assert all(len(onnx.helper.get_node_attr_value(node, "kernel_shape")) == 2 for node in convolutions)
    assert "Expand" not in {node.op_type for node in graph.model.graph.node}, "lengths of vectors are not copied for each channel"
    fused = fuse(trace(traced(vae), part, example, torch.float16)).model.graph.node
    assert [node.op_type for node in fused].count("MultiHeadAttention") == 1
    graph.write(tmp_path, Progress(), "vae")
    session = open_graph(tmp_path / GRAPH_NAME)
    for rows, height, width in ((1, side, side), (3, 2 * side, side + side // 2)):
        given = torch.randn(rows, channels, height, width)
        with torch.no_grad():
            (expected,) = part.call(vae, {name: given}).values()
        (found,) = session.run(None, {name: given.numpy()})
        assert error(torch.from_numpy(found), expected) < 1e-5
