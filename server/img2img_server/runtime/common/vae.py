"""Autoencoders (VAEs): what their encoders return, and bounds on the memory of their calls.

Encoders return a distribution of latents (AutoencoderKL) or the latents themselves (AutoencoderTiny). diffusers' pipelines take
either, by the attribute of the encoder's output. Here one tensor represents both: the parameters of a distribution,
[B, 2C, h, w], or latents, [B, C, h, w].

Images that do not fit into one call together are encoded or decoded in several calls, and an image that does not fit alone in
overlapping tiles, as diffusers' VAEs do if tiling is enabled. Several calls return what one returns. Tiles do not: a tile has
no information about the rest of the image. What fits is computed as if there were no bound.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from img2img_server.runtime.common import cpu
from img2img_server.runtime.common.pipe import latent_size, parts
from img2img_server.runtime.execution import Execution


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor that stands for an encoder's output. Raises AttributeError for outputs of other kinds."""
    tensor: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.parameters
    return tensor


def output_of(tensor: torch.Tensor, config: Any) -> SimpleNamespace:
    """What diffusers reads of an encoder's output, of the tensor that stands for it; `config` is the autoencoder's."""
    if tensor.shape[1] == config.get("latent_channels"):
        return SimpleNamespace(latents=tensor)
    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(tensor))


_SHARE = 4
"""The part of all memory, one in so many, that a call may take by default."""
_LIVE = 3
"""Tensors of full size that a decoder has at the same time where it takes most, about: docs/devices.md has what was measured."""
_SCORES = 2
"""Matrices of attention's scores that a graph without fused attention has at the same time."""
_CHANNELS = 256
"""Channels at full size of a VAE whose configuration does not say: as many as Stable Diffusion's has."""
_TILE = 512
"""Pixels of a side of a tile if the VAE's configuration has no size of its own."""

_LEAST_TILE = 8
"""Latents of a side of a tile, at the least."""

Half = Callable[[torch.Tensor], torch.Tensor]
"""One half of a VAE: images [B, 3, H, W] to parameters of latents [B, C, h, w], or latents to images."""


def most_memory(execution: Execution, device: str) -> int | None:
    """Bytes that one call of a VAE on `device`, "cuda" or "cpu", may take; None for no bound."""
    if execution.vae_memory is not None:
        return execution.vae_memory
    if device == "cuda":
        most = torch.cuda.mem_get_info()[1] / _SHARE
        return int(most if execution.gpu_memory is None else min(most, execution.gpu_memory))
    most = cpu.total_memory() / _SHARE
    return None if most == float("inf") else int(most)


