"""AutoencoderKLQwenImage, a video's VAE, for single images.

Its convolutions are causal: they see a frame and the frames before it, which are zeros before the first one. Of a single frame a
kernel [O, I, t, h, w] multiplies only its last slice with anything but zeros, so the convolution is the one of images with that
slice: it has a third of the weights, and its graph has tensors of four axes. The layers that mix frames (`time_conv`) and the
cache of earlier frames are for videos only.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as videos

_LEAST_LENGTH = 1e-12


class FrameVae(torch.nn.Module):
    """The VAE of single images [B, 3, H, W] that `vae` is for videos of one frame. It shares the weights."""

    def __init__(self, vae: videos.AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.config = vae.config
        self.encoder, self.quant_conv = _of_images(vae.encoder), _of_images(vae.quant_conv)
        self.post_quant_conv, self.decoder = _of_images(vae.post_quant_conv), _of_images(vae.decoder)

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        """Encodes pixels to `latent_dist.parameters` [B, 2C, h, w]."""
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=self.quant_conv(self.encoder(pixels))))

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """Decodes latents [B, C, h, w] to the pixels `sample` in [-1, 1]."""
        return SimpleNamespace(sample=self.decoder(self.post_quant_conv(latents)).clamp(-1, 1))


class _Attention(torch.nn.Module):
    """QwenImageAttentionBlock: self-attention of the places of an image, with one head."""

    def __init__(self, block: videos.QwenImageAttentionBlock) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = _of_images(block.norm), block.to_qkv, block.proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to the same."""
        rows, channels = states.shape[0], self.proj.in_channels
        parts = self.to_qkv(self.norm(states)).flatten(2).transpose(1, 2).split(channels, dim=2)
        query, key, value = (part.reshape(rows, -1, 1, channels).transpose(1, 2) for part in parts)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).reshape(rows, -1, channels)
        found: torch.Tensor = states + self.proj(attended.transpose(1, 2).reshape(states.shape))
        return found


class _Norm(torch.nn.Module):
    """QwenImageRMS_norm, which computes in fp32, without a copy of the lengths for each channel."""

    def __init__(self, norm: videos.QwenImageRMS_norm) -> None:
        super().__init__()
        self.gamma, self._scale = _shared(norm.gamma.reshape(-1, 1, 1)), norm.scale

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to the same."""
        wide = states.float()
        lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(_LEAST_LENGTH)
        # The quotient comes last: ONNX Runtime's fusions take a product before SiLU for a GELU, and fail.
        normalized: torch.Tensor = (wide * (self._scale * self.gamma.float()) / lengths).to(states.dtype)
        return normalized


def _of_images(module: Any) -> Any:
    """The layer of images that `module` is for a single frame. Blocks are diffusers' own, without a cache of frames."""
    if isinstance(module, videos.QwenImageCausalConv3d):
        return _convolution(module)
    if isinstance(module, videos.QwenImageAttentionBlock):
        return _Attention(module)
    if isinstance(module, videos.QwenImageResample):
        return _of_images(module.resample)
    if isinstance(module, videos.QwenImageUpsample):
        # To twice the size it is the same as "nearest-exact", which has no ONNX counterpart, and it keeps the numbers' type.
        return torch.nn.Upsample(scale_factor=module.scale_factor, mode="nearest")
    if isinstance(module, videos.QwenImageRMS_norm):
        return _Norm(module)
    made = copy.copy(module)
    made._modules = {}
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _of_images(child)
    return made


def _convolution(module: videos.QwenImageCausalConv3d) -> torch.nn.Conv2d:
    width, _, height, *_ = module._padding
    made = torch.nn.Conv2d(
        module.in_channels, module.out_channels, module.kernel_size[1:], module.stride[1:], (height, width), device="meta"
    )
    made.weight, made.bias = _shared(module.weight[:, :, -1]), module.bias
    return made


def _shared(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value.detach(), requires_grad=False)
