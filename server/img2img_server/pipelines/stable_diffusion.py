"""The families of Stable Diffusion, split into the parts that the engine schedules.

We own the loop, not the mathematics: prompts, pictures, latents, timesteps and schedulers are handled by the methods of
diffusers' own img2img pipeline, whose components may be stand-ins over ONNX graphs or torch modules.
The order of calls is that of StableDiffusionImg2ImgPipeline.__call__ and StableDiffusionXLImg2ImgPipeline.__call__.
"""

import copy
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.pipelines.torch_calls import torch_call

Conditioning = dict[str, torch.Tensor]
"""The UNet's inputs beside sample and timestep, by name. Each is [rows of the UNet call, ...]."""


@dataclass(slots=True, eq=False)
class DiffusionState:
    """A request between two steps. With n seeds, `latents` is [n, C, h, w]; with guidance, conditioning has 2n rows, the
    negative prompt's first."""

    request: Request
    scheduler: Any
    timesteps: torch.Tensor
    latents: torch.Tensor
    conditioning: Conditioning
    generators: list[torch.Generator]
    step_arguments: dict[str, Any]
    shape: Hashable
    step: int = 0

    @property
    def rows(self) -> int:
        """How many pictures this state adds to a batch."""
        return self.latents.shape[0]

    @property
    def step_count(self) -> int:
        """How often the UNet is called for it."""
        return len(self.timesteps)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on, which doubles its rows in the UNet's call."""
        return is_guided(self.request)

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep that is next."""
        return self.timesteps[self.step]

    def model_input(self) -> torch.Tensor:
        """The latents as the UNet wants them, [n or 2n, C, h, w]."""
        latents = torch.cat([self.latents, self.latents]) if self.guided else self.latents
        scaled: torch.Tensor = self.scheduler.scale_model_input(latents, self.timestep)
        return scaled


def is_guided(request: Request) -> bool:
    """Whether classifier-free guidance has an effect: diffusers' rule."""
    return request.guidance_scale > 1


class StableDiffusion:
    """Stable Diffusion 1 and 2, and what shares their components. Implements the engine's Pipeline."""

    max_rows: int | None = None

    def __init__(self, pipe: Any, engine: str, threads: int) -> None:
        self._pipe = pipe
        self.engine = engine
        self.threads = threads
        self.size_multiple: int = pipe.vae_scale_factor

    @torch_call
    def prepare(self, request: Request) -> DiffusionState:
        """Encodes the request and makes its first latents. Raises InvalidField where no step is left to run."""
        pipe = _view(self._pipe)
        count = len(request.seeds)
        device = pipe._execution_device
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        pipe.scheduler.set_timesteps(request.num_inference_steps, device=device)
        timesteps, _ = pipe.get_timesteps(request.num_inference_steps, request.strength, device)
        if len(timesteps) == 0:
            raise InvalidField("strength", "strength times num_inference_steps is below 1: no step would be run")
        prompt_embeds, conditioning = self._encode_prompt(pipe, request, device)
        latents = pipe.prepare_latents(
            pipe.image_processor.preprocess(request.image),
            timesteps[:1].repeat(count),
            batch_size=1,
            num_images_per_prompt=count,
            dtype=prompt_embeds.dtype,
            device=device,
            generator=generators,
        )
        conditioning |= self._size_conditioning(pipe, request, latents, prompt_embeds.dtype)
        return DiffusionState(
            request=request,
            scheduler=pipe.scheduler,
            timesteps=timesteps,
            latents=latents,
            conditioning=conditioning,
            generators=generators,
            step_arguments=pipe.prepare_extra_step_kwargs(generators, 0.0),
            shape=(*latents.shape[1:], *prompt_embeds.shape[1:]),
        )

    @torch_call
    def denoise(self, states: Sequence[DiffusionState]) -> Sequence[torch.Tensor]:
        """One UNet call for all of `states`, whatever their steps, schedulers and guidance. [n or 2n, C, h, w] for each."""
        samples = [state.model_input() for state in states]
        sizes = [len(sample) for sample in samples]
        timesteps = [state.timestep.repeat(size) for state, size in zip(states, sizes, strict=True)]
        joined = {name: torch.cat([state.conditioning[name] for state in states]) for name in states[0].conditioning}
        hidden_states = joined.pop("encoder_hidden_states")
        noise: torch.Tensor = self._pipe.unet(
            torch.cat(samples),
            torch.cat(timesteps),
            encoder_hidden_states=hidden_states,
            added_cond_kwargs=joined,
            return_dict=False,
        )[0]
        return torch.split(noise, sizes)

    @torch_call
    def advance(self, state: DiffusionState, noise: torch.Tensor) -> None:
        """Applies guidance and takes the state's own scheduler one step on."""
        if state.guided:
            unconditional, text = noise.chunk(2)
            noise = unconditional + state.request.guidance_scale * (text - unconditional)
        state.latents = state.scheduler.step(noise, state.timestep, state.latents, **state.step_arguments, return_dict=False)[0]
        state.step += 1

    @torch_call
    def finish(self, state: DiffusionState) -> Sequence[Image.Image]:
        """Decodes the latents. Raises FloatingPointError rather than return the black picture that NaN would become."""
        pixels = self._decode(state)
        if not torch.isfinite(pixels).all():
            raise FloatingPointError("the decoded picture has values that are not finite")
        images: Sequence[Image.Image] = self._pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def release(self, state: DiffusionState) -> None:
        """Nothing is held outside of Python's memory."""

    def _encode_prompt(self, pipe: Any, request: Request, device: torch.device) -> tuple[torch.Tensor, Conditioning]:
        embeds, negative = pipe.encode_prompt(
            request.prompt,
            device,
            len(request.seeds),
            is_guided(request),
            request.negative_prompt,
        )
        return embeds, {"encoder_hidden_states": torch.cat([negative, embeds]) if is_guided(request) else embeds}

    def _size_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor, dtype: torch.dtype) -> Conditioning:
        return {}

    def _decode(self, state: DiffusionState) -> torch.Tensor:
        vae = self._pipe.vae
        pixels = vae.decode(state.latents / vae.config.scaling_factor, return_dict=False, generator=state.generators)[0]
        if self._pipe.safety_checker is None:
            return torch.as_tensor(pixels)
        checked, flagged = self._pipe.run_safety_checker(pixels, pixels.device, pixels.dtype)
        if any(flagged or ()):
            logging.getLogger(__name__).info("the model's safety checker blanked a picture")
        return torch.as_tensor(checked)


