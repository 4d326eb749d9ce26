"""Autoencoders (VAEs): what their encoders return, and bounds on the memory of their calls.

Encoders return a distribution of latents (AutoencoderKL) or the latents themselves (AutoencoderTiny). diffusers' pipelines accept
either, by the attribute of the encoder's output. Here one tensor represents both: the parameters of a distribution, [B, 2C, h,
w], or latents, [B, C, h, w].

A batch that exceeds the memory of one call is divided into several calls, with equal results. A single image that exceeds it is
computed in overlapping tiles, as in diffusers' VAEs with tiling enabled; its result differs, because a tile has no information
about the rest of the image.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.runtime.common import cpu
from img2img_server.runtime.common.diffusers_import import diffusers, randn_tensor
from img2img_server.runtime.common.pipe import latent_size, parts
from img2img_server.runtime.execution import Execution

LATENT_STATISTICS = ("running_mean", "running_var")
"""The buffers of a VAE's batch norm (`bn`), by which pipelines normalize latents (FLUX.2). A bundle has them as lists in the
configuration of the VAE's graphs."""


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor that represents an encoder's output. Raises AttributeError for outputs of other kinds."""
    tensor: torch.Tensor = output.latents if hasattr(output, "latents") else output.latent_dist.parameters
    return tensor


def output_of(tensor: torch.Tensor, config: Any) -> SimpleNamespace:
    """An encoder's output as diffusers expects it, from the tensor that represents it; `config` is the autoencoder's."""
    if tensor.shape[1] == config.get("latent_channels"):
        return SimpleNamespace(latents=tensor)
    return SimpleNamespace(latent_dist=_Gaussian(tensor))


class _Gaussian:
    """diffusers' DiagonalGaussianDistribution as far as its image-to-image pipelines use it, without the import of its models.

    `parameters` [B, 2C, ...] are the means and the logarithms of the variances.
    """

    def __init__(self, parameters: torch.Tensor) -> None:
        self.parameters = parameters
        self.mean, self.logvar = torch.chunk(parameters, 2, dim=1)
        self.std = torch.exp(0.5 * torch.clamp(self.logvar, -30.0, 20.0))

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws latents [B, C, ...]."""
        like = self.parameters
        noise: torch.Tensor = randn_tensor(self.mean.shape, generator=generator, device=like.device, dtype=like.dtype)
        return self.mean + self.std * noise

    def mode(self) -> torch.Tensor:
        """The means."""
        return self.mean


def decode_shifted(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The pixels [n, 3, H, W] of latents [n, C, h, w] that were shifted and scaled, as those of Stable Diffusion 3 and Flux."""
    return torch.as_tensor(vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0])


_SHARE = 4
"""A call may take one part in this many of all memory by default."""
_LIVE = 3
"""Approximate number of full-size tensors in memory at a decoder's peak; docs/devices.md has the measurements."""
_SCORES = 2
"""Attention score matrices in memory at the same time in a graph without fused attention."""
_CHANNELS = 256
"""Channels at full size if the VAE's configuration does not say: Stable Diffusion's number."""
_TILE = 512
"""Side of a tile in pixels if the VAE's configuration has no sample size."""

_LEAST_TILE = 8
"""Minimum side of a tile in latents."""

Half = Callable[[torch.Tensor], torch.Tensor]
"""One half of a VAE: images [B, 3, H, W] to parameters of latents [B, C, h, w], or latents to images."""


def most_memory(execution: Execution, device: str) -> int | None:
    """Maximum memory in bytes of one VAE call on `device`, "cuda" or "cpu"; None for no bound."""
    if execution.vae_memory is not None:
        return execution.vae_memory
    if device == "cuda":
        most = torch.cuda.mem_get_info()[1] / _SHARE
        return int(most if execution.gpu_memory is None else min(most, execution.gpu_memory))
    most = cpu.total_memory() / _SHARE
    return None if most == float("inf") else int(most)


