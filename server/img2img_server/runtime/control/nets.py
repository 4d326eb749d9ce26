"""ControlNets in memory. To the server a ControlNet is a model that is loaded, tried and evicted like any; requests to other
models name it in `controls`."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from img2img_server.bundle.control_kinds import FLUX_PIXELS, kind_of_net, pixels_of_latent
from img2img_server.bundle.controls import FLUX_CLASS, IMAGE, MODE, SCALE, UNION_CLASS
from img2img_server.engine.request import Plan, Request
from img2img_server.errors import BundleError, ModelNotLoaded
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.support.model_fields import ModelFields
from img2img_server.support.source_rule import STRETCHED, SourceRule

Inputs = Mapping[str, torch.Tensor]
"""Inputs of a denoiser's call, by name."""

_NATIVE_LATENTS, _TOKENS = 8, 77
"""Height and width in latents of the trial image, and tokens of its text."""


@dataclass(slots=True, eq=False)
class _Trial:
    """The state of the trial request that the server draws when it loads the model: one call of the ControlNet."""

    request: Request
    step: int = 0
    step_count: int = 1


class ControlNet:
    """A loaded ControlNet, whose graph is on `device`, with its config.json. `scale` is the number of pixels of a latent, on each
    side; `widths` are the channels of its inputs and residuals, by name; `kind` says which models it fits; `parameters` is the
    number of its weights. `modes` is the number of control modes of a union, None for other ControlNets. If it `pools`, it
    applies only to the rows of the prompt, as in diffusers.

    Implements the engine's Pipeline for the server's trial request, which calls it once. Clients' requests never run it by itself
    (api/parsing.py).
    """

    max_rows: int | None = 1
    measurable = False
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ()
    fields: ModelFields = {}
    source_rule: SourceRule = STRETCHED
    owner: Any = None
    threads = 1
    """Of torch: the graph has its own."""
    needed: frozenset[str] = frozenset({IMAGE, SCALE, "sample", "timestep", "encoder_hidden_states"})
    """The inputs that its graph must have."""

    def __init__(
        self,
        graph: Graph,
        config: Mapping[str, Any],
        engine: str,
        device: str,
        nets: "ControlNets | None" = None,
        parameters: float = 0.0,
    ) -> None:
        self.parameters = parameters
        self.modes = self._modes(config)
        self.pools = bool(config.get("global_pool_conditions"))
        self.engine = engine
        self.widths = graph.widths
        self.kind = kind_of_net(config)
        self.scale, self.size_multiple = self._sizes(config)
        self.native_size = (_NATIVE_LATENTS * self.scale, _NATIVE_LATENTS * self.scale)
        self._graph = graph
        self._config = config
        self._nets = nets
        self._device = torch.device(device)
        if missing := (self.needed | ({MODE} if self.modes is not None else set())) - graph.input_types.keys():
            raise BundleError(f"the ControlNet's graph has no input {min(missing)}: export it again")

    def __call__(
        self, images: torch.Tensor, modes: torch.Tensor, scales: torch.Tensor, inputs: Inputs
    ) -> dict[str, torch.Tensor]:
        """The residuals by name, each [rows, C, h, w], for control images as `pixels` has them, [rows, 3, H, W], their kinds
        [rows], which only unions read, their scales [rows], and the `inputs` of the denoiser's call."""
        return self._graph(**inputs, **{IMAGE: images, MODE: modes, SCALE: scales})

    @property
    def repeats(self) -> bool:
        """Whether blocks of Flux's transformer use its samples in turns."""
        return False

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """What the ControlNet reads of an image whose values are from 0 to 1."""
        return image

    def _modes(self, config: Mapping[str, Any]) -> int | None:
        return config["num_control_type"] if config.get("_class_name") == UNION_CLASS else None

    def _sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """The number of pixels of a latent, and the number of which a side of an image is a multiple."""
        scale = pixels_of_latent(config)
        return scale, scale * 2 ** (len(config["down_block_types"]) - 1)

    def plan(self, request: Request) -> Plan:
        """Plans a trial request."""
        width, height = request.image.size
        return Plan((height, width), width * height, 1, 1)

    def prepare(self, requests: Sequence[Request]) -> Sequence[_Trial]:
        """Starts trial requests."""
        return [_Trial(request) for request in requests]

    @torch_call
    def denoise(self, states: Sequence[_Trial]) -> Sequence[None]:
        """Calls the ControlNet once on zeros. Raises FloatingPointError for residuals that are not finite."""
        width, height = states[0].request.image.size
        shapes: dict[str, tuple[int, ...]] = {
            name: (1, self.widths[name]) if name in self.widths else (1,) for name in self._graph.input_types
        }
        shapes["encoder_hidden_states"] = (1, _TOKENS, self.widths["encoder_hidden_states"])
        shapes |= self._trial_shapes(width, height)
        found = self._graph(**{name: torch.zeros(shape, device=self._device) for name, shape in shapes.items()})
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise FloatingPointError("the ControlNet's residuals have values that are not finite")
        return [None] * len(states)

    def _trial_shapes(self, width: int, height: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs whose sizes depend on that of the trial's image."""
        return {
            "sample": (1, self.widths["sample"], height // self.scale, width // self.scale),
            IMAGE: (1, self.widths[IMAGE], height, width),
        }

    def advance(self, states: Sequence[_Trial], noises: Sequence[None]) -> None:
        """Ends the only step."""
        for state in states:
            state.step = 1

    def mark(self) -> None:
        """Nothing to wait for: `denoise` reads what it computed."""

    def preview(self, states: Sequence[_Trial]) -> Sequence[Image.Image | None]:
        """There are none."""
        return [None] * len(states)

    def finish(self, states: Sequence[_Trial]) -> Sequence[Sequence[Image.Image]]:
        """The requests' own images."""
        return [[state.request.image] for state in states]

    def release(self, state: _Trial) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Releases its session. Requests no longer find it."""
        if self._nets is not None:
            self._nets.remove(self)
        self._graph.close()


class FluxControlNet(ControlNet):
    """A ControlNet of Flux. If it `reads_latents`, its control images are packed latents of the model's VAE, [rows, N, C]."""

    needed = frozenset({IMAGE, SCALE, "hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"})

    @property
    def reads_latents(self) -> bool:
        """Whether the control images are latents (InstantX') and not pixels (XLabs')."""
        return self._config.get("conditioning_embedding_channels") is None

    @property
    def repeats(self) -> bool:
        """Whether its samples are used in turns: diffusers does so for ControlNets that read pixels."""
        return not self.reads_latents

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """The image with values from -1 to 1."""
        return 2 * image - 1

    def _modes(self, config: Mapping[str, Any]) -> int | None:
        modes: int | None = config.get("num_mode")
        return modes

    def _sizes(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return FLUX_PIXELS, 2 * FLUX_PIXELS

    def _trial_shapes(self, width: int, height: int) -> dict[str, tuple[int, ...]]:
        tokens = (height // self.size_multiple) * (width // self.size_multiple)
        channels = self.widths["hidden_states"]
        image = (1, tokens, channels) if self.reads_latents else (1, 3, height, width)
        return {"hidden_states": (1, tokens, channels), "txt_ids": (_TOKENS, 3), "img_ids": (tokens, 3), IMAGE: image}


def open_controlnet(
    graph: Graph, config: Mapping[str, Any], engine: str, device: str, nets: "ControlNets | None", parameters: float
) -> ControlNet:
    """The ControlNet of a graph with this config.json. Raises BundleError."""
    kind = FluxControlNet if config.get("_class_name") == FLUX_CLASS else ControlNet
    return kind(graph, config, engine, device, nets, parameters)


class ControlNets:
    """The ControlNets in memory, by the id of their model. Requests keep those that they name in memory. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nets: dict[str, ControlNet] = {}

    def add(self, name: str, net: ControlNet) -> None:
        """Adds a ControlNet, or replaces the one of this name."""
        with self._lock:
            self._nets[name] = net

    def get(self, name: str) -> ControlNet:
        """The ControlNet of this name. Raises ModelNotLoaded."""
        with self._lock:
            net = self._nets.get(name)
        if net is None:
            raise ModelNotLoaded(f"ControlNet '{name}' is not loaded")
        return net

    def remove(self, net: ControlNet) -> None:
        """Removes a ControlNet, unless it was replaced."""
        with self._lock:
            self._nets = {name: known for name, known in self._nets.items() if known is not net}
