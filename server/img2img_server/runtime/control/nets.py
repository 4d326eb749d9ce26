"""ControlNets in memory. To the server a ControlNet is a model that is loaded, tried and evicted like any; requests to other
models name it in `controls`."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from img2img_server.bundle.controls import IMAGE, SCALE
from img2img_server.engine.request import Plan, Request
from img2img_server.errors import BundleError, ModelNotLoaded
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.support.model_fields import ModelFields
from img2img_server.support.source_rule import STRETCHED, SourceRule

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
    side; `widths` are the channels of its inputs and residuals, by name; `parameters` is the number of its weights.

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
        self.engine = engine
        self.widths = graph.widths
        self.scale = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
        levels = len(config["down_block_types"]) - 1
        self.size_multiple = self.scale * 2**levels
        self.native_size = (_NATIVE_LATENTS * self.scale, _NATIVE_LATENTS * self.scale)
        self._graph = graph
        self._nets = nets
        self._device = torch.device(device)
        if missing := {IMAGE, SCALE, "sample", "timestep", "encoder_hidden_states"} - graph.input_types.keys():
            raise BundleError(f"the ControlNet's graph has no input {min(missing)}: export it again")

    def __call__(self, images: torch.Tensor, scales: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The residuals by name, each [rows, C, h, w], for control images [rows, 3, H, W] from 0 to 1, their scales [rows], and
        the `inputs` of the UNet's call."""
        return self._graph(**inputs, **{IMAGE: images, SCALE: scales})

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
        shapes["sample"] = (1, self.widths["sample"], height // self.scale, width // self.scale)
        shapes["encoder_hidden_states"] = (1, _TOKENS, self.widths["encoder_hidden_states"])
        shapes[IMAGE] = (1, self.widths[IMAGE], height, width)
        found = self._graph(**{name: torch.zeros(shape, device=self._device) for name, shape in shapes.items()})
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise FloatingPointError("the ControlNet's residuals have values that are not finite")
        return [None] * len(states)

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