def widths_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The channels of a VAE's blocks, from full size to the latents' size; empty if its configuration does not say."""
    # AutoencoderKLQwenImage has multiples of a number.
    base, widths = config.get("base_dim", 1), config.get("block_out_channels", config.get("dim_mult"))
    if not isinstance(widths, list | tuple) or not all(isinstance(number, int) for number in (base, *widths)):
        return ()
    return tuple(base * width for width in widths)


class Footprint:
    """Estimated memory of an image in a VAE, from its configuration. `scores`: attention scores are kept in memory."""

    def __init__(self, config: Mapping[str, Any], scores: bool) -> None:
        widths = widths_of(config)
        known = 1 < len(widths) < 16
        self.scale = 2 ** (len(widths) - 1) if known else 8
        # A decoder upsamples to full size with the width of the block before its last.
        self._channels = max(1, widths[1]) if known else _CHANNELS
        # AutoencoderTiny has no such entry, and no attention.
        has_attention = "down_block_types" in config or "dim_mult" in config
        self._scores = scores and bool(config.get("mid_block_add_attention", has_attention))

    def of(self, height: int, width: int, itemsize: int) -> int:
        """Bytes that one image of `height` x `width` pixels takes, with numbers of `itemsize` bytes."""
        pixels = height * width
        scores = _SCORES * (pixels // self.scale**2) ** 2 if self._scores else 0
        return itemsize * (_LIVE * self._channels * pixels + scores)


class BoundedVae:
    """Calls the halves of a VAE such that no call takes more than `memory` bytes, None for no bound.

    `config` is the VAE's configuration, `itemsize` the bytes per number. Calls are padded to `row_buckets` images, if there are
    any.
    """

    tile_overlap_factor = 0.25
    # Read by AutoencoderKL's tiling methods: the halves already include these convolutions.
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
        return self._run(self.encoder, images, height, width, lambda one: diffusers.AutoencoderKL._tiled_encode(self, one))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The images [B, 3, H, W] of latents [B, C, h, w]."""
        height, width = (side * self._footprint.scale for side in latents.shape[-2:])
        return self._run(
            self.decoder,
            latents,
            height,
            width,
            lambda one: diffusers.AutoencoderKL.tiled_decode(self, one, return_dict=False)[0],
        )

    def _run(self, half: Half, batch: torch.Tensor, height: int, width: int, tiled: Half) -> torch.Tensor:
        rows = self._rows(height, width)
        if rows is None or rows >= len(batch):
            return half(batch)
        if rows == 0 and max(height, width) > self.tile_sample_min_size:
            half = tiled
        return torch.cat([half(some) for some in torch.split(batch, max(rows, 1))])

    def _rows(self, height: int, width: int) -> int | None:
        """Number of images of this size that fit into one call, None for no bound."""
        if self._memory is None:
            return None
        rows = self._memory // self._footprint.of(height, width, self._itemsize)
        return max((bucket for bucket in self._row_buckets if bucket <= rows), default=0) if self._row_buckets else rows

    def blend_v(self, above: torch.Tensor, tile: torch.Tensor, extent: int) -> torch.Tensor:
        """`tile` with its first `extent` lines blended with the last lines of the tile `above`, as in AutoencoderKL."""
        return _blend(above, tile, extent, axis=2)

    def blend_h(self, left: torch.Tensor, tile: torch.Tensor, extent: int) -> torch.Tensor:
        """`tile` with its first `extent` columns blended with the last columns of the tile to the `left`, as in AutoencoderKL."""
        return _blend(left, tile, extent, axis=3)


def bound_torch_vaes(pipe: Any, memory: int | None) -> None:
    """Makes the torch VAEs of a diffusers pipeline divide batches and tile images so that a call takes at most `memory` bytes.
    PyTorch's attention does not keep its scores in memory."""
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
    """Wraps `method` to set slicing and tiling by the size of its first argument [B, ..., H, W] times `scale`."""

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
