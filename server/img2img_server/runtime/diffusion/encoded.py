"""What autoencoders encode images to: a distribution of latents (AutoencoderKL), or the latents themselves (AutoencoderTiny).

diffusers' pipelines take either, by the attribute that the encoder's output has. One tensor stands for it here: the parameters
of a distribution, [B, 2C, h, w], or latents, [B, C, h, w].
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor that stands for an encoder's output. Raises AttributeError for outputs of other kinds."""
    tensor: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.parameters
    return tensor


def output_of(tensor: torch.Tensor, config: Any) -> SimpleNamespace:
    """What diffusers reads of an encoder's output, of the tensor that stands for it; `config` is the autoencoder's."""
    if tensor.shape[1] == config.get("latent_channels"):
        return SimpleNamespace(latents=tensor)
    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(tensor))
