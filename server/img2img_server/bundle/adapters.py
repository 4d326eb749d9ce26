"""The names in a LoRA graph: a second graph of a component, in which each row of a call may have another LoRA.

It has the plain graph's inputs and two more for each adapted layer: all adapters' matrices, stacked. For a Linear these are
`down` [adapters, in, rank] and `up` [adapters, rank, out]; for a convolution `down` [adapters, rank * taps, in] and `up`
[adapters, out, rank]. A 1 x 1 convolution has one tap. A 3 x 3 convolution has nine, and its rank is an axis of its own, of
length 1 in calls whose LoRAs do not adapt such layers. `INDEX` [rows] selects each row's adapter. Standard library only: the
exporter imports this module, too.
"""

from dataclasses import dataclass

LORA_NAME = "lora.onnx"
"""File name of the LoRA graph, beside the plain graph, whose weights file it shares."""
INDEX = "adapter_index"
ADAPTERS, RANK = "adapters", "rank"
KERNEL_RANK, KERNEL_TAPS = "kernel_rank", "kernel_taps"
"""Names of the variable axes of the matrices; the last two are of 3 x 3 convolutions: the rank, and nine times the rank."""
TAPS = 9
"""The number of positions of a 3 x 3 convolution."""
RANKS = (16, 32, 64)
"""The ranks that calls are padded to with zeros. The last is the largest rank of the LoRAs of one request together."""

WITHOUT_ROWS = frozenset({"txt_ids", "img_ids"})
"""Inputs of graphs that all rows of a call share: the position ids of Flux's, as earlier versions made them."""

_PREFIX, _DOWN, _UP = "lora.", ".down", ".up"


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A layer of a LoRA graph: its module's name, whether it is a convolution, its numbers of channels, and its kernel's size."""

    name: str
    is_conv: bool
    ins: int
    outs: int
    taps: int = 1

    @property
    def rank_axes(self) -> tuple[str, str]:
        """The names of the variable axes of the first and the second matrices' ranks."""
        return (KERNEL_TAPS, KERNEL_RANK) if self.taps > 1 else (RANK, RANK)

    @property
    def down_input(self) -> str:
        """The graph's input for its first matrix."""
        return f"{_PREFIX}{self.name}{_DOWN}"

    @property
    def up_input(self) -> str:
        """The graph's input for its second matrix."""
        return f"{_PREFIX}{self.name}{_UP}"

    def down_shape(self, adapters: int, rank: int) -> tuple[int, int, int]:
        """The shape of its first matrices, stacked."""
        return (adapters, rank * self.taps, self.ins) if self.is_conv else (adapters, self.ins, rank)

    def up_shape(self, adapters: int, rank: int) -> tuple[int, int, int]:
        """The shape of its second matrices, stacked."""
        return (adapters, self.outs, rank) if self.is_conv else (adapters, rank, self.outs)


def adapted_layers(inputs: dict[str, list[int | str]]) -> tuple[AdaptedLayer, ...]:
    """The adapted layers of a graph with these `inputs`, by name with their shapes, in which variable axes are names. Empty if it
    is not a LoRA graph."""
    layers = []
    for name, shape in inputs.items():
        if name.startswith(_PREFIX) and name.endswith(_DOWN):
            layer = name.removeprefix(_PREFIX).removesuffix(_DOWN)
            is_conv = shape[1] in (RANK, KERNEL_TAPS)
            ins = shape[2 if is_conv else 1]
            outs = inputs[f"{_PREFIX}{layer}{_UP}"][1 if is_conv else 2]
            layers.append(AdaptedLayer(layer, is_conv, int(ins), int(outs), TAPS if shape[1] == KERNEL_TAPS else 1))
    return tuple(layers)
