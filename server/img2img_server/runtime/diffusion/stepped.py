"""The common base of families whose denoiser is called step by step: the stages that the engine schedules.

Only the loop is ours: prompts, images, latents, timesteps and schedulers are handled by the methods of diffusers' img2img
pipeline, whose components are ONNX modules or torch modules.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from img2img_server.bundle.controls import DOWN, SAMPLES
from img2img_server.bundle.image_prompts import BIAS, STATES
from img2img_server.bundle.speedups import NONE, Speedups
from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Plan, Request
from img2img_server.runtime.common.device_copy import PinnedCopies, fetch_later, mark
from img2img_server.runtime.common.pipe import native_sizes, size_multiple, view_of
from img2img_server.runtime.common.request_fields import request_fields
from img2img_server.runtime.common.sources import source_rule
from img2img_server.runtime.common.torch_calls import host_call, torch_call
from img2img_server.runtime.common.truncation import Truncation
from img2img_server.runtime.control.controls import Control, ModelControls, NoControls, Rows
from img2img_server.runtime.control.own import OwnControl
from img2img_server.runtime.diffusion import preview
from img2img_server.runtime.diffusion.conditioning import Embedding, Encoded, Encoder
from img2img_server.runtime.diffusion.masking import Blend, draw_again, kept_latents, mask_latents, replace_kept
from img2img_server.runtime.diffusion.speedups import Chosen, SpeedupChooser, record_light, with_features
from img2img_server.runtime.diffusion.state import (
    Conditioning,
    DiffusionState,
    JoinedConditioning,
    Noise,
    Predicted,
    StepNumbers,
    guide,
    key_of,
    split_noise,
)
from img2img_server.runtime.image_prompts.prompts import ModelImagePrompts, NoImagePrompts
from img2img_server.runtime.lora.adapters import TEXT_ENCODERS, Choice, ModelLoras, NoLoras, for_texts
from img2img_server.runtime.lora.graph import adapting, least_slot_bytes, slot_bytes
from img2img_server.runtime.onnx.modules import OnnxModule, close_graphs, opened_later
from img2img_server.runtime.schedulers.cache import CachedScheduler, SchedulerCache
from img2img_server.runtime.schedulers.linear import Trajectory, advance_batch, step_arguments
from img2img_server.runtime.schedulers.noise_levels import Noising
from img2img_server.support.device_lock import records_at_once
from img2img_server.support.model_fields import ModelFields
from img2img_server.support.source_rule import MaskUse

PreviewWeights = Sequence[Sequence[float]]


class SteppedPipeline(ABC):
    """A diffusers pipeline whose requests share calls of its denoiser. Implements the engine's Pipeline.

    A family says in a subclass how its texts are encoded, what its denoiser is called with, and how latents are decoded.

    `preview_weights` is the manifest's `latent_preview`; if it is empty, there are no previews.
    """

    max_rows: int | None = None
    measurable = True
    owner: Hashable = None
    scheduler_cache: type[SchedulerCache] = SchedulerCache
    denoiser_name = "unet"
    """The component of the pipeline that predicts the noise."""
    pooled_name = "text_embeds"
    """The denoiser's input for pooled embeddings of texts."""
    ignored_fields: frozenset[str] = frozenset()
    """Fields of a request that diffusers' pipeline takes and the family does not."""
    mask_use: MaskUse = "none"
    """Whether requests may have a mask, or must. Latents are replaced outside of optional ones, so the family's `prepare_latents`
    adds noise by its scheduler."""

    mask_mode = "nearest"
    """How masks are scaled to the size of latents: a mode of torch's `interpolate`."""
    encodes_masked_source = True
    """Whether diffusers' inpainting class also encodes the source without its redrawn part."""

    takes_controls = False
    """Whether requests may have ControlNets, if the denoiser has a control graph."""

    reads_control = False
    """Whether the model has a built-in control input: every request then has a control image."""

    def __init__(
        self,
        pipe: Any,
        engine: str,
        threads: int,
        cache: Cache,
        preview_weights: PreviewWeights = (),
        loras: ModelLoras | NoLoras | None = None,
        speedups: Speedups | None = None,
        controls: ModelControls | OwnControl | NoControls | None = None,
        image_prompts: ModelImagePrompts | NoImagePrompts | None = None,
    ) -> None:
        self._pipe = pipe
        self.engine = engine
        self.threads = threads
        self._denoiser = getattr(pipe, self.denoiser_name)
        self._opening = [part for part in (self._denoiser, getattr(pipe, "vae", None)) if isinstance(part, OnnxModule)]
        self.size_multiple = size_multiple(pipe)
        self.native_size = native_sizes(pipe)
        self.fields: ModelFields = {name: rule for name, rule in request_fields(pipe).items() if name not in self.ignored_fields}
        self.source_rule = replace(source_rule(pipe), mask=self.mask_use)
        self.row_buckets: Sequence[int] = getattr(self._denoiser, "row_buckets", ())
        self._device = torch.device(pipe._execution_device)
        self._joined = JoinedConditioning()
        self._numbers: StepNumbers | None = None  # of the last call
        self._types: Mapping[str, torch.dtype] = getattr(self._denoiser, "input_types", {})
        self._scheduler_cache = self.scheduler_cache(pipe)
        self.schedulers = self._scheduler_cache.names
        self._encoder = Encoder(pipe, cache, self._encode_adapted, self._pixels)
        self._loras = loras or NoLoras("was loaded without a folder of LoRAs")
        self._controls = controls or (OwnControl() if self.reads_control else NoControls("was loaded without ControlNets"))
        self._image_prompts = image_prompts or NoImagePrompts("was loaded without a folder of image adapters")
        self.fields = {**self.fields, **self._loras.fields, **self._controls.fields, **self._image_prompts.fields}
        self._preview_weights = preview_weights
        has_light = bool(getattr(self._denoiser, "has_light", False))
        self.speedups = SpeedupChooser(speedups or NONE, type(pipe.scheduler).__name__, has_light)
        self._truncation = Truncation(pipe)

    @host_call
    def plan(self, request: Request) -> Plan:
        """The request's shape, rows and steps. Raises InvalidField if no step would run. Slow for a new scheduler, new
        steps or a new size."""
        self._loras.check(request)
        self._controls.check(request)
        self._image_prompts.check(request)
        for module in self._opening:
            module.open_for(*request.result_size)
        images, is_guided = len(request.seeds), self._is_guided(request)
        shape, pixels = self._shape(request)
        scheduler, chosen = self._scheduled(request)
        return Plan(
            shape,
            pixels,
            images * (2 if is_guided else 1),
            len(scheduler.times),
            (*self._truncation.warnings(self._read_texts(request)), *chosen.warnings),
            self.speedups.calls(chosen, shape, pixels, images, is_guided),
            chosen.used,
            self._controls.work(request),
        )

    @torch_call
    def prepare(self, requests: Sequence[Request]) -> Sequence[DiffusionState]:
        """Encodes texts and images that are not cached, and makes the first latents."""
        scheduled = [self._scheduled(request) for request in requests]
        choices = [self._loras.choice(request) for request in requests]
        prompts = [self._image_prompts.of(request, self._is_guided(request), self._device) for request in requests]
        with PinnedCopies():
            controls = [self._controls.of(request, self._device) for request in requests]
            embeddings = self._embed(requests, choices)
            images = self._images(requests)
            parts = zip(requests, scheduled, embeddings, images, controls, strict=True)
            states = [self._begin(*own) for own in parts]
        for state, choice, own in zip(states, choices, prompts, strict=True):
            state.choice, state.prompts = choice, own
        return states

    @torch_call
    def denoise(self, states: Sequence[DiffusionState]) -> Sequence[Noise]:
        """Calls the denoiser once for all `states`, which may differ in step, scheduler and guidance."""
        control = getattr(self._denoiser, "control", None)
        if control is not None and not control.mixes:
            further = [state.needs_control_graph for state in states]
            if len(set(further)) > 1:
                return self._denoise_apart(states, further)
        samples = [sample for state in states for sample in [state.unscaled()] * (2 if state.has_two else 1)]
        joined_samples = torch.cat(samples)
        self._numbers = numbers = StepNumbers.of(states, joined_samples.device)
        if numbers.is_scaled:
            wanted = torch.empty_like(joined_samples, dtype=self._types.get("sample", joined_samples.dtype))
            joined_samples = torch.mul(joined_samples, numbers.scales[:, None, None, None], out=wanted)
        conditioning = self._joined.get(states)
        residuals = self._residuals(states, joined_samples, numbers.timesteps, conditioning)
        inputs = self._inputs(joined_samples, numbers.timesteps, conditioning)
        with adapting([self._denoiser], [state.choice for state in states for _ in range(state.rows)]):
            if keepers := [state for state in states if state.speedup is not None and state.speedup.keeps_features]:
                predicted = with_features(self._denoiser, states, keepers, inputs | residuals)
            else:
                (predicted,) = self._predict(**inputs, **residuals)
                if records_at_once() and self.speedups.keeps_features:  # in warm-up
                    record_light(self._denoiser, inputs)
        return split_noise(states, self._noise(predicted, joined_samples))

    def _denoise_apart(self, states: Sequence[DiffusionState], further: Sequence[bool]) -> Sequence[Noise]:
        """Calls the control graph once for the states that need it, and the plain graph once for the others."""
        parts = {kind: [state for state, own in zip(states, further, strict=True) if own == kind] for kind in (False, True)}
        noises = {kind: iter(self.denoise(part)) for kind, part in parts.items()}
        return [next(noises[kind]) for kind in further]

    @property
    def slot_bytes(self) -> int:
        """The memory of the slots for LoRAs, which are made when a call first needs their ranks. Any thread may read it."""
        return slot_bytes(self._pipe)

    @property
    def least_slot_bytes(self) -> int:
        """The memory of the slots of the least padded ranks, which the first request with a LoRA makes."""
        return least_slot_bytes(self._pipe)

    @property
    def unopened_bytes(self) -> int:
        """The bytes of weights of the control graph, if there is one that is not open. Any thread may read it."""
        control = getattr(self._denoiser, "control", None)
        return 0 if control is None or control.opened is not None else control.bytes

    @property
    def opened_bytes(self) -> int:
        """The memory of the graphs that calls needed and that were opened then, about."""
        return opened_later(self._pipe)

    def open_control(self) -> None:
        """Opens the control graph, which is slow. Raises BundleError."""
        self._denoiser.control.get()

    def _residuals(
        self, states: Sequence[DiffusionState], samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> dict[str, Any]:
        """The denoiser's arguments for the controls that apply to the states' next step."""
        if not isinstance(self._controls, ModelControls) or not any(state.controls for state in states):
            return {}
        parts, start = [], 0
        for state in states:
            parts.append(Rows(range(start, start + state.rows), state.applying, state.has_two))
            start += state.rows
        own = {name: value for name, value in conditioning.items() if name not in (STATES, BIAS)}
        residuals = self._controls.residuals(parts, self._control_inputs(samples, timesteps, own))
        return {SAMPLES if SAMPLES in residuals else DOWN: residuals} if residuals else {}

    def mark(self) -> Callable[[], None] | None:
        """On CUDA, a function that waits for the device: `prepare`, `denoise` and `advance` only submit their work there."""
        return mark(self._device)

    @torch_call
    def advance(self, states: Sequence[DiffusionState], noises: Sequence[Noise]) -> None:
        """Applies guidance and steps all states: those with a linear solver together, each other one by its scheduler."""
        numbers = self._numbers
        if numbers is None or numbers.key != key_of(states):  # after a failure the engine retries some states separately
            numbers = StepNumbers.of(states, states[0].latents.device)
        outputs = self._guide(states, noises, numbers.guidance)
        predicted = [
            Predicted(state.step, state.input_scale, state.latents[:1], output[:1]) if state.preview_is_due else None
            for state, output in zip(states, outputs, strict=True)
        ]
        blends = [state.blend for state in states if state.blend is not None]
        kept = kept_latents(blends, [state.step for state in states if state.blend is not None]) if blends else ()
        followed = [(state, output) for state, output in zip(states, outputs, strict=True) if state.trajectory is not None]
        if followed:
            trajectories = [state.trajectory for state, _ in followed if state.trajectory is not None]
            samples = [state.latents for state, _ in followed]
            latents = advance_batch(trajectories, samples, [output for _, output in followed], numbers.table)
            for (state, _), new in zip(followed, latents, strict=True):
                state.latents = new
                state.step += 1
        for state, output, seen in zip(states, outputs, predicted, strict=True):
            state.predicted = seen
            if state.trajectory is None:
                step = state.scheduler.step(output, state.timestep, state.latents, **state.step_arguments, return_dict=False)
                state.latents = step[0] if state.blend is None else step[0].clone()  # replaced in place below
                state.step += 1
        if blends:
            replace_kept([state.latents for state in states if state.blend is not None], blends, kept)

    @torch_call
    def preview(self, states: Sequence[DiffusionState]) -> Sequence[Image.Image | None]:
        """A preview of each state's first image, at the size of its latents; None if there is none."""
        if not self._preview_weights:
            return [None] * len(states)
        originals = [state.original() for state in states]
        known = [self._unpacked(one, state.request) for one, state in zip(originals, states, strict=True) if one is not None]
        drawn = iter(preview.draw(torch.cat(known), self._preview_weights) if known else ())
        return [None if one is None else next(drawn) for one in originals]

    @torch_call
    def finish(self, states: Sequence[DiffusionState]) -> Sequence[Sequence[Image.Image]]:
        """Decodes the latents. Raises FloatingPointError for values that are not finite, which would become a black image."""
        pixels = self._decode(torch.cat([self._final_latents(state) for state in states]))
        is_finite = fetch_later(torch.isfinite(pixels).all())
        with PinnedCopies(), np.errstate(invalid="ignore"):
            images = iter(self._pipe.image_processor.postprocess(pixels, output_type="pil"))
        if not is_finite:
            raise FloatingPointError("the decoded image has values that are not finite")
        return [[next(images) for _ in state.request.seeds] for state in states]

    def release(self, state: DiffusionState) -> None:
        """Frees the batch conditioning that includes `state`."""
        self._joined.forget(state)

    def close(self) -> None:
        """Removes its entries from the cache and releases its sessions, even if this pipeline is still referenced."""
        self._encoder.close()
        self._loras.close()
        self._image_prompts.close()
        close_graphs(self._pipe)

    def _scheduled(self, request: Request) -> tuple[CachedScheduler, Chosen]:
        """The scheduler that runs the request's steps, and what its steps skip."""
        scheduler = self._scheduler_cache.get(request)
        chosen = self.speedups.choose(request, scheduler, self._is_guided(request))
        return self._scheduler_cache.get_part(request, chosen.called) if chosen.skips else scheduler, chosen

    def _encode_adapted(self, texts: list[str], choices: list[Choice | None]) -> list[Embedding]:
        encoders = [self._pipe.components.get(name) for name in TEXT_ENCODERS]
        with adapting(encoders, choices):
            return self._encode_texts(texts)

    def _begin(
        self,
        request: Request,
        scheduled: tuple[CachedScheduler, Chosen],
        embeddings: dict[str, Embedding],
        image: SimpleNamespace,
        controls: tuple[Control, ...],
    ) -> DiffusionState:
        cached_scheduler, chosen = scheduled
        count = len(request.seeds)
        positive, negative = self._embeddings(request, embeddings)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        controls, seen = self._read_controls(request, controls, generators)
        noising = Noising(cached_scheduler.scheduler)
        pipe = view_of(self._pipe, scheduler=noising, vae=Encoded(self._pipe.vae, image))
        latents = self._first_latents(
            pipe, request, cached_scheduler.timesteps[:1].repeat(count), positive.hidden_states.dtype, generators
        )
        blend = None
        if request.mask is not None and self.mask_use == "optional":
            assert noising.given is not None, "the first latents of a family that takes masks are the source's, with noise"
            original, noise = noising.given
            if request.strength == 1:
                latents = self._pure_noise(latents, self._layout(noise), cached_scheduler.scheduler)
            if self.encodes_masked_source:
                draw_again(generators, image)
            redrawn = mask_latents(request.mask.image, original, self.mask_mode)
            blend = Blend.of(redrawn, original, noise, cached_scheduler.levels, self._layout)
        conditioning = self._conditioning(request, positive, negative) | self._more_conditioning(pipe, request, latents)
        conditioning |= self._mask_conditioning(request, image, latents, generators) | seen
        # Converted once here instead of in each step.
        conditioning = {name: tensor.to(self._types.get(name, tensor.dtype)) for name, tensor in conditioning.items()}
        state = DiffusionState(
            request,
            cached_scheduler.timesteps,
            cached_scheduler.times,
            latents,
            conditioning,
            generators,
            trajectory=None,
            guided=self._is_guided(request),
            guidance=self._guidance(request),
            begun=cached_scheduler.scheduler,
            indices=cached_scheduler.indices,
            blend=blend,
            speedup=chosen.speedup,
            light=chosen.light,
            controls=controls,
        )
        if cached_scheduler.schedule is not None:
            state.trajectory = Trajectory(cached_scheduler.schedule, generators)
        else:
            state.scheduler = copy.deepcopy(cached_scheduler.scheduler)
            state.step_arguments = step_arguments(state.scheduler, generators)
        return state

    @abstractmethod
    def _is_guided(self, request: Request) -> bool:
        """Whether classifier-free guidance doubles the request's rows in the denoiser's call, by diffusers' rule."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        """The embedding of each text."""

    @abstractmethod
    def _inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The arguments of the denoiser's forward for `samples` [R, C, h, w] at `timesteps` [R]. It may change `conditioning`."""

    def _control_inputs(self, samples: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> Conditioning:
        """The inputs of ControlNets, by name, for a call of the denoiser as of `_inputs`."""
        return {"sample": samples, "timestep": timesteps, **conditioning}

    def _read_controls(
        self, request: Request, controls: tuple[Control, ...], generators: list[torch.Generator]
    ) -> tuple[tuple[Control, ...], Conditioning]:
        """The controls with what their ControlNets read of the images, and the denoiser's inputs for the image of a built-in
        control input. It may draw from the `generators`, before all else."""
        return controls, {}

    @abstractmethod
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The pixels [n, 3, H, W], from -1 to 1, of latents [n, C, h, w]."""

    def _shape(self, request: Request) -> tuple[Hashable, int]:
        """The key that requests must share to share calls, and the pixels of each row in a call."""
        width, height = request.image.size
        return (height, width), width * height

    def _guidance(self, request: Request) -> float:
        """The factor of the difference that the prompt makes, if the request is guided."""
        return request.guidance_scale

    def _embed(self, requests: Sequence[Request], choices: Sequence[Choice | None]) -> list[dict[str, Embedding]]:
        """The embeddings of each request's texts, with its LoRAs."""
        texts = [
            {text: (request.cache_scope, text, for_texts(choice)) for text in self._texts(request)}
            for request, choice in zip(requests, choices, strict=True)
        ]
        found = self._encoder.texts([scoped for own in texts for scoped in own.values()])
        return [{text: found[scoped] for text, scoped in own.items()} for own in texts]

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """The VAE's input for a source, [1, 3, H, W]."""
        pixels: torch.Tensor = self._pipe.image_processor.preprocess(image)
        return pixels

    @property
    def _predict(self) -> Callable[..., tuple[torch.Tensor]]:
        """Calls the denoiser with its inputs by name. Hooks are skipped: there are none."""
        return partial(self._denoiser.forward, return_dict=False)

    def _guide(self, states: Sequence[DiffusionState], noises: Sequence[Noise], guidance: torch.Tensor) -> Sequence[torch.Tensor]:
        """The predictions of all states after guidance."""
        return guide(states, noises, guidance)

    def _unpacked(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        """Latents of a state as previews take them, [n, C, h, w]."""
        return latents

    def _more_conditioning(self, pipe: Any, request: Request, latents: torch.Tensor) -> Conditioning:
        """The denoiser's inputs for a request that starts from `latents`, besides its texts. `pipe` has the encoded image."""
        return {}

    def _noise(self, output: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """The denoiser's prediction for `samples`, in their shape."""
        return output

    def _first_latents(
        self, pipe: Any, request: Request, timesteps: torch.Tensor, dtype: torch.dtype, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The latents [n, C, h, w] that the request starts from, by `pipe`, whose image is encoded already."""
        count = len(generators)
        image = torch.empty(count, 3, 1, 1)  # stands for the image
        latents: torch.Tensor = pipe.prepare_latents(image, timesteps, 1, count, dtype, pipe._execution_device, generators)
        return latents

    def _layout(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as `prepare_latents` adds noise to them, as a state has them: [n, C, h, w]."""
        return latents

    def _images(self, requests: Sequence[Request]) -> list[SimpleNamespace]:
        """The output of the VAE's encoder for each request's image, encoded together."""
        return self._encoder.images(requests)

    def _mask_conditioning(
        self, request: Request, image: SimpleNamespace, latents: torch.Tensor, generators: list[torch.Generator]
    ) -> Conditioning:
        """The denoiser's inputs for the request's mask, if it has any. `image` is the one of `_images`."""
        return {}

    def _pure_noise(self, latents: torch.Tensor, noise: torch.Tensor, scheduler: Any) -> torch.Tensor:
        """The first latents of a request with a mask at strength 1, from `noise` and the `latents` of a request without a mask:
        most of diffusers' inpainting pipelines start from pure noise."""
        return noise

    def _final_latents(self, state: DiffusionState) -> torch.Tensor:
        """The latents of a finished state that are decoded."""
        return state.latents

    def _texts(self, request: Request) -> list[str]:
        """The request's texts to encode."""
        return [request.prompt, self._negative(request)] if self._is_guided(request) else [request.prompt]

    def _negative(self, request: Request) -> str:
        """The text to guide away from."""
        return request.negative_prompt or ""

    def _read_texts(self, request: Request) -> dict[str, str]:
        """The request's texts that affect the image, by field name."""
        read = {"prompt": request.prompt}
        return read | {"negative_prompt": request.negative_prompt or ""} if self._is_guided(request) else read

    def _embeddings(self, request: Request, known: dict[str, Embedding]) -> tuple[Embedding, Embedding | None]:
        """The embeddings of the prompt and, if the request is guided, of the negative prompt."""
        return known[request.prompt], known[self._negative(request)] if self._is_guided(request) else None

    def _conditioning(self, request: Request, positive: Embedding, negative: Embedding | None) -> Conditioning:
        count = len(request.seeds)
        rows = [negative] * count + [positive] * count if negative is not None else [positive] * count
        conditioning = {"encoder_hidden_states": torch.cat([row.hidden_states for row in rows])}
        pooled = [row.pooled for row in rows if row.pooled is not None]
        return conditioning | ({self.pooled_name: torch.cat(pooled)} if pooled else {})
