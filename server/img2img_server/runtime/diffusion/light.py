"""Pipelines of Stable Diffusion 1, 2, XL and of Latent Consistency Models whose models are graphs, as far as the engine needs
them.

diffusers' own classes import its models and transformers' in PyTorch, which takes seconds and more than 150 MB. The methods here
do what those of the same names do in the diffusers class that each class names, with the same results bit by bit
(tests/server/test_light_pipelines.py). They have no call: the engine makes the steps.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from img2img_server.runtime.common.diffusers_import import FrozenDict, VaeImageProcessor, randn_tensor

_FIELDS = ("prompt", "image", "strength", "num_inference_steps", "guidance_scale")


def _parameters(*names: str) -> Mapping[str, inspect.Parameter]:
    return {name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names}


class LightLatentConsistency:
    """LatentConsistencyModelImg2ImgPipeline: `components` are its parts by name, `settings` its configuration."""

    components_names: ClassVar[tuple[str, ...]] = (
        *("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor", "image_encoder"),
    )
    """The parameters of the class that are parts, in their order."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Its other parameters that are in its configuration, with their defaults."""
    call_parameters: ClassVar[Mapping[str, inspect.Parameter]] = _parameters(*_FIELDS)
    """Parameters of its call that make a difference to the server (common/request_fields.py, common/sources.py)."""

    def __init__(self, components: Mapping[str, Any], settings: Mapping[str, Any], device: str = "cpu") -> None:
        self.components: dict[str, Any] = {name: components.get(name) for name in self.components_names}
        self.config = FrozenDict({**self.settings, **settings})
        self.device = self._execution_device = torch.device(device)
        self.vae, self.unet, self.scheduler = (self.components[name] for name in ("vae", "unet", "scheduler"))
        self.safety_checker: None = None
        self.__dict__.update(self.components)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(self, prompt: Sequence[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """The text encoder's output [n, T, D] for n prompts."""
        encoder = self.components["text_encoder"]
        ids, mask = self._tokens("tokenizer", prompt)
        outputs = encoder.outputs(ids, mask if encoder.config.get("use_attention_mask") else None)
        return next(iter(outputs.values())), None  # type: ignore[return-value]

    def _tokens(self, tokenizer: str, prompt: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask [n, T] on the device, where the encoder's output is, too."""
        ids, mask = self.components[tokenizer].padded(prompt)
        return ids.to(self.device), mask.to(self.device)

    def get_timesteps(self, num_inference_steps: int, strength: float, device: Any) -> tuple[torch.Tensor, int]:
        """The scheduler's timesteps that run at this strength, and their number. Sets its first step."""
        first = max(num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps), 0)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first * self.scheduler.order)
        return self.scheduler.timesteps[first * self.scheduler.order :], num_inference_steps - first

    def prepare_latents(
        self,
        image: torch.Tensor,
        timestep: torch.Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: Any,
        generator: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """The first latents [n, C, h, w] of n images, with noise, from a generator for each."""
        image = image.to(device=device, dtype=dtype)
        encoded = [_latents(self.vae.encode(image[row : row + 1]), own) for row, own in enumerate(generator)]
        original = self._scaled(torch.cat(encoded), dtype)
        noise = randn_tensor(original.shape, generator=list(generator), device=device, dtype=dtype)
        noisy: torch.Tensor = self.scheduler.add_noise(original, noise, timestep)
        return noisy

    def _scaled(self, encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The VAE's latents as the UNet takes them."""
        scaled: torch.Tensor = self.vae.config.scaling_factor * encoded
        return scaled

    def get_guidance_scale_embedding(self, w: torch.Tensor, embedding_dim: int) -> torch.Tensor:
        """Guidance scales [n] as the input of a distilled UNet, [n, `embedding_dim`]."""
        half = embedding_dim // 2
        steps = torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
        angles = (w * 1000.0).to(torch.float32)[:, None] * torch.exp(steps)[None, :]
        waves = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
        return torch.nn.functional.pad(waves, (0, embedding_dim % 2))


class LightStableDiffusion(LightLatentConsistency):
    """StableDiffusionImg2ImgPipeline."""

    settings = {"requires_safety_checker": True}
    call_parameters = _parameters(*_FIELDS, "negative_prompt")

    def __init__(self, components: Mapping[str, Any], settings: Mapping[str, Any], device: str = "cpu") -> None:
        super().__init__(components, settings, device)
        # The class corrects old configurations.
        config = self.scheduler.config
        corrected = {"steps_offset": 1} if config.get("steps_offset", 1) != 1 else {}
        corrected |= {"clip_sample": False} if config.get("clip_sample", False) is True else {}
        if corrected:
            self.scheduler._internal_dict = FrozenDict({**config, **corrected})


class LightStableDiffusionXL(LightLatentConsistency):
    """StableDiffusionXLImg2ImgPipeline, without a watermark."""

    components_names = (
        *("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        *("unet", "scheduler", "image_encoder", "feature_extractor"),
    )
    settings = {"requires_aesthetics_score": False, "force_zeros_for_empty_prompt": True}
    call_parameters = _parameters(*_FIELDS, "negative_prompt")

    def encode_prompt(self, prompt: Sequence[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """The text encoders' hidden states [n, T, D1 + D2], and the pooled output [n, P] of the last that has one."""
        hidden, pooled = [], None
        for suffix in ("", "_2"):
            if self.components["tokenizer" + suffix] is None:
                continue
            ids = self._tokens("tokenizer" + suffix, prompt)[0]
            outputs = self.components["text_encoder" + suffix].outputs(ids)
            first = next(iter(outputs.values()))
            if pooled is None and first.ndim == 2:
                pooled = first
            hidden.append(outputs["hidden_states"][-2])
        return torch.concat(hidden, dim=-1), None, pooled, None  # type: ignore[return-value]

    def _scaled(self, encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        encoded = encoded.to(dtype)
        mean, std = self.vae.config.get("latents_mean"), self.vae.config.get("latents_std")
        if mean is None or std is None:
            return super()._scaled(encoded, dtype)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(encoded.device, dtype) for values in (mean, std))
        scaled: torch.Tensor = (encoded - mean) * self.vae.config.scaling_factor / std
        return scaled

    def _get_add_time_ids(
        self,
        original_size: tuple[int, int],
        crops: tuple[int, int],
        target_size: tuple[int, int],
        score: float,
        negative_score: float,
        negative_original_size: tuple[int, int],
        negative_crops: tuple[int, int],
        negative_target_size: tuple[int, int],
        dtype: torch.dtype,
        text_encoder_projection_dim: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The size conditioning of the prompt and of the negative prompt, [1, 5 or 6]. Raises ValueError if the UNet takes
        another number of them."""
        if self.config["requires_aesthetics_score"]:
            ids: list[float] = [*original_size, *crops, score]
            negative: list[float] = [*negative_original_size, *crops, negative_score]
        else:
            ids, negative = [*original_size, *crops, *target_size], [*negative_original_size, *crops, *negative_target_size]
        made = self.unet.config.addition_time_embed_dim * len(ids) + text_encoder_projection_dim
        expected = self.unet.add_embedding.linear_1.in_features
        if made != expected:
            raise ValueError(f"the UNet takes added embeddings of {expected} numbers, and {made} were made")
        return torch.tensor([ids], dtype=dtype), torch.tensor([negative], dtype=dtype)


LIGHT: Mapping[str, type[LightLatentConsistency]] = {
    "StableDiffusionImg2ImgPipeline": LightStableDiffusion,
    "StableDiffusionXLImg2ImgPipeline": LightStableDiffusionXL,
    "LatentConsistencyModelImg2ImgPipeline": LightLatentConsistency,
}
"""The light classes by the names of the diffusers classes that they replace."""


def _latents(output: Any, generator: torch.Generator) -> torch.Tensor:
    """Latents of an encoder's output; drawn, if it is a distribution."""
    latents: torch.Tensor = output.latent_dist.sample(generator) if hasattr(output, "latent_dist") else output.latents
    return latents
