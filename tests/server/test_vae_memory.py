"""Memory limit of VAE calls: batches are split, large images are tiled as in diffusers, and calls within the limit are
unchanged."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers import AutoencoderTiny, AutoPipelineForImage2Image
from fakes import make_request
from img2img_server.bundle.manifest import read_manifest
from img2img_server.engine.request import Request, run_alone
from img2img_server.runtime.common import cpu
from img2img_server.runtime.common import vae as vae_memory
from img2img_server.runtime.common.vae import BoundedVae, Footprint, bound_torch_vaes, most_memory
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from PIL import Image
from tiny_parts import vae as make_vae
from tiny_transformers import CHANNELS

STABLE_DIFFUSION = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "sample_size": 512,
}
TINY = {"block_out_channels": [64] * 4, "latent_channels": 4}
"""The keys of AutoencoderTiny's configuration that affect it."""
QWEN = {"base_dim": 96, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
TILED = 1
"""So few bytes that every image larger than a tile is tiled."""


class Halves:
    """Replaces the VAE's halves and counts the images in each call. Sizes change as in a VAE."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(images.shape))
        return torch.nn.functional.avg_pool2d(images, 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(latents.shape))
        return torch.nn.functional.interpolate(latents, scale_factor=8)


def vae() -> Any:
    """A tiny AutoencoderKL, always the same."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return make_vae(0.2)


def bounded(memory: int | None, config: dict[str, Any] = STABLE_DIFFUSION, **settings: Any) -> tuple[BoundedVae, Halves]:
    halves = Halves()
    return BoundedVae(config, halves.encode, halves.decode, memory, **settings), halves


def test_attention_memory_grows_with_the_square_of_the_pixels() -> None:
    with_scores, without = Footprint(STABLE_DIFFUSION, scores=True), Footprint(STABLE_DIFFUSION, scores=False)
    for side, scores in ((512, 2**24), (1024, 2**28), (2048, 2**32)):
        assert with_scores.of(side, side, 2) - without.of(side, side, 2) == 2 * 2 * scores
        assert without.of(side, side, 4) == 2 * without.of(side, side, 2) == without.of(2 * side, side, 2)
    assert Footprint(TINY, scores=True).of(512, 512, 4) == Footprint(TINY, scores=False).of(512, 512, 4), "it has no attention"


def test_a_videos_vae_has_the_scale_width_and_attention_of_one_of_images() -> None:
    """AutoencoderKLQwenImage has other words for them."""
    same = {"block_out_channels": [96, 192, 384, 384], "down_block_types": ["DownEncoderBlock2D"] * 4}
    for scores in (False, True):
        ours, theirs = Footprint(QWEN, scores), Footprint(same, scores)
        assert ours.scale == theirs.scale == 8
        assert ours.of(512, 768, 2) == theirs.of(512, 768, 2)
    assert Footprint(QWEN, True).of(512, 512, 4) > Footprint(QWEN, False).of(512, 512, 4)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": "abc"},
        {"block_out_channels": []},
        {"block_out_channels": [1, -1, 1, 1]},
        {"dim_mult": [1, 2], "base_dim": None},
    ],
)
@pytest.mark.parametrize("size", [None, 0, -1, "x", [8, 8], 1])
def test_incomplete_or_invalid_vae_config_falls_back_to_defaults(config: dict[str, Any], size: Any) -> None:
    vae, halves = bounded(TILED, config | {"sample_size": size})
    images = torch.rand(1, 3, 704, 64)
    assert vae.decode(vae.encode(images)).shape == images.shape
    assert max(side for shape in halves.calls for side in shape[2:]) <= 704


@pytest.mark.parametrize(("fits", "buckets", "calls"), [(2, (), [2, 2, 1]), (3, (1, 2, 4, 8), [2, 2, 1]), (4, (1, 2, 4), [4, 1])])
def test_batch_above_the_memory_limit_is_split_into_calls(fits: int, buckets: tuple[int, ...], calls: list[int]) -> None:
    """Padded calls have recorded sizes: a call of three images would take as much memory as one of four."""
    one = Footprint(STABLE_DIFFUSION, scores=True).of(64, 128, 4)
    vae, halves = bounded(fits * one, row_buckets=buckets)
    images = torch.rand(5, 3, 64, 128)
    latents = vae.encode(images)
    assert torch.equal(latents, Halves().encode(images))
    assert torch.equal(vae.decode(latents), Halves().decode(latents))
    assert [shape[0] for shape in halves.calls] == 2 * calls