class StableDiffusionXL(StableDiffusion):
    """SDXL base and refiner: a second text encoder, pooled embeddings and size conditioning. No watermark is applied."""

    def _encode_prompt(self, pipe: Any, request: Request, device: torch.device) -> tuple[torch.Tensor, Conditioning]:
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            prompt=request.prompt,
            device=device,
            num_images_per_prompt=len(request.seeds),
            do_classifier_free_guidance=is_guided(request),
            negative_prompt=request.negative_prompt,
        )
        if not is_guided(request):
            return embeds, {"encoder_hidden_states": embeds, "text_embeds": pooled}
        return embeds, {
            "encoder_hidden_states": torch.cat([negative, embeds]),
            "text_embeds": torch.cat([negative_pooled, pooled]),
        }

    def _size_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor, dtype: torch.dtype) -> Conditioning:
        size = (latents.shape[-2] * pipe.vae_scale_factor, latents.shape[-1] * pipe.vae_scale_factor)
        # diffusers' defaults of a call: no crop, aesthetic scores 6.0 and 2.5.
        positive, negative = pipe._get_add_time_ids(
            size, (0, 0), size, 6.0, 2.5, size, (0, 0), size,
            dtype=dtype, text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
        )  # fmt: skip
        rows = [negative] * len(latents) + [positive] * len(latents) if is_guided(request) else [positive] * len(latents)
        return {"time_ids": torch.cat(rows).to(latents.device)}

    def _decode(self, state: DiffusionState) -> torch.Tensor:
        vae = self._pipe.vae
        latents = state.latents / vae.config.scaling_factor
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            latents = latents * _channels(std, latents) + _channels(mean, latents)
        return torch.as_tensor(vae.decode(latents, return_dict=False)[0])


class _EncodeOnce:
    """A VAE that encodes one picture once, though prepare_latents asks again for each generator."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._encoded: SimpleNamespace | None = None

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        if self._encoded is None:
            self._encoded = self._vae.encode(pixels)
        return self._encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


def _view(pipe: Any) -> Any:
    """The pipeline as one request sees it: the shared models, but a scheduler of its own and a VAE that encodes once."""
    view = copy.copy(pipe)
    # Past diffusers' __setattr__, which would note the new classes in a configuration nobody reads.
    view.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    view.__dict__["vae"] = _EncodeOnce(pipe.vae)
    return view


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
