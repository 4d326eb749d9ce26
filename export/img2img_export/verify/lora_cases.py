"""The comparisons for LoRA graphs: with a random LoRA fused into the module's weights, another one in each row."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from img2img_server.bundle.adapters import INDEX, AdaptedLayer
from img2img_server.runtime.lora.adapters import by_taps

from img2img_export.convert.parts import Part, Tensors
from img2img_export.verify.parity import Case

_VERIFIED_RANK = 4
_ROWS = ((0, 0.0), (1, 1.0), (2, -0.5))
"""The verified rows: an adapter, 0 for none, and its scale."""


def lora_cases(part: Part, module: Any, layers: tuple[AdaptedLayer, ...], cases: list[Case]) -> list[Case]:
    """The comparisons for a LoRA graph: rows without a LoRA, with one, and with another of negative scale.

    PyTorch's outputs are those of `part` with a random LoRA fused into the weights. `module` must compute in fp32.
    """
    matrices = {layer.name: _random(layer, number) for number, layer in enumerate(layers)}
    stacked: Tensors = {}
    for layer in layers:
        downs, ups = matrices[layer.name]
        scales = torch.tensor([scale for _, scale in _ROWS])[:, None, None]
        stacked[layer.down_input] = by_taps(downs, layer.taps) if layer.is_conv else downs.transpose(1, 2).contiguous()
        stacked[layer.up_input] = (ups if layer.is_conv else ups.transpose(1, 2)) * scales
    made = []
    for case in cases:
        count = len(next(iter(case.inputs.values())))
        index = [(row + 1) % len(_ROWS) for row in range(count)]
        outputs: list[dict[str, torch.Tensor]] = []
        for row, adapter in enumerate(index):
            own = {
                name: value[row : row + 1] if value.ndim and len(value) == count else value for name, value in case.inputs.items()
            }
            scale = _ROWS[adapter][1]
            with torch.no_grad(), _fused(module, {name: (d[adapter], u[adapter] * scale) for name, (d, u) in matrices.items()}):
                outputs.append(part.call(module, own))
        expected = {name: torch.cat([output[name] for output in outputs]).float().numpy() for name in outputs[0]}
        made.append(Case(f"{case.name}, LoRAs", {**case.inputs, **stacked, INDEX: torch.tensor(index)}, expected))
    return made


def _random(layer: AdaptedLayer, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices [adapters, rank, in * taps] and [adapters, out, rank], whose product is as large as the layer's input."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ins = layer.ins * layer.taps
    downs = torch.randn(len(_ROWS), _VERIFIED_RANK, ins, generator=generator) / ins**0.5
    return downs, torch.randn(len(_ROWS), layer.outs, _VERIFIED_RANK, generator=generator) * (0.2 / _VERIFIED_RANK**0.5)


@contextlib.contextmanager
def _fused(module: Any, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Adds up @ down to each layer's weight within the block; in memory, to one layer at a time."""
    with contextlib.ExitStack() as stack:
        for name, pair in matrices.items():
            layer, fusion = module.get_submodule(name), _Fusion(*pair)
            stack.callback(layer.register_forward_pre_hook(fusion.add).remove)
            stack.callback(layer.register_forward_hook(fusion.restore).remove)
        yield


class _Fusion:
    """Adds a LoRA to one layer's weight while the layer runs."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self._down, self._up = down, up
        self._weight: torch.nn.Parameter | None = None
        self._total: torch.nn.Parameter | None = None

    def add(self, layer: Any, _: Any) -> None:
        # A weight in half precision is in fp32 by now (fp32_compute.py).
        self._weight = layer.weight
        total = layer.weight.double() + (self._up.double() @ self._down.double()).reshape(layer.weight.shape)
        self._total = layer.weight = torch.nn.Parameter(total.to(layer.weight.dtype), requires_grad=False)

    def restore(self, layer: Any, _: Any, output: Any) -> None:
        if layer.weight is self._total:  # else it was restored before
            layer.weight = self._weight
        self._weight = self._total = None