@pytest.mark.parametrize("memory", [None, 2**40])
def test_batch_within_the_limit_is_one_call_without_a_copy(memory: int | None) -> None:
    images = torch.rand(5, 3, 64, 128)
    given: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        given.append(tensor)
        return tensor

    vae = BoundedVae(STABLE_DIFFUSION, keep, keep, memory)
    assert vae.encode(images) is images
    assert vae.decode(images) is images
    assert all(tensor is images for tensor in given)


def test_tiles_are_at_most_the_models_native_size() -> None:
    vae, halves = bounded(TILED)
    vae.decode(torch.rand(2, 4, 64, 64))
    assert halves.calls == [(1, 4, 64, 64)] * 2
    halves.calls.clear()
    vae.decode(torch.rand(2, 4, 128, 72))
    assert len(halves.calls) == 2 * 3 * 2
    assert max(max(shape[2:]) for shape in halves.calls) == 64
    assert len(set(halves.calls)) == 4, "of one image: inner tiles, and those at its right, its lower edge and its corner"


@pytest.mark.parametrize("size", [(160, 112), (72, 200), (64, 136)])
def test_tiles_match_diffusers(size: tuple[int, int]) -> None:
    """The same halves, called by diffusers' VAE with tiling and by ours, which takes the images one after the other."""
    model = vae()
    ours = BoundedVae(
        model.config,
        lambda images: model.quant_conv(model.encoder(images)),
        lambda latents: model.decoder(model.post_quant_conv(latents)),
        TILED,
    )
    images = torch.rand(2, 3, *size) * 2 - 1
    with torch.inference_mode():
        untiled = model.encode(images).latent_dist.parameters
        model.enable_tiling()
        latents = model.encode(images).latent_dist.parameters
        decoded = model.decode(latents[:, :4]).sample
        assert (untiled - latents).abs().max() > 1e-3, "else nothing was tiled"
        assert torch.allclose(ours.encode(images), latents, atol=1e-4)
        assert torch.allclose(ours.decode(latents[:, :4]), decoded, atol=1e-4)


def request(size: tuple[int, int], **settings: Any) -> Request:
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    pixels = np.stack([x, y, (x + y) / 2], axis=-1) * 200 + (y > 0.6)[..., None] * np.array([0, 55, 20])
    return make_request(image=Image.fromarray(pixels.astype(np.uint8)), prompt="a lake", num_inference_steps=3, **settings)


def expected(pipe: Any, request: Request) -> list[Image.Image]:
    accepted = inspect.signature(pipe.__call__).parameters
    size = {name: value for name, value in zip(("width", "height"), request.image.size, strict=True) if name in accepted}
    images: list[Image.Image] = pipe(
        request.prompt, image=request.image, strength=request.strength, num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale, num_images_per_prompt=len(request.seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds], **size,
    ).images  # fmt: skip
    return images


def difference(some: Any, others: Any) -> int:
    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) for one, other in pairs)


