"""A graph whose calls may have another LoRA in each row."""

import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from img2img_server.bundle.adapters import INDEX, RANKS, WITHOUT_ROWS, AdaptedLayer, adapted_layers
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.lora.adapters import Choice, Ranks
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.runtime.onnx.runners import Runner, dtype_of

_log = logging.getLogger(__name__)

_Row = Choice | None


class _Slots:
    """The stacked matrices of `layers` at the `ranks`, on the device: inputs of the LoRA graph.

    Slot 0 is zeros, for rows without LoRAs; the other `count` slots have the choices used last.
    """

    def __init__(
        self, layers: Sequence[AdaptedLayer], types: dict[str, torch.dtype], ranks: Ranks, count: int, device: Any
    ) -> None:
        self._layers = layers
        self._ranks = ranks
        self.tensors = {
            name: torch.zeros(shape, dtype=types[name], device=device) for name, shape in _shapes(layers, ranks, count).items()
        }
        self._held: OrderedDict[Choice, int] = OrderedDict()
        self._free = list(range(count, 0, -1))

    @property
    def bytes(self) -> int:
        """Their size in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def place(self, component: str, wanted: Iterable[Choice]) -> dict[Choice, int]:
        """The slot of each wanted choice, of which there are at most as many as slots. Evicts others if needed (LRU)."""
        wanted = dict.fromkeys(wanted)
        for choice in [choice for choice in wanted if choice in self._held]:
            self._held.move_to_end(choice)
        for choice in [choice for choice in wanted if choice not in self._held]:
            slot = self._free.pop() if self._free else self._held.popitem(last=False)[1]
            try:
                self._fill(slot, component, choice)
            except BaseException:
                self._free.append(slot)
                raise
            self._held[choice] = slot
        return {choice: self._held[choice] for choice in wanted}

    def _fill(self, slot: int, component: str, choice: Choice) -> None:
        """Writes the matrices of the choice's LoRAs side by side, with the scales in `up`."""
        for layer in self._layers:
            rank, taps = _rank(layer, self._ranks), layer.taps
            down, up = torch.zeros(rank * taps, layer.ins), torch.zeros(layer.outs, rank)
            start = 0
            for adapter, (_, scale) in zip(choice.adapters, choice.key, strict=True):
                pair = adapter.matrices.get(component, {}).get(layer.name)
                if pair is not None:
                    end = start + pair[1].shape[1]
                    down[start * taps : end * taps], up[:, start:end] = pair[0], pair[1].float() * scale
                    start = end
            self.tensors[layer.down_input][slot].copy_(down if layer.is_conv else down.T)
            self.tensors[layer.up_input][slot].copy_(up if layer.is_conv else up.T)


def _shapes(layers: Sequence[AdaptedLayer], ranks: Ranks, count: int) -> dict[str, tuple[int, int, int]]:
    """The shapes of the matrices of `count` slots and the zeros, by input."""
    shapes = {}
    for layer in layers:
        rank = _rank(layer, ranks)
        shapes[layer.down_input] = layer.down_shape(count + 1, rank)
        shapes[layer.up_input] = layer.up_shape(count + 1, rank)
    return shapes


def _rank(layer: AdaptedLayer, ranks: Ranks) -> int:
    return ranks.kernel_rank if layer.taps > 1 else ranks.rank


