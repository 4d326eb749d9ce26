"""Linear layers whose weights are stored in 8 or 4 bits, in modules of transformers that run in PyTorch.

Weights are quantized in blocks of a row, each with a scale and a zero point, in the layout of ONNX Runtime's MatMulNBits. They
are computed when a layer runs, so a module needs memory for its integers and one layer's weights. The names of the tensors in a
module's files say which layers these are; transformers reads the weights of all others as usual.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "img2img"
"""The name of this way among transformers'."""
BITS = {"int8": 8, "int4": 4}
"""The bits of a weight by the format of weights."""
_PACKED = ".packed"


class WeightOnlyLinear(torch.nn.Module):
    """A linear layer with `bits` bits per weight, in blocks of `size` inputs. Weights are computed in the type of `scales`."""

    def __init__(self, inputs: int, outputs: int, bits: int, size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.outputs, self.bits, self.size = inputs, outputs, bits, size
        count = -(-inputs // size)

        def made(columns: int, kind: torch.dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(outputs, columns, dtype=kind), requires_grad=False)

        self.packed = made(count * size * bits // 8, torch.uint8)
        self.scales = made(count, dtype)
        self.zero_points = made(-(-count * bits // 8), torch.uint8)
        self.bias = torch.nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=False) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor: some modules read the type of a layer's weight."""
        return self.scales[:0]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The layer's output [..., outputs] for states [..., inputs]."""
        return torch.nn.functional.linear(states, self.weights().to(states.dtype), self.bias)

    def weights(self) -> torch.Tensor:
        """The weights [outputs, inputs]."""
        zero_points = self._numbers(self.zero_points)[:, : self.scales.shape[1], None]
        blocks = self._numbers(self.packed).reshape(self.outputs, -1, self.size)
        return ((blocks - zero_points) * self.scales[..., None]).flatten(1)[:, : self.inputs]

    def _numbers(self, packed: torch.Tensor) -> torch.Tensor:
        """The integers of packed ones, in the type of the scales: of two in a byte the first is in the lower bits."""
        if self.bits == BITS["int8"]:
            return packed.to(self.scales.dtype)
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(self.scales.dtype)


@register_quantization_config(METHOD)
class WeightOnlyConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not typed
    """The names of a module's layers with `bits` bits per weight in blocks of `group_size`."""

    def __init__(self, bits: int, group_size: int, layers: Sequence[str]) -> None:
        self.quant_method = METHOD
        self.bits, self.group_size, self.layers = bits, group_size, list(layers)

    @classmethod
    def read(cls, folder: Path, bits: int) -> "WeightOnlyConfig":
        """Reads it from the safetensors files in a module's folder. Raises ValueError if their shapes do not fit `bits`."""
        shapes: dict[str, list[int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
        layers = [name.removesuffix(_PACKED) for name in shapes if name.endswith(_PACKED)]
        sizes = {shapes[name + _PACKED][-1] * 8 / bits / shapes[f"{name}.scales"][-1] for name in layers}
        if len(sizes) != 1 or not (size := sizes.pop()).is_integer():
            raise ValueError(f"{folder} has no layers with {bits} bits per weight: export the bundle again")
        return cls(bits, int(size), layers)


@register_quantizer(METHOD)
class WeightOnlyQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the layers, without weights, before transformers reads them."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self) -> bool:
        """Whether the module can be saved."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        settings: WeightOnlyConfig = self.quantization_config
        for name in settings.layers:
            old = model.get_submodule(name)
            has_bias, dtype = old.bias is not None, old.weight.dtype
            made = WeightOnlyLinear(old.in_features, old.out_features, settings.bits, settings.group_size, has_bias, dtype)
            model.set_submodule(name, made.to(old.weight.device))
