"""Train the demo model's UNet together with its text encoder, on precomputed latents."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from averaging import MovingAverage
from diffusers import DDIMScheduler, UNet2DConditionModel
from latents import CaptionDraw, LatentData, Mixture, draw_batch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, slots=True)
class UnetRecipe:
    """One phase of training the UNet and the text encoder, with its own optimizer.

    The learning rate rises over the first `warm_up` steps, stays, and over the last `decay` steps falls linearly to a fraction
    `final_rate` of it. Batches are strips of full height and `strip_width` latents. Half of the width costs half and still has
    sky, ridge and ground, but recognizing the land in a noised source takes the full width.
    """

    steps: int
    learning_rate: float = 6e-4
    warm_up: int = 100
    decay: int = 0
    final_rate: float = 0.0
    strip_width: int = 16
    signal_to_noise_limit: float = 5.0
    average_decay: float = 0.995
    mixture: Mixture = field(default_factory=Mixture)
    captions: CaptionDraw = field(default_factory=CaptionDraw)
    seed: int = 2


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with DDIM steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of 8.5 million weights; text enters at the middle level, where attention is cheap."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder: three layers of 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def loss_weights(alphas: Tensor, limit: float) -> Tensor:
    """Min-SNR weights (Hang et al. 2023) for epsilon prediction, per timestep, scaled to a mean of one."""
    ratio = alphas / (1 - alphas)
    weights = ratio.clamp(max=limit) / ratio
    return weights / weights.mean()


def rate_factor(step: int, recipe: UnetRecipe) -> float:
    """Share of the learning rate at a step, in 0..1."""
    falling = recipe.final_rate + (1 - recipe.final_rate) * (recipe.steps - step) / max(1, recipe.decay)
    return min(1.0, (step + 1) / recipe.warm_up, falling)


def train_unet(
    data: LatentData,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    recipe: UnetRecipe,
    checkpoint: Callable[[], None],
    report_every: int = 50,
    checkpoint_every: int = 500,
) -> None:
    """Train both in place; on return, and whenever `checkpoint` is called, they hold the averaged weights."""
    random = torch.Generator().manual_seed(recipe.seed)
    alphas = build_scheduler().alphas_cumprod
    weights = loss_weights(alphas, recipe.signal_to_noise_limit)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe))
    average = MovingAverage(parameters, recipe.average_decay)
    started, smooth = time.monotonic(), 0.0
    unet.train()
    text_encoder.train()
    for step in range(recipe.steps):
        batch = draw_batch(data, alphas, recipe.mixture, recipe.strip_width, random)
        states = text_encoder(batch.token_ids)[0]
        predicted = unet(batch.noisy, batch.timesteps, states).sample
        errors = (predicted - batch.target).square().mean(dim=(1, 2, 3))
        loss = (errors * weights[batch.timesteps]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % report_every == 0 or step == recipe.steps - 1:
            print(f"unet {step}/{recipe.steps} loss {smooth:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if step % checkpoint_every == checkpoint_every - 1:
            with average.applied():
                checkpoint()
    average.copy_to_parameters()
    unet.eval()
    text_encoder.eval()
