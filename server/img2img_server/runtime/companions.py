"""Companions in memory: models of one graph, such as ControlNets, which requests to other models use.

To the server a companion is a model that is loaded, tried and evicted like any. Requests never run it alone
(api/parsing.py).
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image

from img2img_server.engine.request import Plan, Request
from img2img_server.errors import ModelNotLoaded
from img2img_server.runtime.common.torch_calls import torch_call
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.support.model_fields import ModelFields
from img2img_server.support.source_rule import STRETCHED, SourceRule

_Kind = TypeVar("_Kind", bound="Companion")


@dataclass(slots=True, eq=False)
class _Trial:
    """The state of the trial request that the server draws when it loads the model: one call of the graph."""

    request: Request
    step: int = 0
    step_count: int = 1


class Companion:
    """A loaded companion, whose `graph` is on `device` and is of the provider `engine`. A subclass defines in `trial_inputs` the
    inputs of a trial call of its graph. It is among `companions`, if given, until it is closed.

    Implements the engine's Pipeline for the server's trial request, which calls it once.
    """

    what: ClassVar[str]
    """Its kind in words, for messages."""
    max_rows: int | None = 1
    measurable = False
    row_buckets: Sequence[int] = ()
    schedulers: tuple[str, ...] = ()
    fields: ModelFields = {}
    source_rule: SourceRule = STRETCHED
    owner: Any = None
    threads = 1
    """torch's threads; the graph has its own."""
    native_size: tuple[int, int]
    size_multiple: int

    def __init__(self, graph: Graph, engine: str, device: str, companions: "Companions | None" = None) -> None:
        self.engine = engine
        self._graph = graph
        self._device = torch.device(device)
        self._companions = companions

    def trial_inputs(self, width: int, height: int) -> Mapping[str, torch.Tensor]:
        """The inputs of one call, on the device of the graph, for a trial image of that size."""
        raise NotImplementedError

    def plan(self, request: Request) -> Plan:
        """Plans a trial request."""
        width, height = request.image.size
        return Plan((height, width), width * height, 1, 1)

    def prepare(self, requests: Sequence[Request]) -> Sequence[_Trial]:
        """Starts trial requests."""
        return [_Trial(request) for request in requests]

    @torch_call
    def denoise(self, states: Sequence[_Trial]) -> Sequence[None]:
        """Calls the graph once. Raises FloatingPointError for outputs that are not finite."""
        found = self._graph(**self.trial_inputs(*states[0].request.image.size))
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise FloatingPointError(f"the outputs of the {self.what} have values that are not finite")
        return [None] * len(states)

    def advance(self, states: Sequence[_Trial], noises: Sequence[None]) -> None:
        """Ends the only step."""
        for state in states:
            state.step = 1

    def mark(self) -> None:
        """Returns None: the call is done, since `denoise` reads its results."""

    def preview(self, states: Sequence[_Trial]) -> Sequence[Image.Image | None]:
        """Returns no previews."""
        return [None] * len(states)

    def finish(self, states: Sequence[_Trial]) -> Sequence[Sequence[Image.Image]]:
        """The requests' own images."""
        return [[state.request.image] for state in states]

    def release(self, state: _Trial) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Releases its session. Requests no longer find it."""
        if self._companions is not None:
            self._companions.remove(self)
        self._graph.close()


class Companions:
    """The companions in memory, by model id. One is not evicted while a request that names it waits or runs. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Companion] = {}

    def add(self, name: str, companion: Companion) -> None:
        """Adds a companion, or replaces the one of this name."""
        with self._lock:
            self._known[name] = companion

    def get(self, name: str, kind: type[_Kind]) -> _Kind:
        """The companion of this name, which is of that `kind`. Raises ModelNotLoaded."""
        with self._lock:
            found = self._known.get(name)
        if not isinstance(found, kind):
            raise ModelNotLoaded(f"{kind.what} '{name}' is not loaded")
        return found

    def remove(self, companion: Companion) -> None:
        """Removes a companion, unless it was replaced."""
        with self._lock:
            self._known = {name: known for name, known in self._known.items() if known is not companion}
