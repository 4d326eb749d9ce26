"""A last stage of the denoiser's training: results are right at the guidance that the service has by default, 7.5.

Guidance extrapolates what a caption changes. 7.5 is too much for a model that follows captions well without: snow on dunes
got a third of its brightness, and autumn was too dark, while at 3 both were right. So the model learns to change only `share`
as much by a caption as it did. The targets are its own predictions.
"""

import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from averaging import MovingAverage
from batches import LatentSet, Mixture, draw_batch
from checkpoints import Checkpoint
from denoiser import build_scheduler
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel


@dataclass(frozen=True, slots=True)
class GuidanceRecipe:
    """A training with AdamW, whose rate falls to zero. A caption changes predictions `share` as much afterwards."""

    steps: int = 300
    share: float = 0.4
    rate: float = 3e-4
    mixture: Mixture = field(default_factory=lambda: Mixture(batch=16))
    average_decay: float = 0.98
    seed: int = 6


def train_for_guidance(
    data: LatentSet, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, recipe: GuidanceRecipe, work: Path
) -> None:
    """Train both in place, from the checkpoint in `work` if any."""
    teacher, teacher_texts = deepcopy(unet).eval(), deepcopy(text_encoder).eval()
    alphas, width = build_scheduler().alphas_cumprod, data.latents.shape[-1]
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    adamw = torch.optim.AdamW(parameters, recipe.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = MovingAverage(parameters, recipe.average_decay)
    parts = {"unet": unet, "text_encoder": text_encoder, "adamw": adamw, "average": average}
    checkpoint = Checkpoint(work / "guidance.pt", parts)
    started, smooth, first = time.monotonic(), 1.0, checkpoint.restore()
    unet.train()
    text_encoder.train()

    @torch.no_grad()
    def target(noisy: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        empty = data.captions.empty.expand_as(token_ids)
        states = teacher_texts(torch.cat([empty, token_ids]))[0]
        both: Tensor = teacher(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), states).sample.float()
        without, changed = both.chunk(2)
        return without + recipe.share * (changed - without)

    for step in range(first, recipe.steps):
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = draw_batch(data, alphas, recipe.mixture, width, random)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = target(batch.noisy, batch.timesteps, batch.token_ids)
            predicted = unet(batch.noisy, batch.timesteps, text_encoder(batch.token_ids)[0]).sample
        loss = (predicted.float() - wanted).square().mean()
        adamw.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.param_groups[0]["lr"] = recipe.rate * min(1.0, (step + 1) / 20, (recipe.steps - step) / recipe.steps)
        adamw.step()
        average.update()
        smooth += (loss.item() - smooth) * max(0.02, 1 / (step - first + 1))
        if (step + 1) % 25 == 0 or step + 1 == recipe.steps:
            print(f"guidance {step + 1}/{recipe.steps} loss {smooth:.5f} {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            checkpoint.save(step + 1)
    average.copy_to_parameters()
    unet.eval()
    text_encoder.eval()
