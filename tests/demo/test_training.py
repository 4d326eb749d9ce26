"""The demo model's training: its parts, and that it continues after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoencoder import AutoencoderRecipe, build_autoencoder, encode, even_out, reconstruct, roughness, train_autoencoder
from batches import CaptionTable, LatentSet, Mixture, draw_batch
from denoiser import DenoiserRecipe, Phase, build_scheduler
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline, StableDiffusionImg2ImgPipeline
from muon import Muon, split_for_muon
from PIL import Image
from posterset import make_posters, unseen_posters
from scenes import EXTRA_WORDS, Scene, draw_captions
from tokenizer import train_tokenizer
from torch import nn
from train import SMOKE, train

RECIPE = AutoencoderRecipe(steps=3, crops=((32, 1, 1.0),))


def test_muon_moves_a_matrix_by_an_orthogonal_one() -> None:
    for shape in ((8, 4, 3, 3), (40, 6), (12, 20)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        Muon([weight], lr=1.0).step()
        values = torch.linalg.svdvals(weight.detach().flatten(1)) / max(1, shape[0] / weight[0].numel()) ** 0.5
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_gets_inner_matrices_only() -> None:
    module = nn.ModuleDict({"conv_in": nn.Conv2d(1, 2, 3), "middle": nn.Conv2d(2, 2, 3), "norm": nn.GroupNorm(1, 2)})
    inner, outer = split_for_muon(module.named_parameters(), ("conv_in.weight",))
    assert [tuple(weight.shape) for weight in inner] == [(2, 2, 3, 3)]
    assert len(outer) == 5


def test_evened_latents_have_unit_spread_and_the_same_reconstructions() -> None:
    torch.manual_seed(1)
    vae, pixels = build_autoencoder().eval(), unseen_posters(4, size=64)
    before = reconstruct(vae, pixels)
    even_out(vae, encode(vae, pixels))
    latents = encode(vae, pixels)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-4)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-4)
    assert torch.allclose(reconstruct(vae, pixels), before, atol=1e-4)
    assert vae.config.scaling_factor == 1


def test_roughness_is_0_of_gentle_slopes_and_2_of_noise() -> None:
    slope = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert float(roughness(slope)) == pytest.approx(0, abs=2e-3)
    assert float(roughness(noise)) == pytest.approx(2, abs=0.1)
    assert float(roughness(7 * noise)) == pytest.approx(2, abs=0.1)


def test_resumed_training_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, unseen = make_posters(1, 3, 32, workers=1).pixels, unseen_posters(1, size=32)
    with torch.random.fork_rng():
        whole = train_autoencoder(pixels, unseen, RECIPE, tmp_path / "whole").state_dict()

        def lost(quality: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("autoencoder.CHECKPOINT_EVERY", 2)
            patch.setattr("autoencoder.reconstruction_psnr", lambda vae, pixels: lost(vae))
            with pytest.raises(KeyboardInterrupt):
                train_autoencoder(pixels, unseen, RECIPE, tmp_path / "parts")
        assert torch.load(tmp_path / "parts" / "autoencoder.pt", weights_only=True)["step"] == 2
        resumed = train_autoencoder(pixels, unseen, RECIPE, tmp_path / "parts").state_dict()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_tokenizer_is_the_same_in_every_run(tmp_path: Path) -> None:
    captions = [*draw_captions(2, seed=3), *EXTRA_WORDS.split()]
    for name in "abcd":
        train_tokenizer(captions, tmp_path / name)
    assert len({(tmp_path / name / "merges.txt").read_bytes() for name in "abcd"}) == 1


def tiny_data() -> LatentSet:
    latents = torch.randn(5, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    captions = CaptionTable({Scene("hills", False, False): 0}, torch.arange(64).view(1, 2, 32), torch.zeros(32, dtype=torch.long))
    return LatentSet(latents, torch.zeros(5, 4, dtype=torch.long), captions)


def test_ddim_with_a_perfect_predictor_follows_the_training_pair() -> None:
    """With a perfect predictor of the velocity, DDIM from a noised source stays on the line that batches are drawn from."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(20)
    alphas = scheduler.alphas_cumprod
    source, target, noise = torch.randn(3, 1, 4, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps = scheduler.timesteps[8:]
    start = alphas[steps[0]].double()
    bracket = noise + (start / (1 - start)).sqrt() * (source - target)
    sample = start.sqrt() * source + (1 - start).sqrt() * noise
    for step in steps:
        alpha = alphas[step].double()
        assert torch.allclose(sample, alpha.sqrt() * target + (1 - alpha).sqrt() * bracket, atol=1e-5)
        velocity = alpha.sqrt() * bracket - (1 - alpha).sqrt() * target
        sample = scheduler.step(velocity, int(step), sample).prev_sample


def test_velocity_target_of_a_batch_solves_to_a_known_image() -> None:
    data, alphas = tiny_data(), build_scheduler().alphas_cumprod
    batch = draw_batch(data, alphas, Mixture(batch=64), 2, torch.Generator().manual_seed(1))
    alpha = alphas[batch.timesteps][:, None, None, None]
    clean = alpha.sqrt() * batch.noisy - (1 - alpha).sqrt() * batch.target
    candidates = data.latents[:, [0, 2, 3]].flatten(0, 1)
    gaps = (clean[:, None] - candidates[None]).flatten(2).norm(dim=2).min(dim=1).values
    assert gaps.max() < 1e-3


def test_rates_and_phases() -> None:
    recipe = DenoiserRecipe(phases=(Phase(600, 8), Phase(400, 16)), warm_up=10, decay=100)
    rates = [recipe.rate_factor(step) for step in range(recipe.steps)]
    assert (rates[0], rates[500], rates[-1]) == pytest.approx((0.1, 1, 0.01))
    assert [recipe.phase_of(step).strip_width for step in (0, 599, 600, 999)] == [8, 8, 16, 16]


@pytest.mark.nightly
def test_smoke_training_writes_a_pipeline_that_runs(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        train(replace(SMOKE, layouts=2), tmp_path / "demo", tmp_path / "work")
    output = tmp_path / "demo"
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(output / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    source = unseen_posters(1)[0] / 255.0
    image = pipeline("at night", image=source, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 256, 256, 3)
    net = ControlNetModel.from_pretrained(output / "controlnet", dtype=torch.float32)
    controlled = StableDiffusionControlNetImg2ImgPipeline(**pipeline.components, controlnet=net)
    controlled.load_lora_weights(output / "loras", weight_name="watercolor.safetensors")
    lines = Image.new("RGB", (256, 256))
    image = controlled("at night", image=source, control_image=lines, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 256, 256, 3)