class Unadapted:
    """A LoRA graph as a runner without LoRAs: every row has one of the least ranks that is zeros."""

    def __init__(self, runner: Runner, device: str = "cpu") -> None:
        layers = adapted_layers({item.name: list(item.shape) for item in runner.inputs})
        types = {item.name: dtype_of(item) for item in runner.inputs}
        self._zeros = _Slots(layers, types, Ranks(1, 1), 0, device).tensors
        self._runner = runner
        self._device = torch.device(device)
        self.inputs = [item for item in runner.inputs if item.name not in self._zeros and item.name != INDEX]
        self.outputs = runner.outputs
        self.row_buckets: Sequence[int] = getattr(runner, "row_buckets", ())

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph."""
        rows = len(next(iter(feed.values())))
        return self._runner.run({**feed, **self._zeros, INDEX: torch.zeros(rows, dtype=torch.int64, device=self._device)})


class AdaptedGraph(Graph):
    """A graph and its LoRA graph. Within `adapting`, the rows of a call have LoRAs, and `lora` is called; else the plain graph.

    If `mixes`, rows without LoRAs run in the same call as others, and have the plain graph's results bit by bit. Else, because
    the two graphs run on different providers, they run in a call of their own. At most `slots` different choices share a call.
    """

    def __init__(self, runner: Runner, lora: Runner, component: str, slots: int, device: str = "cpu", mixes: bool = True) -> None:
        super().__init__(runner, device)
        self.layers = adapted_layers({item.name: list(item.shape) for item in lora.inputs})
        self._lora = lora
        self._lora_types = {item.name: dtype_of(item) for item in lora.inputs}
        self._component = component
        self._count = slots
        self._mixes = mixes
        self._slots: dict[Ranks, _Slots] = {}
        self._rows: Sequence[_Row] = ()

    def __call__(self, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Runs the graph, with the LoRAs of the rows."""
        if not any(self._rows):
            return super().__call__(**tensors)
        first = next(tensor for tensor in tensors.values() if tensor is not None)
        assert len(first) == len(self._rows), f"{len(self._rows)} rows have LoRAs, and the call has {len(first)}"
        results = [self._part(range(*part), tensors) for part in self._parts()]
        if len(results) == 1:
            return results[0]
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    @contextlib.contextmanager
    def adapting(self, rows: Sequence[_Row]) -> Iterator[None]:
        """The calls within the block have these LoRAs, one for each row of the inputs."""
        self._rows = [None if row is None or not row.ranks(self._component) else row for row in rows]
        try:
            yield
        finally:
            self._rows = ()

    @property
    def slot_bytes(self) -> int:
        """The memory of its slots, which are made when a call first needs their ranks."""
        return sum(slots.bytes for slots in list(self._slots.values()))

    @property
    def least_slot_bytes(self) -> int:
        """The memory of its slots of the least padded ranks, made or not."""
        shapes = _shapes(self.layers, Ranks(RANKS[0], 1), self._count)
        return sum(math.prod(shape) * self._lora_types[name].itemsize for name, shape in shapes.items())

    def close(self) -> None:
        """Releases its runners and the slots."""
        super().close()
        self.__dict__.pop("_lora", None)
        self._slots.clear()

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Divides the rows into calls: ranges of rows."""
        start, seen = 0, set[Choice]()
        for index, row in enumerate(self._rows):
            changes = not self._mixes and index > start and (row is None) != (self._rows[start] is None)
            if changes or (row is not None and row not in seen and len(seen) == self._count):
                yield start, index
                start, seen = index, set()
            if row is not None:
                seen.add(row)
        yield start, len(self._rows)

    def _part(self, part: range, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        rows, total = [self._rows[index] for index in part], len(self._rows)
        own = {
            name: tensor[part.start : part.stop]
            if tensor is not None and tensor.ndim and len(tensor) == total and name not in WITHOUT_ROWS
            else tensor
            for name, tensor in tensors.items()
        }
        if not any(rows):
            return super().__call__(**own)
        choices = list(dict.fromkeys(row for row in rows if row is not None))
        ranks = [choice.ranks(self._component) for choice in choices]
        rank, kernel_rank = max(own.rank for own in ranks), max(own.kernel_rank for own in ranks)
        slots = self._slots_of(Ranks(_bucket(rank), _bucket(kernel_rank) if kernel_rank else 1))
        places = slots.place(self._component, choices)
        index = torch.tensor([0 if row is None else places[row] for row in rows])
        feed, device = self._feed(own)
        return self._found(self._lora.run({**feed, **slots.tensors, INDEX: send(index, self._device)}), device)

    def _slots_of(self, ranks: Ranks) -> _Slots:
        if ranks not in self._slots:
            self._slots[ranks] = made = _Slots(self.layers, self._lora_types, ranks, self._count, self._device)
            _log.info("%s: slots for LoRAs of %s take %.1f MB", self._component, ranks, made.bytes / 1e6)
        return self._slots[ranks]


def _bucket(rank: int) -> int:
    return next(bucket for bucket in RANKS if rank <= bucket)


@contextlib.contextmanager
def adapting(modules: Iterable[Any], rows: Sequence[_Row]) -> Iterator[None]:
    """The calls of the ONNX modules within the block have these LoRAs, one for each row. Other modules are skipped."""
    with contextlib.ExitStack() as stack:
        if any(rows):
            for module in modules:
                for graph in getattr(module, "graphs", ()):
                    if isinstance(graph, AdaptedGraph):
                        stack.enter_context(graph.adapting(rows))
        yield


def layers_of(pipe: Any) -> dict[str, Sequence[AdaptedLayer]]:
    """The layers that the LoRA graphs of a diffusers pipeline adapt, by component."""
    return {name: graph.layers for name, graph in _adapted(pipe)}


def slot_bytes(pipe: Any) -> int:
    """The memory of the slots of a diffusers pipeline's LoRA graphs."""
    return sum(graph.slot_bytes for _, graph in _adapted(pipe))


def least_slot_bytes(pipe: Any) -> int:
    """The memory of the slots of the least padded ranks of a diffusers pipeline's LoRA graphs, made or not."""
    return sum(graph.least_slot_bytes for _, graph in _adapted(pipe))


def _adapted(pipe: Any) -> Iterator[tuple[str, AdaptedGraph]]:
    for name, module in pipe.components.items():
        for graph in getattr(module, "graphs", ()):
            if isinstance(graph, AdaptedGraph):
                yield name, graph
