"""The training script: a handful of steps runs end to end, from nothing and from a model; pairs are what DDIM would meet."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captions import Scene
from diffusers import AutoPipelineForImage2Image
from latents import CaptionTable, LatentData, Mixture, draw_batch
from PIL import Image
from torch import nn
from train import SMOKE, take_weights, train
from train_unet import UnetRecipe, build_scheduler, build_unet, loss_weights, rate_factor

SCRIPT = Path(__file__).parents[2] / "demo" / "train.py"


def smoke(output: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(output), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "unet 3/4" in finished.stdout
    return finished.stdout


def check_that_it_runs(model: Path) -> None:
    pipeline = AutoPipelineForImage2Image.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    source = Image.new("RGB", (64, 64), "skyblue")
    result = pipeline("at night", image=source, strength=0.5, num_inference_steps=2).images[0]
    assert result.size == (64, 64)
    assert not list(model.rglob("*.bin"))


@pytest.mark.nightly
def test_smoke_training_writes_a_working_pipeline_and_can_resume(tmp_path: Path) -> None:
    """From nothing in this process, which has the libraries loaded; from a model by the command."""
    (tmp_path / "work").mkdir()
    with torch.random.fork_rng():
        train(SMOKE, None, tmp_path / "first", tmp_path / "work")
    check_that_it_runs(tmp_path / "first")
    weights = len(build_unet().state_dict())
    said = smoke(tmp_path / "second", "--start", str(tmp_path / "first"))
    assert f"UNet starts with {weights} of {weights} weights" in said
    check_that_it_runs(tmp_path / "second")


def test_only_weights_of_the_same_name_and_shape_are_loaded() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 3)
    module = nn.Sequential(first, second)
    kept = second.weight.detach().clone()
    weights = {"0.weight": torch.full((2, 2), 5.0), "1.weight": torch.zeros(9, 2), "2.weight": torch.zeros(2, 2)}
    assert take_weights(module, weights) == 1
    assert torch.equal(first.weight, weights["0.weight"])
    assert torch.equal(second.weight, kept)


def tiny_data() -> LatentData:
    latents = torch.randn(5, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    captions = CaptionTable({Scene("hills", False, False): 0}, torch.arange(64).view(1, 2, 32), torch.zeros(32, dtype=torch.long))
    return LatentData(latents, torch.zeros(5, 4, dtype=torch.long), captions)


def test_batches_solve_to_a_clean_target_of_the_right_image() -> None:
    data, alphas = tiny_data(), build_scheduler().alphas_cumprod
    batch = draw_batch(data, alphas, Mixture(batch=64), 2, torch.Generator().manual_seed(1))
    alpha = alphas[batch.timesteps][:, None, None, None]
    clean = (batch.noisy - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()
    candidates = data.latents[:, [0, 2, 3]].flatten(0, 1)
    gaps = (clean[:, None] - candidates[None]).flatten(2).norm(dim=2).min(dim=1).values
    usable = alpha.flatten() > 0.05
    assert usable.sum() > 30
    assert gaps[usable].max() < 1e-3


def test_ddim_with_a_perfect_predictor_follows_the_training_pair() -> None:
    """With a perfect predictor, DDIM from a noised source stays on the line that `latents` trains on."""
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
        sample = scheduler.step(bracket, int(step), sample).prev_sample


def test_learning_rate_and_loss_weight_schedules() -> None:
    recipe = UnetRecipe(steps=1000, warm_up=10, decay=100)
    rates = [rate_factor(step, recipe) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[500] == 1
    assert rates[-1] == pytest.approx(0.01)
    assert rate_factor(999, UnetRecipe(steps=1000)) == 1
    assert rate_factor(999, UnetRecipe(steps=1000, decay=100, final_rate=0.5)) == pytest.approx(0.505)
    weights = loss_weights(build_scheduler().alphas_cumprod, 5.0)
    assert weights.mean() == pytest.approx(1)
    assert bool((weights.diff() >= -1e-6).all())
