"""The demo model's UNet, trained together with its text encoder on precomputed latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from autoencoder import CHECKPOINT_EVERY
from averaging import MovingAverage
from batches import LatentSet, Mixture, draw_batch
from checkpoints import Checkpoint
from diffusers import DDIMScheduler, UNet2DConditionModel
from muon import Muon, split_for_muon
from steps import run_steps
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, slots=True)
class Phase:
    """A share of the training. Batches are strips of full height and `strip_width` latents, which cost in proportion.

    Half of the width still has sky, ridge and ground, but recognizing the land in a noised source takes the full width.
    """

    steps: int
    strip_width: int
    mixture: Mixture = field(default_factory=Mixture)


@dataclass(frozen=True, slots=True)
class DenoiserRecipe:
    """The phases in turn, and what they share: rates rise over `warm_up` steps and fall to zero over the last `decay`."""

    phases: tuple[Phase, ...] = (Phase(steps=3000, strip_width=16), Phase(steps=1500, strip_width=32))
    muon_rate: float = 0.013
    adamw_rate: float = 8e-4
    warm_up: int = 100
    decay: int = 2400
    average_decay: float = 0.997
    seed: int = 2

    @property
    def steps(self) -> int:
        """The number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_of(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def rate_factor(self, step: int) -> float:
        """Share of the learning rates at a step, in 0..1."""
        return min(1.0, (step + 1) / self.warm_up, (self.steps - step) / self.decay)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with DDIM steps, for a model that predicts the velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_denoiser() -> UNet2DConditionModel:
    """An untrained UNet of 15.8 million weights; text enters at the two middle levels, where attention is cheap."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=16,
        out_channels=16,
        block_out_channels=(48, 96, 192, 240),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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


def train_denoiser(
    data: LatentSet,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    recipe: DenoiserRecipe,
    work: Path,
    milestone: Callable[[], None],
) -> None:
    """Train both in place, from the checkpoint in `work` if any. On return and in `milestone` they hold averaged weights.

    Attention is not fused, because PyTorch's fused backward pass takes three times as long on a CPU for so few tokens.
    """
    alphas = build_scheduler().alphas_cumprod
    unet.to(memory_format=torch.channels_last)
    inner, outer = split_for_muon(unet.named_parameters(), ("conv_in.weight", "conv_out.weight"))
    muon = Muon(inner, recipe.muon_rate)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    adamw = torch.optim.AdamW(
        [*outer, *text_encoder.parameters()], recipe.adamw_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    average = MovingAverage(parameters, recipe.average_decay)
    parts = {"unet": unet, "text_encoder": text_encoder, "muon": muon, "adamw": adamw, "average": average}
    unet.train()
    text_encoder.train()

    def loss(step: int) -> Tensor:
        phase, random = recipe.phase_of(step), torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = draw_batch(data, alphas, phase.mixture, phase.strip_width, random)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states = text_encoder(batch.token_ids)[0]
            noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, batch.timesteps, states).sample
        error: Tensor = (predicted.float() - batch.target).square().mean()
        return error

    def publish() -> None:
        with average.applied():
            milestone()

    run_steps(
        "denoiser",
        recipe.steps,
        loss,
        parameters,
        ((muon, recipe.muon_rate), (adamw, recipe.adamw_rate)),
        recipe.rate_factor,
        Checkpoint(work / "denoiser.pt", parts),
        every=CHECKPOINT_EVERY,
        shown=50,
        after=lambda step: average.update(),
        saved=publish,
    )
    average.copy_to_parameters()
    unet.eval()
    text_encoder.eval()
