"""Opaque pipelines: diffusers' `__call__`, not split into stages but run step by step.

The call runs on its own thread, which runs only while the engine's thread waits for it: control returns at the end of each step
(callback_on_step_end). So only one thread at a time uses the device, other requests run between two steps, and a call without
requests is unwound at its next step. Requests with equal settings that are prepared together share a call.
"""

import copy
import inspect
import logging
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Plan, Request, no_step
from img2img_server.errors import InvalidField, OutOfMemory
from img2img_server.runtime.common.pipe import SWAPPED, native_sizes, parts, size_multiple, view_of
from img2img_server.runtime.common.request_fields import DEPENDENT, request_fields
from img2img_server.runtime.common.sources import check_sources, check_texts, source_rule, steps_of
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.common.truncation import Truncation
from img2img_server.runtime.control.own import check_own_control, with_control
from img2img_server.runtime.diffusion.masking import default_mask
from img2img_server.runtime.diffusion.speedups import no_speedup
from img2img_server.runtime.onnx.modules import close_graphs, opened_later
from img2img_server.runtime.opaque.batch import OpaqueState, SharedCall
from img2img_server.runtime.opaque.batching_rules import rule_of, slot
from img2img_server.support.model_fields import OWN_CONTROL, OWN_CONTROLNET

_log = logging.getLogger(__name__)

_MOST_ROWS = 16
"""Maximum rows of the denoiser in one call of diffusers, which keeps all images in memory until the last is decoded."""


_MASK = "mask_image"
"""The parameter of pipelines that need a mask, such as Flux Fill."""
_CONTROL = "control_image"
"""The parameter of pipelines that read a control image."""
_CONTROL_SCALE = "controlnet_conditioning_scale"
"""The parameter of those with a ControlNet for the scale of its effect."""
_SPRINT_STEPS = 2
"""Steps at which SANA-Sprint has an intermediate timestep, by default; it refuses one at any other number."""


