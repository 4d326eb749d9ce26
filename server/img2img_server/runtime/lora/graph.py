"""A graph whose calls may have another LoRA in each row."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from img2img_server.bundle.adapters import INDEX, RANKS, AdaptedLayer, adapted_layers
from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.lora.adapters import Choice
from img2img_server.runtime.onnx.modules import Graph
from img2img_server.runtime.onnx.runners import Runner, dtype_of

_Row = Choice | None


class _Slots:
    """The stacked matrices of `layers` at one rank, on the device: inputs of the LoRA graph.

    Slot 0 is zeros, for rows without LoRAs; the other `count` slots have the choices used last.
    """

    def __init__(self, layers: Sequence[AdaptedLayer], types: dict[str, torch.dtype], rank: int, count: int, device: Any) -> None:
        self._layers = layers
        self._rank = rank
        self.tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            shapes = {layer.down_input: layer.down_shape(count + 1, rank), layer.up_input: layer.up_shape(count + 1, rank)}
            for name, shape in shapes.items():
                self.tensors[name] = torch.zeros(shape, dtype=types[name], device=device)
        self._held: OrderedDict[Choice, int] = OrderedDict()
        self._free = list(range(count, 0, -1))

    def place(self, component: str, wanted: Iterable[Choice]) -> dict[Choice, int]:
        """The slot of each wanted choice, of which there are at most as many as slots. Evicts others if needed (LRU)."""
        wanted = set(wanted)
        for choice in wanted & self._held.keys():
            self._held.move_to_end(choice)
        for choice in wanted - self._held.keys():
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
            down, up = torch.zeros(self._rank, layer.ins), torch.zeros(layer.outs, self._rank)
            start = 0
            for adapter, (_, scale) in zip(choice.adapters, choice.key, strict=True):
                pair = adapter.matrices.get(component, {}).get(layer.name)
                if pair is not None:
                    end = start + len(pair[0])
                    down[start:end], up[:, start:end] = pair[0], pair[1].float() * scale
                    start = end
            self.tensors[layer.down_input][slot].copy_(down if layer.is_conv else down.T)
            self.tensors[layer.up_input][slot].copy_(up if layer.is_conv else up.T)


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
        self._slots: dict[int, _Slots] = {}
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
        self._rows = [None if row is None or not row.rank(self._component) else row for row in rows]
        try:
            yield
        finally:
            self._rows = ()

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
            name: tensor[part.start : part.stop] if tensor is not None and tensor.ndim and len(tensor) == total else tensor
            for name, tensor in tensors.items()
        }
        if not any(rows):
            return super().__call__(**own)
        choices = {row for row in rows if row is not None}
        rank = max(choice.rank(self._component) for choice in choices)
        slots = self._slots_of(next(bucket for bucket in RANKS if rank <= bucket))
        places = slots.place(self._component, choices)
        index = torch.tensor([0 if row is None else places[row] for row in rows])
        feed, device = self._feed(own)
        return self._found(self._lora.run({**feed, **slots.tensors, INDEX: send(index, self._device)}), device)

    def _slots_of(self, rank: int) -> _Slots:
        if rank not in self._slots:
            self._slots[rank] = _Slots(self.layers, self._lora_types, rank, self._count, self._device)
        return self._slots[rank]


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
    return {
        name: graph.layers
        for name, module in pipe.components.items()
        for graph in getattr(module, "graphs", ())
        if isinstance(graph, AdaptedGraph)
    }