class Footprint:
    """What an image takes in a VAE, by its configuration. `scores` says whether attention's scores are kept in memory."""

    def __init__(self, config: Mapping[str, Any], scores: bool) -> None:
        widths: Any = config.get("block_out_channels")
        known = isinstance(widths, list | tuple) and 1 < len(widths) < 16 and all(isinstance(width, int) for width in widths)
        self.scale = 2 ** (len(widths) - 1) if known else 8
        # A decoder upsamples to full size with the width of the block before its last.
        self._channels = max(1, widths[1]) if known else _CHANNELS
        # AutoencoderTiny has no such entry, and no attention.
        self._scores = scores and bool(config.get("mid_block_add_attention", "down_block_types" in config))

    def of(self, height: int, width: int, itemsize: int) -> int:
        """Bytes of one image of `height` x `width` pixels, in numbers of `itemsize` bytes."""
        pixels = height * width
        scores = _SCORES * (pixels // self.scale**2) ** 2 if self._scores else 0
        return itemsize * (_LIVE * self._channels * pixels + scores)


class BoundedVae:
    """Calls the halves of a VAE whose configuration is `config` such that none takes more than `memory` bytes, None for no bound.

    `itemsize` is the bytes of a number that they compute with. Calls are padded to `row_buckets` images, if there are any.
    """

    tile_overlap_factor = 0.25
    # What AutoencoderKL's methods read of their model: these convolutions are in the halves already.
    config = SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False)

    def __init__(
        self,
        config: Mapping[str, Any],
        encoder: Half,
        decoder: Half,
        memory: int | None,
        itemsize: int = 4,
        row_buckets: Sequence[int] = (),
    ) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self._memory = memory
        self._itemsize = itemsize
        self._row_buckets = row_buckets
        self._footprint = Footprint(config, scores=True)
        size = min(latent_size(config.get("sample_size")) or (_TILE,))
        self.tile_sample_min_size = max(size, _LEAST_TILE * self._footprint.scale)
        self.tile_latent_min_size = self.tile_sample_min_size // self._footprint.scale

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The parameters of the latents [B, C, h, w] of images [B, 3, H, W]."""
        height, width = images.shape[-2:]
        return self._run(self.encoder, images, height, width, lambda one: AutoencoderKL._tiled_encode(self, one))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The images [B, 3, H, W] of latents [B, C, h, w]."""
        height, width = (side * self._footprint.scale for side in latents.shape[-2:])
        return self._run(
            self.decoder, latents, height, width, lambda one: AutoencoderKL.tiled_decode(self, one, return_dict=False)[0]
        )

    def _run(self, half: Half, batch: torch.Tensor, height: int, width: int, tiled: Half) -> torch.Tensor:
        rows = self._rows(height, width)
        if rows is None or rows >= len(batch):
            return half(batch)
        if rows == 0 and max(height, width) > self.tile_sample_min_size:
            half = tiled
        return torch.cat([half(some) for some in torch.split(batch, max(rows, 1))])

    def _rows(self, height: int, width: int) -> int | None:
        """Images of this size that fit into one call, None for any number."""
        if self._memory is None:
            return None
        rows = self._memory // self._footprint.of(height, width, self._itemsize)
        return max((bucket for bucket in self._row_buckets if bucket <= rows), default=0) if self._row_buckets else rows

    def blend_v(self, above: torch.Tensor, tile: torch.Tensor, extent: int) -> torch.Tensor:
        """AutoencoderKL's, in one operation for all lines: `tile`, whose first lines come out of the last of the one `above`."""
        return _blend(above, tile, extent, axis=2)

    def blend_h(self, left: torch.Tensor, tile: torch.Tensor, extent: int) -> torch.Tensor:
        """The same for columns."""
        return _blend(left, tile, extent, axis=3)


def bound_torch_vaes(pipe: Any, memory: int | None) -> None:
    """Has the VAEs of a diffusers pipeline that run in torch slice their batches and tile their images as `memory` bytes for one
    call demand. PyTorch keeps no scores of attention."""
    if memory is None:
        return
    for vae in {id(vae): vae for part in parts(pipe) if (vae := getattr(part, "vae", None)) is not None}.values():
        if isinstance(vae, torch.nn.Module) and hasattr(vae, "use_tiling") and hasattr(vae, "use_slicing"):
            _bound(vae, memory)


def _bound(vae: Any, memory: int) -> None:
    footprint = Footprint(vae.config, scores=False)
    vae.encode = _choosing(vae, vae.encode, footprint, 1, memory)
    vae.decode = _choosing(vae, vae.decode, footprint, footprint.scale, memory)


def _choosing(vae: Any, method: Callable[..., Any], footprint: Footprint, scale: int, memory: int) -> Callable[..., Any]:
    """`method`, before which slicing and tiling are chosen by the size of its first argument [B, ..., H, W] times `scale`."""

    @functools.wraps(method)
    def call(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        height, width = (side * scale for side in tensor.shape[-2:])
        rows = memory // footprint.of(height, width, tensor.element_size())
        vae.use_slicing = rows < len(tensor)
        vae.use_tiling = rows == 0
        return method(tensor, *arguments, **named)

    return call


def _blend(before: torch.Tensor, tile: torch.Tensor, extent: int, axis: int) -> torch.Tensor:
    extent = min(before.shape[axis], tile.shape[axis], extent)
    shares = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    shares = shares.view([-1 if number == axis else 1 for number in range(tile.ndim)])
    end, begin = before.narrow(axis, before.shape[axis] - extent, extent), tile.narrow(axis, 0, extent)
    begin.copy_(end * (1 - shares).to(tile.dtype) + begin * shares.to(tile.dtype))
    return tile