class OpaquePipeline:
    """Any AutoPipelineForImage2Image. Implements the engine's Pipeline.

    If the class is known to draw images in a shared call with the same results (`batching_rules.py`), the images of a request and
    of others with equal settings are drawn together, else one after the other.
    """

    schedulers: tuple[str, ...] = ()
    measurable = False
    owner: Hashable = None
    row_buckets: Sequence[int] = ()

    def __init__(self, pipe: Any, engine: str, threads: int) -> None:
        self._pipe = pipe
        self.threads = threads
        self.native_size = native_sizes(pipe)
        self._parameters = inspect.signature(pipe.__call__).parameters
        self.engine = engine
        self.size_multiple = size_multiple(pipe)
        self.source_rule = source_rule(pipe)
        if _MASK in self._parameters:
            self.source_rule = replace(self.source_rule, mask="required")
        self.fields = request_fields(pipe)
        if _CONTROL in self._parameters:
            self.fields = {**self.fields, **(OWN_CONTROLNET if _CONTROL_SCALE in self._parameters else OWN_CONTROL)}
        self._rule = rule_of(pipe)
        self._truncation = Truncation(pipe)
        self.max_rows: int | None = None if self._rule else 1
        self._most_rows = _MOST_ROWS
        for part in parts(pipe):
            part.set_progress_bar_config(disable=True)  # progress is sent to the client instead

    def plan(self, request: Request) -> Plan:
        """The request's shape, rows and estimated steps. Raises InvalidField if it names a scheduler, or has a strength, image
        or text that the pipeline does not take."""
        if request.loras:
            raise InvalidField("loras", "this model takes no LoRAs: it runs as a whole, not step by step")
        if request.image_prompts:
            raise InvalidField("image_prompts", "this model takes no image prompts: it runs as a whole, not step by step")
        if _CONTROL in self._parameters:
            check_own_control(request)
        elif request.controls:
            raise InvalidField("controls", "this model takes no controls: it runs as a whole, not step by step")
        if request.scheduler is not None:
            raise InvalidField("scheduler", "this model supports only its own scheduler: leave the field unset")
        if self._steps(request) == 0:
            raise no_step(request)
        check_sources(self._pipe, request)
        check_texts(self._pipe, self._texts(request))
        width, height = self._size(request)
        settings, at_once = self._settings(request), self._at_once(request)
        chunks = -(-len(request.seeds) // at_once)
        rows = min(len(request.seeds), at_once) * self._rows(request)
        shape = (height, width) if settings is None else (height, width, slot(settings))
        if request.references:  # which make a call longer
            shape = (*shape, len(request.references))
        warnings = (*self._truncation.warnings(self._texts(request)), *no_speedup(request, "this model runs as a whole"))
        return Plan(shape, width * height, rows, self._steps(request) * chunks, warnings)

    def prepare(self, requests: Sequence[Request]) -> Sequence[OpaqueState]:
        """Makes the calls, one for all requests with equal settings, without running them."""
        states: dict[int, OpaqueState] = {}
        for numbers in self._group(requests):
            call = self._call([requests[number] for number in numbers])
            for index, number in enumerate(numbers):
                states[number] = OpaqueState(requests[number], call, index, call.step_count)
        return [states[number] for number in range(len(requests))]

    def denoise(self, states: Sequence[OpaqueState]) -> Sequence[None]:
        """Runs one step of each call, except calls that are ahead of all their `states`: those have results to catch up with."""
        members: dict[SharedCall, list[OpaqueState]] = {}
        for state in states:
            members.setdefault(state.call, []).append(state)
        for call, some in members.items():
            if call.failed:
                call = self._restart(call, some)
            if not call.done and any(state.pieces == call.pieces for state in some):
                self._resume(call, some, alone=len(states) == 1)
        return [None] * len(states)

    def advance(self, states: Sequence[OpaqueState], noises: Sequence[None]) -> None:
        """Updates the states from their calls."""
        for state in states:
            state.catch_up()

    def mark(self) -> None:
        """Does nothing: a step is complete when `denoise` returns."""

    def preview(self, states: Sequence[OpaqueState]) -> Sequence[None]:
        """Returns None for each state: opaque pipelines have no previews."""
        return [None] * len(states)

    def finish(self, states: Sequence[OpaqueState]) -> Sequence[Sequence[Image.Image]]:
        """The images of each state's request."""
        return [state.call.images(state.number) for state in states]

    def release(self, state: OpaqueState) -> None:
        """Removes the request from its call. A call without requests is unwound."""
        state.call.leave()

    @property
    def opened_bytes(self) -> int:
        """The memory of the graphs that calls needed and that were opened then, about."""
        return opened_later(self._pipe)

    def close(self) -> None:
        """Releases its sessions, if it has any, even if this pipeline is still referenced."""
        close_graphs(self._pipe)

    def _resume(self, call: SharedCall, states: Sequence[OpaqueState], alone: bool) -> None:
        """Runs a call's next piece. If it fails, the engine retries with fewer states; for a single one (`alone`) this does."""
        while (error := call.resume()) is not None:
            if isinstance(error, OutOfMemory):
                self._most_rows = max(1, min(self._most_rows, len(call.chunks[0]) * self._rows(states[0].request)) // 2)
            if not alone or (len(call.requests) == 1 and call.at_once == 1):
                raise error
            _log.warning("a call of %d images failed, retrying with fewer: %s", len(call.outputs), error)
            call = self._restart(call, states)

    def _restart(self, failed: SharedCall, states: Sequence[OpaqueState]) -> SharedCall:
        """Starts a new call for `states` after theirs failed; image by image for a single request."""
        smallest = len(states) == len(failed.requests) == 1
        call = self._call([state.request for state in states], at_once=1 if smallest else None)
        for index, state in enumerate(states):
            state.join(call, index)
        return call

    def _group(self, requests: Sequence[Request]) -> list[list[int]]:
        """Groups the indices of requests that share a call."""
        groups: list[list[int]] = []
        latest: dict[Hashable, tuple[list[int], int]] = {}
        for number, request in enumerate(requests):
            settings, rows = self._settings(request), len(request.seeds) * self._rows(request)
            group, taken = latest.get(settings, ([], 0))
            if not group or settings is None or taken + rows > self._most_rows:
                group, taken = [], 0
                groups.append(group)
            group.append(number)
            latest[settings] = group, taken + rows
        return groups

    def _call(self, requests: Sequence[Request], at_once: int | None = None) -> SharedCall:
        return SharedCall(requests, at_once or self._at_once(requests[0]), self._steps(requests[0]), self._draw)

    def _settings(self, request: Request) -> Hashable | None:
        """The settings that requests must have in common with it to share its call; None if none can."""
        return self._rule and self._rule.settings(request, self._parameters)

    def _size(self, request: Request) -> tuple[int, int]:
        """Width and height of the request's images, in pixels."""
        return self.source_rule.own_size(request.image.size) or request.result_size

    def _rows(self, request: Request) -> int:
        """Rows of the denoiser per image."""
        return self._rule.rows(request) if self._rule else 1

    def _at_once(self, request: Request) -> int:
        """Maximum number of images in one call of diffusers."""
        return 1 if self._settings(request) is None else max(1, self._most_rows // self._rows(request))

    def _steps(self, request: Request) -> int:
        if "strength" not in self._parameters:
            return request.num_inference_steps
        return steps_of(self._pipe, request.num_inference_steps, request.strength)

    @torch_call
    def _draw(self, call: SharedCall) -> list[Image.Image]:
        images: list[Image.Image] = []
        estimate = call.step_count // len(call.chunks)
        for number, chunk in enumerate(call.chunks):

            def on_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any], number: int = number) -> Any:
                call.report_step(number, step + 1, getattr(running, "num_timesteps", None) or estimate)
                call.pause()
                return tensors

            def on_prior_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
                call.pause()
                return tensors

            def on_step(step: int, timestep: Any, latents: Any, number: int = number) -> None:
                call.report_step(number, step + 1, estimate)
                call.pause()

            listeners: dict[str, Any] = {"callback_on_step_end": on_step_end, "prior_callback_on_step_end": on_prior_step_end}
            if "callback_on_step_end" not in self._parameters:
                listeners = {"callback": on_step}  # as older classes have it
            images += _view(self._pipe)(**self._arguments(chunk, listeners), output_type="pil").images
        size = self._size(call.requests[0])
        if len(images) != len(call.outputs) or any(image.size != size for image in images):
            made = [image.size for image in images]
            raise RuntimeError(f"{type(self._pipe).__name__} returned images of {made} instead of {len(call.outputs)} of {size}")
        return [image.convert("RGB") for image in images]  # Qwen-Image 2.1 makes RGBA

    def _texts(self, request: Request) -> dict[str, str]:
        """The request's texts that the pipeline accepts, by field name."""
        given = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        return {name: text for name, text in given.items() if text and name in self._parameters}

    def _is_taken(self, name: str) -> bool:
        """Whether an argument of that name changes the pipeline's images."""
        return name in self._parameters and (name not in DEPENDENT or name in self.fields)

    def _arguments(self, outputs: Sequence[tuple[Request, int]], listeners: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the pipeline's call: those that it accepts, as lists if there are several images."""
        request = outputs[0][0]
        width, height = self._size(request)
        if type(self._pipe).__name__ in SWAPPED:
            width, height = height, width
        each: dict[str, list[Any]] = {
            "prompt": [request.prompt for request, _ in outputs],
            "negative_prompt": [request.negative_prompt for request, _ in outputs],
            "image": [[request.image, *request.references] if request.references else request.image for request, _ in outputs],
            "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in outputs],
        }
        alike: dict[str, Any] = {
            "strength": request.strength,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "width": width,
            "height": height,
            # Kontext makes any size, but so many pixels.
            "max_area": width * height,
        }
        if _MASK in self._parameters:
            alike[_MASK] = (request.mask or default_mask(request.result_size)).image
        if _CONTROL in self._parameters:
            (control,) = with_control(request).controls
            alike |= {
                _CONTROL: control.image,
                _CONTROL_SCALE: control.scale,
                "control_guidance_start": control.start,
                "control_guidance_end": control.end,
            }
        if request.true_cfg_scale is not None:
            alike["true_cfg_scale"] = request.true_cfg_scale
        if request.num_inference_steps != _SPRINT_STEPS:
            alike["intermediate_timesteps"] = None
        # A single image is passed without lists. A missing prompt is None for all images.
        single = {name: values[0] if len(outputs) == 1 or values[0] is None else values for name, values in each.items()}
        offered = single | alike | listeners
        return {name: value for name, value in offered.items() if self._is_taken(name)}


def _view(pipe: Any) -> Any:
    """A view of the pipeline for one call: shared models, but own settings and schedulers, also in inner pipelines."""
    inner = {name: _view(value) for name, value in vars(pipe).items() if name.endswith("_pipe")}
    own = {name: copy.deepcopy(value) for name, value in vars(pipe).items() if name.endswith("scheduler")}
    return view_of(pipe, **inner, **own)
