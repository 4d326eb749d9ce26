"""What is trained on top of the demo model: a watercolor LoRA, and a ControlNet that follows outlines.

Both keep the model's weights and its text encoder. The LoRA sees posters painted by `watercolor`, under captions that do not name
the style. The ControlNet sees the outlines of the target's layout, so that they, and not the source, say where the ridges are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from batches import Batch, LatentSet, Mixture, draw_batch
from checkpoints import Checkpoint
from denoiser import build_scheduler
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from posters import build_geometry, draw_layout, outlines
from posterset import AUGMENTED, TRAINING_LAYOUTS, PosterSet
from saving import prepare_for_publishing
from steps import run_steps
from torch import Tensor, nn
from transformers import CLIPTextModel
from watercolor import paint_watercolor

LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2")


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """A training with AdamW, whose rate rises over the first tenth of the steps and falls over the last half. Batches are strips
    of full height and `strip_width` latents."""

    steps: int
    rate: float
    mixture: Mixture = field(default_factory=Mixture)
    strip_width: int = 32
    rank: int = 16
    seed: int = 4


LORA = AdapterRecipe(steps=300, rate=1e-3)
CONTROLNET = AdapterRecipe(
    steps=800, rate=1e-3, mixture=Mixture(pair_share=0.8, other_source_share=0.5, other_layout_share=0.8), strip_width=16
)
"""If the source were of the target's layout, it would show what the outlines do: after 500 such steps at a rate of 3e-4 the loss
had not moved."""


def watercolors(posters: PosterSet) -> PosterSet:
    """The same set in watercolors. The augmented source of each layout becomes the plain poster."""
    pixels = np.stack([paint_watercolor(image, np.random.default_rng(index)) for index, image in enumerate(posters.pixels)])
    pixels[AUGMENTED :: posters.per_layout] = posters.pixels[:: posters.per_layout]
    return replace(posters, pixels=pixels)


def train_lora(
    data: LatentSet, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, recipe: AdapterRecipe, work: Path, output: Path
) -> None:
    """Train a LoRA on watercolors, and write it as a safetensors file in fp16. `unet` keeps it: give a copy."""
    torch.manual_seed(recipe.seed)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=list(LORA_LAYERS)))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]

    def predict(batch: Batch, states: Tensor) -> Tensor:
        predicted: Tensor = unet(batch.noisy, batch.timesteps, states).sample
        return predicted

    _train("lora", data, parameters, text_encoder, predict, recipe, work)
    layers = {name: weight.to(torch.float16).contiguous() for name, weight in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(output.parent, unet_lora_layers=layers, weight_name=output.name)
    output.chmod(0o644)


def train_controlnet(
    data: LatentSet, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, recipe: AdapterRecipe, work: Path, output: Path
) -> None:
    """Train a ControlNet on outlines, and write it in fp16 to a directory."""
    torch.manual_seed(recipe.seed)
    unet.requires_grad_(False)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64, 96)).train()
    layouts, _, _, _, width = data.latents.shape
    lines = np.stack([outlines(build_geometry(draw_layout(seed), width * 8)) for seed in TRAINING_LAYOUTS[:layouts]])

    def predict(batch: Batch, states: Tensor) -> Tensor:
        left, right = batch.left * 8, batch.left * 8 + batch.noisy.shape[3] * 8
        shown = control_image(lines[batch.layouts.numpy(), :, left:right])
        down, middle = net(batch.noisy, batch.timesteps, states, controlnet_cond=shown, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        predicted: Tensor = unet(batch.noisy, batch.timesteps, states, **residuals).sample
        return predicted

    _train("controlnet", data, list(net.parameters()), text_encoder, predict, recipe, work)
    net.eval().to(torch.float16).save_pretrained(output)
    prepare_for_publishing(output)


def control_image(lines: NDArray[np.uint8]) -> Tensor:
    """Outlines, N x H x W in 0..255, as the ControlNet reads them: N x 3 x H x W in 0..1."""
    return torch.from_numpy(lines / np.float32(255))[:, None].expand(-1, 3, -1, -1)


def _train(
    name: str,
    data: LatentSet,
    parameters: Iterable[nn.Parameter],
    text_encoder: CLIPTextModel,
    predict: Callable[[Batch, Tensor], Tensor],
    recipe: AdapterRecipe,
    work: Path,
) -> None:
    """Train `parameters` so that `predict` gives the velocity, from the checkpoint in `work` if any."""
    weights, alphas = nn.ParameterList(parameters), build_scheduler().alphas_cumprod
    adamw = torch.optim.AdamW(weights, recipe.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)

    def loss(step: int) -> Tensor:
        random = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        batch = draw_batch(data, alphas, recipe.mixture, min(recipe.strip_width, data.latents.shape[-1]), random)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states = text_encoder(batch.token_ids)[0]
            predicted = predict(batch, states)
        return (predicted.float() - batch.target).square().mean()

    def factor(step: int) -> float:
        done = (step + 1) / recipe.steps
        return min(1.0, 10 * done, 2 * (1 - done) + 1 / recipe.steps)

    checkpoint = Checkpoint(work / f"{name}.pt", {"weights": weights, "adamw": adamw})
    run_steps(name, recipe.steps, loss, weights, [(adamw, recipe.rate)], factor, checkpoint)
