"""Families that cannot be split: diffusers' pipeline runs whole, yet step by step.

The pipeline's call runs on a thread of its own that never runs by itself: the engine's thread hands it the baton, and gets it
back at the end of each step (callback_on_step_end). So one thread at a time owns the device, other requests take turns in
between, and a cancelled request unwinds at its next step.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Plan, Request
from img2img_server.errors import InvalidField
from img2img_server.pipelines.torch_calls import torch_call
from img2img_server.pipelines.views import view_of

_SWAPPED = frozenset({"KandinskyV22Img2ImgPipeline", "KandinskyV22Img2ImgCombinedPipeline"})
"""Classes of diffusers (seen in 0.39) that hand width and height to their image processor the wrong way round."""

_UNFITTED = frozenset({"Kandinsky3UNet", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"})
"""UNets, and blocks of UNets, that double what they get whatever its size was before it was halved."""

_ASSUMED_SIDE = 512
"""Pixels of a side of the pictures that a pipeline was trained on, where it doesn't say."""


class _Abandoned(BaseException):
    """Unwinds a pipeline's call whose request has ended. A BaseException, so that no pipeline catches it."""


class Run:
    """A call that is run in pieces: `resume` lets it go on until it calls `pause` or returns."""

    def __init__(self, call: Callable[["Run"], list[Image.Image]]) -> None:
        self._call = call
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._error: Exception | None = None
        self.images: list[Image.Image] = []
        self.done = False
        self._thread = threading.Thread(target=self._main, name="img2img-pipeline", daemon=True)

    def resume(self) -> None:
        """Runs the next piece. Raises what the call raised."""
        assert not self.done, "a finished run cannot be resumed"
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self.done:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Called by the call itself at the end of a piece: hands the baton back."""
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwinds the call where it stands. Harmless on one that is done; one that never began is done with this."""
        if self._thread.ident is not None and not self.done:
            self._abandoned = True
            self._go.release()
            self._thread.join()
        self.done = True

    def _main(self) -> None:
        self._go.acquire()
        try:
            self.images = self._call(self)
        except _Abandoned:
            pass
        except Exception as error:  # noqa: BLE001 - handed to the engine's thread, which owns what to make of it
            self._error = error
        finally:
            self.done = True
            self._back.release()


@dataclass(slots=True, eq=False)
class WholeState:
    """A request whose pipeline is in the middle of its call."""

    run: Run
    step_count: int
    step: int = 0
    steps_seen: int = 0


