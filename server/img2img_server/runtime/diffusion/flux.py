"""Flux, dev and schnell: the order of calls is that of FluxImg2ImgPipeline.__call__."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.runtime.common import rotary
from img2img_server.runtime.common.rotary import Size
from img2img_server.runtime.common.vae import decode_shifted
from img2img_server.runtime.control.controls import Control
from img2img_server.runtime.control.nets import FluxControlNet
from img2img_server.runtime.control.own import with_control
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.masking import draw_again
from img2img_server.runtime.diffusion.state import Conditioning
from img2img_server.runtime.diffusion.tokens import TokenPipeline
from img2img_server.runtime.schedulers.flow import FluxSchedulers
from img2img_server.support.source_rule import MaskUse

_CONTROL = "control_latents"
"""The control image's tokens, [R, N, C], which `FluxControl` adds to those of the latents."""
_IDS = ("txt_ids", "img_ids")
"""The position ids that diffusers' class takes, and graphs that other tools made: [tokens, 3]."""


class AnyFlux(TokenPipeline):
    """The common base of Flux, Kontext, Chroma and LongCat-Image-Edit."""

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 1

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, pooled, _ = self._pipe.encode_prompt(texts, None, self._pipe._execution_device)
        return Embedding.split(hidden_states, pooled)

    def _layout(self, latents: torch.Tensor) -> torch.Tensor:
        return self._packed(self._pipe._pack_latents(latents, *latents.shape))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_shifted(self._pipe.vae, latents)

    def _reference(self, pipe: Any) -> torch.Tensor:
        latents = pipe._encode_vae_image(image=torch.empty(1, 3, 1, 1), generator=None)
        tokens: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
        return tokens


class Flux(AnyFlux):
    """One row for each image: guidance is an input of the transformer, or (schnell) there is none.

    The transformer may also be diffusers' own, or a graph that was made by another tool. Their position ids have no rows, so the
    images of a call then have one size.
    """

    scheduler_cache = FluxSchedulers
    ignored_fields = frozenset({"negative_prompt", "true_cfg_scale"})
    mask_use: MaskUse = "optional"
    takes_controls = True

    def _is_guided(self, request: Request) -> bool:
        return False

    @property
    def _has_rotary_tables(self) -> bool:
        return getattr(self._denoiser, "tokens", None) is not None

    def _shape(self, request: Request) -> tuple[Hashable, int]:
        shape, pixels = super()._shape(request)
        return (shape if self._has_rotary_tables else (shape, request.result_size)), pixels

    def _row(self, text: Embedding, sizes: Sequence[Size]) -> Conditioning:
        if self._has_rotary_tables:
            return super()._row(text, sizes)
        assert text.pooled is not None, "of CLIP"
        places = rotary.flux_positions(text.hidden_states.shape[1], sizes)
        ids = {name: torch.from_numpy(place).float()[None] for name, place in zip(_IDS, places, strict=True)}
        return {"encoder_hidden_states": text.hidden_states, self.pooled_name: text.pooled, **ids}

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        # For ControlNets, if not for the transformer.
        return {"guidance": torch.full((len(latents),), request.guidance_scale, device=latents.device)}

    @property
    def _predict(self) -> Callable[..., tuple[torch.Tensor]]:
        return super()._predict if self._has_rotary_tables else partial(self._denoiser.forward, return_dict=False)

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        if not self._denoiser.config.guidance_embeds:
            conditioning.pop("guidance")
        for name in conditioning.keys() & set(_IDS):
            conditioning[name] = conditioning[name][0]
        return super()._inputs(samples, timesteps, conditioning)

    def _control_inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> Conditioning:
        return super()._inputs(samples, timesteps, conditioning)

    def _read_controls(
        self, request: Request, controls: tuple[Control, ...], generators: list[torch.Generator]
    ) -> tuple[tuple[Control, ...], Conditioning]:
        """Encodes the images of the ControlNets that read latents. Each image of the result draws its own."""
        found = list(controls)
        indices = [i for i, own in enumerate(controls) if isinstance(own.net, FluxControlNet) and own.net.reads_latents]
        outputs = self._encoder.control_images(request, indices) if indices else []
        for index, output in zip(indices, outputs, strict=True):
            found[index] = replace(controls[index], image=self._tokens_of(output, generators))
        return tuple(found), {}

    def _tokens_of(self, output: SimpleNamespace, generators: list[torch.Generator]) -> torch.Tensor:
        """Packed latents [images, N, C] of the output of the VAE's encoder for one image."""
        drawn = torch.cat([_latents(output, generator) for generator in generators])
        latents = (drawn - self._pipe.vae.config.shift_factor) * self._pipe.vae.config.scaling_factor
        packed: torch.Tensor = self._pipe._pack_latents(latents, *latents.shape)
        return packed


class FluxControl(Flux):
    """Flux Depth and Canny: the transformer reads the latents of a control image beside those of the result.

    The order of calls is that of FluxControlImg2ImgPipeline.__call__, and with a mask of FluxControlInpaintPipeline.__call__.
    """

    takes_controls = False
    reads_control = True
    _patch = 8  # four for the latents, and four for the control image's
    encodes_masked_source = False  # drawn below: before all else

    def _read_controls(
        self, request: Request, controls: tuple[Control, ...], generators: list[torch.Generator]
    ) -> tuple[tuple[Control, ...], Conditioning]:
        """Encodes the control image. Each image of the result draws its own latents of it."""
        (output,) = self._encoder.control_images(with_control(request), [0])
        if request.mask is not None:
            draw_again(generators, output)
        return (), {_CONTROL: self._tokens_of(output, generators)}

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        control = conditioning.pop(_CONTROL)
        inputs = super()._inputs(samples, timesteps, conditioning)
        tokens = inputs["hidden_states"]
        return {**inputs, "hidden_states": torch.cat([tokens, control.to(tokens.dtype)], dim=2)}


def _latents(output: SimpleNamespace, generator: torch.Generator) -> torch.Tensor:
    """Latents [1, C, h, w] of the output of a VAE's encoder, drawn if it is a distribution."""
    latents: torch.Tensor = output.latent_dist.sample(generator) if hasattr(output, "latent_dist") else output.latents
    return latents
