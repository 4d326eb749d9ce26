"""The names in a LoRA graph: a second graph of a component, in which each row of a call may have another LoRA.

It has the plain graph's inputs and two more for each adapted layer: all adapters' matrices, stacked. For a Linear these are
`down` [adapters, in, rank] and `up` [adapters, rank, out]; for a 1 x 1 convolution `down` [adapters, rank, in] and `up`
[adapters, out, rank]. `INDEX` [rows] selects each row's adapter. Standard library only: the exporter imports this module, too.
"""

from dataclasses import dataclass

LORA_NAME = "lora.onnx"
"""File name of the LoRA graph, beside the plain graph, whose weights file it shares."""
INDEX = "adapter_index"
ADAPTERS, RANK = "adapters", "rank"
"""Names of the variable axes of the matrices."""
RANKS = (16, 32, 64)
"""The ranks that calls are padded to with zeros. The last is the largest rank of the LoRAs of one request together."""

_PREFIX, _DOWN, _UP = "lora.", ".down", ".up"


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A layer of a LoRA graph: its module's name, whether it is a 1 x 1 convolution, and its numbers of channels."""

    name: str
    is_conv: bool
    ins: int
    outs: int

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
        return (adapters, rank, self.ins) if self.is_conv else (adapters, self.ins, rank)

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
            is_conv = shape[1] == RANK
            ins = shape[2 if is_conv else 1]
            outs = inputs[f"{_PREFIX}{layer}{_UP}"][1 if is_conv else 2]
            layers.append(AdaptedLayer(layer, is_conv, int(ins), int(outs)))
    return tuple(layers)