class WholePipeline:
    """Any AutoPipelineForImage2Image. Implements the engine's Pipeline, one request in a batch.

    Several seeds are run one after the other, so that each picture is the one its seed gives alone.
    """

    max_rows: int | None = 1
    schedulers: tuple[str, ...] = ()

    def __init__(self, pipe: Any, engine: str, threads: int) -> None:
        self._pipe = pipe
        self.threads = threads
        side = _native_side(pipe)
        self.native_size = (side, side)
        self._parameters = inspect.signature(pipe.__call__).parameters
        self.engine = engine
        self.size_multiple = _size_multiple(pipe)
        for part in _parts(pipe):
            part.set_progress_bar_config(disable=True)  # the client gets the progress

    def plan(self, request: Request) -> Plan:
        """Its steps: an estimate, until the pipeline has its schedule. Raises InvalidField for a scheduler: it has its own."""
        if request.scheduler is not None:
            raise InvalidField("scheduler", "this model has its own only")
        width, height = request.image.size
        strength = request.strength if "strength" in self._parameters else 1.0
        steps = max(1, int(request.num_inference_steps * strength))
        return Plan((height, width), width * height, 1, steps * len(request.seeds))

    def prepare(self, requests: Sequence[Request]) -> Sequence[WholeState]:
        """Readies the calls; nothing is computed yet."""
        return [self._ready(request) for request in requests]

    def denoise(self, states: Sequence[WholeState]) -> Sequence[None]:
        """Runs one step of each."""
        for state in states:
            state.run.resume()
        return [None] * len(states)

    def advance(self, states: Sequence[WholeState], noises: Sequence[None]) -> None:
        """Takes over how far the pipelines came; a step of a prior is no step of the picture's."""
        for state in states:
            state.step = state.steps_seen
            if state.run.done:
                state.step = state.step_count = max(state.step_count, 1)

    def preview(self, states: Sequence[WholeState]) -> Sequence[None]:
        """There are none: what the pipeline has between two steps is its own affair."""
        return [None] * len(states)

    def finish(self, states: Sequence[WholeState]) -> Sequence[Sequence[Image.Image]]:
        """The pictures that the calls returned."""
        return [state.run.images for state in states]

    def release(self, state: WholeState) -> None:
        """Unwinds a call that was cut short."""
        state.run.abandon()

    def _ready(self, request: Request) -> WholeState:
        state = WholeState(
            run=Run(lambda run: self._transform(request, run, state)),
            step_count=self.plan(request).step_count,
        )
        return state

    @torch_call
    def _transform(self, request: Request, run: Run, state: WholeState) -> list[Image.Image]:
        images: list[Image.Image] = []
        for index, seed in enumerate(request.seeds):
            pipe = _view(self._pipe)

            def on_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any], index: int = index) -> Any:
                per_picture = getattr(running, "num_timesteps", None) or state.step_count // len(request.seeds)
                state.step_count = per_picture * len(request.seeds)
                # The last step still has decoding behind it: it is told with the picture.
                state.steps_seen = min(index * per_picture + step + 1, state.step_count - 1)
                run.pause()
                return tensors

            def on_prior_step_end(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
                run.pause()
                return tensors

            images += pipe(**self._arguments(request, seed, on_step_end, on_prior_step_end), output_type="pil").images
        if any(image.size != request.image.size for image in images):
            raise RuntimeError(f"asked for {request.image.size}, {type(self._pipe).__name__} made {images[0].size}")
        return images

    def _arguments(self, request: Request, seed: int, on_step_end: Any, on_prior_step_end: Any) -> dict[str, Any]:
        """The arguments of the pipeline's call: those of the request that this pipeline knows."""
        width, height = request.image.size
        if type(self._pipe).__name__ in _SWAPPED:
            width, height = height, width
        offered = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "image": request.image,
            "strength": request.strength,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "width": width,
            "height": height,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "callback_on_step_end": on_step_end,
            "prior_callback_on_step_end": on_prior_step_end,
        }
        return {name: value for name, value in offered.items() if name in self._parameters}


def _view(pipe: Any) -> Any:
    """The pipeline as one call sees it: shared models, but its own settings and schedulers, down to its inner pipelines."""
    inner = {name: _view(value) for name, value in vars(pipe).items() if name.endswith("_pipe")}
    own = {name: copy.deepcopy(value) for name, value in vars(pipe).items() if name.endswith("scheduler")}
    return view_of(pipe, **inner, **own)


def _parts(pipe: Any) -> list[Any]:
    """The pipeline and the inner pipelines that a combined one hands its work to."""
    return [pipe, *(value for name, value in vars(pipe).items() if name.endswith("_pipe"))]


def _size_multiple(pipe: Any) -> int:
    """Width and height must be multiples of this many pixels: what the pipeline's image processor rounds to, else 64, times
    what its denoiser's patches and levels need, where the pipeline leaves that to its caller."""
    for part in _parts(pipe):
        processor = getattr(part, "image_processor", None)
        factor = getattr(getattr(processor, "config", None), "vae_scale_factor", None)
        if factor is not None:
            return int(factor) * _denoiser_multiple(part)
    return 64


def _denoiser_multiple(pipe: Any) -> int:
    """Latents must be multiples of this. Only SD 3's pipelines have a `patch_size`, and only Kandinsky's UNets don't fit what
    they sample up to what they sampled down."""
    unet = getattr(pipe, "unet", None)
    config = getattr(unet, "config", {})
    kinds = {config.get("_class_name", type(unet).__name__), *config.get("up_block_types", ())}
    if not kinds.isdisjoint(_UNFITTED):
        return int(2 ** (len(config["block_out_channels"]) - 1))
    return int(getattr(pipe, "patch_size", 1))


def _native_side(pipe: Any) -> int:
    """Pixels of a side of the pictures that the pipeline was trained on."""
    for part in _parts(pipe):
        factor = getattr(part, "vae_scale_factor", None)
        config = getattr(getattr(part, "unet", None), "config", {})
        side = getattr(part, "default_sample_size", None) or config.get("sample_size")
        if isinstance(factor, int) and isinstance(side, int):
            return side * factor
    return _ASSUMED_SIDE
