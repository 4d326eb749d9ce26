"""Families whose transformer is a graph of tokens (`onnx/token_graphs.py`): Stable Diffusion 3, Flux, Chroma, FLUX.2,
LongCat-Image-Edit, Qwen-Image and Z-Image.

Latents are kept as tokens, [n, C, N, 1], so that requests of different shapes share calls if their images have equally many
tokens, and their references too. Rotary tables, or indices of a table, say where each token lies.
"""

from collections.abc import Callable, Hashable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from PIL import Image

from img2img_server.engine.request import Plan, Request
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.diffusers_import import diffusers
from img2img_server.runtime.common.pipe import view_as, view_of
from img2img_server.runtime.common.request_fields import masked_fields
from img2img_server.runtime.common.rotary import Size
from img2img_server.runtime.common.sources import check_sources, check_texts
from img2img_server.runtime.diffusion.conditioning import Embedding, Encoded
from img2img_server.runtime.diffusion.state import Conditioning, DiffusionState
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.lora.adapters import Choice
from img2img_server.runtime.onnx.token_graphs import TokenGraph, join, patches, unpatched

_T = TypeVar("_T")

_REFERENCES = "references"
"""The references' tokens [rows, M, C] in a state's conditioning; the graph takes them after the image's."""


class TokenPipeline(SteppedPipeline):
    """A transformer as a graph of tokens. A subclass that edits gives sources as references, and begins from noise alone."""

    denoiser_name = "transformer"
    pooled_name = "pooled_projections"
    edits = False
    inpainting = ""
    """The name of diffusers' inpainting class, for one that edits and takes masks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.inpainting:
            self._inpainting: type = getattr(diffusers, self.inpainting)
            self.fields = {**self.fields, **masked_fields(self._inpainting, self.fields)}

    def plan(self, request: Request) -> Plan:
        """The plan of a request. Raises InvalidField for an image or a text that the model does not take."""
        check_sources(self._pipe, request)
        check_texts(self._pipe, self._read_texts(request))
        for size in self._sizes(request)[1:]:
            height, width = (side * self.size_multiple for side in size)
            for module in self._opening:
                module.open_for(width, height)
        return super().plan(request)

    def preview(self, states: Sequence[DiffusionState]) -> Sequence[Image.Image | None]:
        """A preview of each state's first image, at the size of its latents; None if there is none."""
        return self._by_size(states, super().preview)

    def finish(self, states: Sequence[DiffusionState]) -> Sequence[Sequence[Image.Image]]:
        """Decodes the latents, those of one size in one call."""
        return self._by_size(states, super().finish)

    def _by_size(
        self, states: Sequence[DiffusionState], function: Callable[[Sequence[DiffusionState]], Sequence[_T]]
    ) -> Sequence[_T]:
        found: dict[int, _T] = {}
        for size in dict.fromkeys(state.request.result_size for state in states):
            alike = [state for state in states if state.request.result_size == size]
            found |= zip((state.number for state in alike), function(alike), strict=True)
        return [found[state.number] for state in states]

    def _shape(self, request: Request) -> tuple[Hashable, int]:
        image, *references = (height * width for height, width in self._sizes(request))
        return (image, sum(references)), (image + sum(references)) * self.size_multiple**2

    def _sizes(self, request: Request) -> list[Size]:
        """Height and width in tokens of the request's image and its references."""
        sizes = [request.result_size]
        if self.edits and self._sees_source(request):
            # With a mask the model sees the source as large as the result, which starts from it.
            sizes.append(request.result_size if request.mask is not None else self._reference_size(request.image))
        sizes += map(self._reference_size, request.references)
        return [(height // self.size_multiple, width // self.size_multiple) for width, height in sizes]

    def _sees_source(self, request: Request) -> bool:
        """Whether the source is one of the references of a model that edits."""
        return True

    def _reference_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height in pixels at which the model looks at an image."""
        raise NotImplementedError

    def _conditioning(self, request: Request, positive: Embedding, negative: Embedding | None) -> Conditioning:
        sizes = self._sizes(request)
        rows = [self._row(each, sizes) for each in (negative, positive) if each is not None]
        joined = join([row for row in rows for _ in request.seeds])
        return {name: send(tensor, self._device) for name, tensor in joined.items()}

    def _row(self, text: Embedding, sizes: Sequence[Size]) -> Conditioning:
        tokens: TokenGraph = self._denoiser.tokens
        pooled = {} if text.pooled is None else {self.pooled_name: text.pooled}
        return tokens.conditions(text.hidden_states[0], sizes) | pooled

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        rows = len(latents) * (2 if self._is_guided(request) else 1)
        more: Conditioning = {}
        if self.edits:
            seen = [view_of(pipe, vae=Encoded(self._pipe.vae, one)) for one in self._encoder.references(request)]
            parts = [self._reference(one) for one in seen]
            if self._sees_source(request):
                parts.insert(0, self._reference(pipe) if request.mask is None else self._started_from(pipe))
            images = max(map(len, parts))
            references = torch.cat([part.expand(images, -1, -1) for part in parts], dim=1)
            more[_REFERENCES] = references.expand(rows, -1, -1) if images == 1 else references.repeat(rows // images, 1, 1)
        if self._denoiser.config.get("guidance_embeds"):
            more["guidance"] = torch.full((rows,), request.guidance_scale, device=latents.device)
        return more

    def _reference(self, pipe: Any) -> torch.Tensor:
        """The tokens [1, M, C] of an image, which `pipe` has encoded already."""
        raise NotImplementedError

    def _started_from(self, pipe: Any) -> torch.Tensor:
        """The tokens [n, N, C] of the source of a request with a mask, as its n results have started from it."""
        original, _ = pipe.scheduler.given
        return self._layout(original)[..., 0].transpose(1, 2)

    def _images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        if not self.edits:
            return super()._images(requests)
        masked = iter(self._encoder.sized_images([request for request in requests if request.mask], self._sized_pixels))
        others = iter(self._encoder.images([request for request in requests if not request.mask]))
        return [next(masked if request.mask else others) for request in requests]

    def _sized_pixels(self, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        """The VAE's input for an image at a size: for the source of a request with a mask, at the result's."""
        width, height = size
        pixels: torch.Tensor = self._pipe.image_processor.preprocess(image, height, width)
        return pixels

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        (width, height), count = request.result_size, len(generators)
        channels = self._denoiser.config.in_channels // self._patch
        place = (count, channels, height, width, dtype, pipe._execution_device, generators)
        image = torch.empty(count, 3, 1, 1)  # stands for the image
        if not self.edits:
            made = pipe.prepare_latents(image, timesteps, *place)
        elif request.mask is not None:
            made = self._as_inpainting(pipe).prepare_latents(image, timesteps, *place)
        else:
            made = pipe.prepare_latents(*self._no_image, *place)
        return self._packed(made[0] if isinstance(made, tuple) else made)

    def _as_inpainting(self, pipe: Any) -> Any:
        """`pipe` as an object of diffusers' inpainting class."""
        return view_as(pipe, self._inpainting)

    def _pure_noise(self, latents: torch.Tensor, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
        return latents  # the inpainting pipelines of these classes have no case of their own for strength 1

    _patch = 4
    """The transformer's channels for each channel of latents."""
    _no_image: tuple[None, ...] = (None,)
    """The argument of `prepare_latents` that stands for no image."""

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """The result of `prepare_latents`, tokens [n, N, C], as latents [n, C, N, 1]."""
        return latents.transpose(1, 2)[..., None].contiguous()

    @property
    def _predict(self) -> Callable[..., tuple[torch.Tensor]]:
        predict: Callable[..., tuple[torch.Tensor]] = self._denoiser.predict
        return predict

    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        tokens, references = samples[..., 0].transpose(1, 2), conditioning.pop(_REFERENCES, None)
        if references is not None:
            tokens = torch.cat([tokens, references], dim=1)
        return {"hidden_states": tokens, "timestep": timesteps / 1000, **conditioning}

    def _noise(self, output: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return output[:, : samples.shape[2]].transpose(1, 2)[..., None]

    def _final_latents(self, state: DiffusionState) -> torch.Tensor:
        return self._unpacked(state.latents, state.request)

    def _unpacked(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        """Latents [n, C, N, 1] of a state as the VAE and previews take them, [n, c, h, w]; by the class's `_unpack_latents`."""
        width, height = request.result_size
        tokens = latents[..., 0].transpose(1, 2)
        unpacked: torch.Tensor = self._pipe._unpack_latents(tokens, height, width, self._pipe.vae_scale_factor)
        return unpacked


class PatchedPipeline(TokenPipeline):
    """A class whose latents are images [n, c, h, w], of which the transformer's tokens are patches of two by two."""

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._packed(torch.stack([patches(one[:, None]) for one in latents]))

    def _layout(self, latents: torch.Tensor) -> torch.Tensor:
        return self._packed(latents)

    def _unpacked(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        width, height = (side // self._pipe.vae_scale_factor for side in request.result_size)
        shape = (latents.shape[1] // 4, 1, height, width)
        return torch.cat([unpatched(tokens.T, shape).transpose(0, 1) for tokens in latents[..., 0]])


class SeeingPipeline(TokenPipeline):
    """A class whose text encoder also sees the request's images."""

    def _embed(self, requests: Sequence[Request], choices: Sequence[Choice | None]) -> list[dict[str, Embedding]]:
        return [
            {text: self._encoder.seen(request, text, lambda: self._see(request, text)) for text in self._texts(request)}  # noqa: B023
            for request in requests
        ]

    def _see(self, request: Request, text: str) -> Embedding:
        """The embedding of a text and the request's images."""
        raise NotImplementedError


class TrulyGuidedPipeline(TokenPipeline):
    """A class with `true_cfg_scale`, which guides if there is a negative prompt."""

    def _is_guided(self, request: Request) -> bool:
        return request.negative_prompt is not None and self._guidance(request) > 1

    def _guidance(self, request: Request) -> float:
        if request.true_cfg_scale is not None:
            return request.true_cfg_scale
        default = self.fields["true_cfg_scale"].default
        assert default is not None, "it is the class's own (common/request_fields.py)"
        return default
