"""A last stage of the denoiser's training: results are right at the guidance that the service has by default, 7.5.

Guidance extrapolates what a caption changes. 7.5 is too much for a model that follows captions well without: snow on dunes
got a third of its brightness, and autumn was too dark, while at 3 both were right. So the model learns to change only `share`
as much by a caption as it did. The targets are its own predictions.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from averaging import MovingAverage
from batches import LatentSet, Mixture, draw_batch
from checkpoints import Checkpoint
from denoiser import build_scheduler
from diffusers import UNet2DConditionModel
from steps import run_steps
from torch import Tensor
from transformers import CLIPTextModel


@dataclass(frozen=True, slots=True)
class GuidanceRecipe:
    """A training with AdamW, whose rate falls to zero. A caption changes predictions `share` as much afterwards.

    Each step predicts a batch with its captions and without. Besides the differences of both to their targets, the loss has
    `guided_weight` times that of what they give at a guidance of `scale`, which multiplies small errors.
    """

    steps: int = 600
    share: float = 0.3
    scale: float = 7.5
    guided_weight: float = 0.05
    rate: float = 3e-4
    mixture: Mixture = field(default_factory=lambda: Mixture(batch=10, empty_share=0.0))
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
    unet.train()
    text_encoder.train()

    def loss(step: int) -> Tensor:
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = draw_batch(data, alphas, recipe.mixture, width, random)
        token_ids = torch.cat([data.captions.empty.expand_as(batch.token_ids), batch.token_ids])
        noisy, timesteps = torch.cat([batch.noisy] * 2), torch.cat([batch.timesteps] * 2)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                taught = teacher(noisy, timesteps, teacher_texts(token_ids)[0]).sample.float()
            predicted = unet(noisy, timesteps, text_encoder(token_ids)[0]).sample.float()
        wanted = torch.cat([taught.chunk(2)[0], _guided(taught, recipe.share)])
        guided = _guided(predicted, recipe.scale) - _guided(wanted, recipe.scale)
        error: Tensor = (predicted - wanted).square().mean() + recipe.guided_weight * guided.square().mean()
        return error

    run_steps(
        "guidance",
        recipe.steps,
        loss,
        parameters,
        [(adamw, recipe.rate)],
        lambda step: min(1.0, (step + 1) / 20, (recipe.steps - step) / recipe.steps),
        Checkpoint(work / "guidance.pt", parts),
        after=lambda step: average.update(),
    )
    average.copy_to_parameters()
    unet.eval()
    text_encoder.eval()


def _guided(both: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of predictions without captions, followed by those with captions."""
    without, captioned = both.chunk(2)
    return without + scale * (captioned - without)