@pytest.mark.parametrize("name", nightly_but(["sd1", "sdxl", "lcm", "flux"], "sd1", "flux"))
def test_a_tiled_image_is_the_one_that_diffusers_makes_with_tiling(
    name: str, bundle: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    """Flux's pipeline draws two images of one source otherwise than it draws each, so it draws one here."""
    folder = bundle(name)
    ours = load_pipeline(folder, read_manifest(folder), Execution("cpu", 1, vae_memory=TILED))
    pipe = AutoPipelineForImage2Image.from_pretrained(str(tiny_model(name)), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = request((160, 112), strength=0.7, guidance_scale=1.0, seeds=(3,) if name == "flux" else (3, 4))
    whole = expected(pipe, asked)
    pipe.vae.enable_tiling()
    tiled = expected(pipe, asked)
    assert np.asarray(tiled[0]).std() > 10, "a flat image would prove nothing"
    assert difference(whole, tiled) > 1, "else tiling would prove nothing"
    assert difference(run_alone(ours, asked), tiled) <= 1


def test_a_videos_vae_divides_batches_and_tiles_images(bundle: Callable[[str], Path]) -> None:
    """Frames [B, 3, 1, H, W], in tiles of at most 512 pixels."""
    folder = bundle("qwenimage")
    whole, bounded = (
        load_pipeline(folder, read_manifest(folder), Execution("cpu", 1, vae_memory=memory))._pipe.vae  # type: ignore[attr-defined]
        for memory in (None, TILED)
    )
    small, large = torch.rand(2, 3, 1, 48, 64) * 2 - 1, torch.rand(1, 3, 1, 64, 800) * 2 - 1
    latents = [vae.encode(small).latent_dist.parameters for vae in (whole, bounded)]
    assert latents[0].shape == (2, 2 * CHANNELS, 1, 6, 8)
    assert torch.allclose(latents[0], latents[1], atol=1e-4)
    pixels = [vae.decode(latents[0][:, :CHANNELS])[0] for vae in (whole, bounded)]
    assert pixels[0].shape == small.shape
    assert torch.allclose(pixels[0], pixels[1], atol=1e-4)
    untiled, tiled, first = (
        vae.encode(images).latent_dist.mean for vae, images in ((whole, large), (bounded, large), (whole, large[..., :512]))
    )
    assert torch.allclose(tiled[..., :48], first[..., :48], atol=1e-4)
    assert not torch.allclose(tiled, untiled, atol=1e-3), "a tile does not see the rest"
    assert bounded.decode(tiled)[0].shape == large.shape


@pytest.mark.parametrize("name", ["sd1", "flux", "qwenimage"])
def test_split_batch_gives_the_same_images(name: str, bundle: Callable[[str], Path]) -> None:
    folder = bundle(name)
    manifest, asked = read_manifest(folder), request((64, 48), strength=0.7, guidance_scale=1.0, seeds=(3, 4, 5))
    together = run_alone(load_pipeline(folder, manifest, Execution("cpu", 1)), asked)
    one_by_one = run_alone(load_pipeline(folder, manifest, Execution("cpu", 1, vae_memory=TILED)), asked)
    assert difference(one_by_one, together) <= 1


class Pipe:
    """A diffusers pipeline as far as its VAE."""

    def __init__(self, vae: torch.nn.Module) -> None:
        self.vae = vae


@pytest.mark.parametrize("make", [vae, AutoencoderTiny], ids=["AutoencoderKL", "AutoencoderTiny"])
def test_pytorch_vae_is_sliced_and_tiled_only_if_needed(make: Callable[[], Any]) -> None:
    model = make().eval()
    one = Footprint(model.config, scores=False).of(64, 64, 4)
    bound_torch_vaes(Pipe(model), 2 * one)
    chosen: list[tuple[bool, bool]] = []
    images = torch.rand(3, 3, 64, 64)
    with torch.inference_mode():
        for some in (images[:2], images, torch.rand(1, 3, 192, 64)):
            model.encode(some)
            chosen.append((model.use_slicing, model.use_tiling))
            model.decode(torch.rand(len(some), 4, *(side // 8 for side in some.shape[2:])))
            assert (model.use_slicing, model.use_tiling) == chosen[-1], "a decoder is asked for as large an image"
    assert chosen == [(False, False), (True, False), (True, True)]


def test_unsupported_vae_or_no_limit_changes_nothing() -> None:
    class Other(torch.nn.Module):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

    for pipe in (Pipe(Other()), Pipe(vae())):
        bound_torch_vaes(pipe, 1 if isinstance(pipe.vae, Other) else None)
        assert not {"encode", "decode"} & set(vars(pipe.vae))


def test_default_limit_is_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "total_memory", lambda: 8e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 80 * 10**9))
    assert most_memory(Execution(), "cpu") == 2 * 10**9
    assert most_memory(Execution(), "cuda") == 20 * 10**9
    assert most_memory(Execution(gpu_memory=10**9), "cuda") == 10**9
    assert most_memory(Execution(gpu_memory=10**9), "cpu") == 2 * 10**9
    assert most_memory(Execution(vae_memory=5), "cuda") == most_memory(Execution(vae_memory=5), "cpu") == 5
    monkeypatch.setattr(cpu, "total_memory", lambda: float("inf"))
    assert most_memory(Execution(), "cpu") is None


def test_native_sizes_are_not_tiled_by_default_on_common_machines() -> None:
    """512 px on 4 GB, 1024 px in half precision on 16 GB: nothing is tiled there by default."""
    sizes = ((512, 4, 4e9), (1024, 2, 16e9))
    for side, itemsize, memory in sizes:
        assert Footprint(STABLE_DIFFUSION, scores=True).of(side, side, itemsize) <= memory / vae_memory._SHARE
