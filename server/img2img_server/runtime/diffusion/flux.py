"""Flux, dev and schnell: the order of calls is that of FluxImg2ImgPipeline.__call__.

Latents are packed for the transformer only: two by two become a token. Its position ids have no rows, so all rows of a call have
one size.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from img2img_server.engine.request import Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.control.controls import Control
from img2img_server.runtime.control.nets import FluxControlNet
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.stable_diffusion_3 import StableDiffusion3
from img2img_server.runtime.diffusion.state import Conditioning, DiffusionState
from img2img_server.runtime.schedulers.flow import FluxSchedulers

_MOST_SIZES = 16
"""Sizes whose position ids are kept."""


class Flux(StableDiffusion3):
    """One row for each image: guidance is an input of the transformer, or (schnell) there is none."""

    scheduler_cache = FluxSchedulers
    ignored_fields = frozenset({"negative_prompt", "true_cfg_scale"})
    takes_controls = True
    _ids: dict[tuple[int, ...], Conditioning]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._ids = {}

    def _is_guided(self, request: Request) -> bool:
        return False

    def _pure_noise(self, latents: torch.Tensor, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
        return latents  # FluxInpaintPipeline has no case of its own for strength 1

    def _final_latents(self, state: DiffusionState) -> torch.Tensor:
        return state.latents

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, pooled, _ = self._pipe.encode_prompt(texts, None, self._pipe._execution_device)
        return Embedding.split(hidden_states, pooled)

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        # For ControlNets, if not for the transformer.
        return {"guidance": torch.full((len(latents),), request.guidance_scale, device=latents.device)}

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        (width, height), count = request.image.size, len(generators)
        packed, _ = pipe.prepare_latents(
            torch.empty(count, 3, 1, 1),  # stands for the image
            timesteps, count, self._denoiser.config.in_channels // 4, height, width, dtype, pipe._execution_device, generators,
        )  # fmt: skip
        latents: torch.Tensor = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
        return latents

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        if not self._denoiser.config.guidance_embeds:
            conditioning.pop("guidance")
        return self._control_inputs(samples, timesteps, conditioning)

    def _control_inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> Conditioning:
        return {
            "hidden_states": self._pipe._pack_latents(samples, *samples.shape),
            "timestep": timesteps.to(samples.dtype) / 1000,
            **conditioning,
            **self._positions(samples, conditioning["encoder_hidden_states"].shape[1]),
        }

    def _read_controls(
        self, request: Request, controls: tuple[Control, ...], generators: list[torch.Generator]
    ) -> tuple[Control, ...]:
        """Encodes the images of the ControlNets that read latents. Each image of the result draws its own."""
        found, vae = list(controls), self._pipe.vae
        indices = [i for i, own in enumerate(controls) if isinstance(own.net, FluxControlNet) and own.net.reads_latents]
        outputs = self._encoder.control_images(request, indices) if indices else []
        for index, output in zip(indices, outputs, strict=True):
            drawn = [_latents(output, generator) for generator in generators]
            latents = (torch.cat(drawn) - vae.config.shift_factor) * vae.config.scaling_factor
            found[index] = replace(controls[index], image=self._pipe._pack_latents(latents, *latents.shape))
        return tuple(found)

    def _noise(self, output: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        factor = self._pipe.vae_scale_factor
        noise: torch.Tensor = self._pipe._unpack_latents(output, *(side * factor for side in samples.shape[2:]), factor)
        return noise

    def _positions(self, samples: torch.Tensor, tokens: int) -> Conditioning:
        """The position ids of `samples`' tokens, and of those of a text: [N, 3] each."""
        key = (*samples.shape[2:], tokens)
        if key not in self._ids:
            if len(self._ids) >= _MOST_SIZES:
                self._ids.clear()
            height, width = (side // 2 for side in samples.shape[2:])
            image = self._pipe._prepare_latent_image_ids(1, height, width, "cpu", samples.dtype)
            text = torch.zeros(tokens, 3, device=samples.device, dtype=samples.dtype)
            self._ids[key] = {"txt_ids": text, "img_ids": send(image, samples.device)}
        return self._ids[key]


def _latents(output: SimpleNamespace, generator: torch.Generator) -> torch.Tensor:
    """Latents [1, C, h, w] of the output of a VAE's encoder, drawn if it is a distribution."""
    latents: torch.Tensor = output.latent_dist.sample(generator) if hasattr(output, "latent_dist") else output.latents
    return latents
