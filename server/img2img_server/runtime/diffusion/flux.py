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
from img2img_server.runtime.control.own import with_control
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.masking import draw_again
from img2img_server.runtime.diffusion.stable_diffusion_3 import StableDiffusion3
from img2img_server.runtime.diffusion.state import Conditioning, DiffusionState
from img2img_server.runtime.schedulers.flow import FluxSchedulers

_CONTROL = "control_latents"
"""What `FluxControl` adds to the tokens of the latents: those of the control image, [R, N, C]."""
_MOST_SIZES = 16
"""Sizes whose position ids are kept."""


class Flux(StableDiffusion3):
    """One row for each image: guidance is an input of the transformer, or (schnell) there is none."""

    scheduler_cache = FluxSchedulers
    ignored_fields = frozenset({"negative_prompt", "true_cfg_scale"})
    takes_controls = True
    parts_of_input = 1
    """How many sets of latents the transformer's input channels are for."""
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
            timesteps, count, self._denoiser.config.in_channels // (4 * self.parts_of_input), height, width, dtype,
            pipe._execution_device, generators,
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
    ) -> tuple[tuple[Control, ...], Conditioning]:
        """Encodes the images of the ControlNets that read latents. Each image of the result draws its own."""
        found = list(controls)
        indices = [i for i, own in enumerate(controls) if isinstance(own.net, FluxControlNet) and own.net.reads_latents]
        outputs = self._encoder.control_images(request, indices) if indices else []
        for index, output in zip(indices, outputs, strict=True):
            found[index] = replace(controls[index], image=self._packed(output, generators))
        return tuple(found), {}

    def _packed(self, output: SimpleNamespace, generators: list[torch.Generator]) -> torch.Tensor:
        """Packed latents [images, N, C] of the output of the VAE's encoder for one image."""
        drawn = torch.cat([_latents(output, generator) for generator in generators])
        latents = (drawn - self._pipe.vae.config.shift_factor) * self._pipe.vae.config.scaling_factor
        packed: torch.Tensor = self._pipe._pack_latents(latents, *latents.shape)
        return packed

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


class FluxControl(Flux):
    """Flux Depth and Canny: the transformer reads the latents of a control image beside those of the result.

    The order of calls is that of FluxControlImg2ImgPipeline.__call__, and with a mask of FluxControlInpaintPipeline.__call__.
    """

    takes_controls = False
    reads_control = True
    parts_of_input = 2
    encodes_masked_source = False  # drawn below: before all else

    def _read_controls(
        self, request: Request, controls: tuple[Control, ...], generators: list[torch.Generator]
    ) -> tuple[tuple[Control, ...], Conditioning]:
        """Encodes the control image. Each image of the result draws its own latents of it."""
        (output,) = self._encoder.control_images(with_control(request), [0])
        if request.mask is not None:
            draw_again(generators, output)
        return (), {_CONTROL: self._packed(output, generators)}

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        control = conditioning.pop(_CONTROL)
        inputs = super()._inputs(samples, timesteps, conditioning)
        tokens = inputs["hidden_states"]
        return {**inputs, "hidden_states": torch.cat([tokens, control.to(tokens.dtype)], dim=2)}


def _latents(output: SimpleNamespace, generator: torch.Generator) -> torch.Tensor:
    """Latents [1, C, h, w] of the output of a VAE's encoder, drawn if it is a distribution."""
    latents: torch.Tensor = output.latent_dist.sample(generator) if hasattr(output, "latent_dist") else output.latents
    return latents
