"""Chooses the layers of a module that become static int8, and measures their ranges, by running the module in PyTorch.

Ranges are the extremes of each channel over recorded calls. The layers' int8 arithmetic is emulated in fp32, in the module
itself, for one group of layers after the other, to measure how much each changes the module's output. Weights are quantized one
at a time.

A layer is quantized *per tensor* (one scale for its input and one for its output) or *per channel* (input and output are divided
by a factor for each channel before they are quantized; slower, for layers whose channels have very different ranges), or stays
in fp32.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from img2img_export.convert.parts import Part, Tensors
from img2img_export.progress import Progress

GREATEST = 127
"""The largest magnitude of an int8 weight. Products of 127 overflow the 16-bit sums of x86 processors without VNNI; the server's
sessions set `session.x64quantprecision`, so that ONNX Runtime avoids them there."""
_LEVELS = 255
_TINY = 1e-8
_LEAST_CHANNELS = 16
"""Layers with fewer input or output channels stay in fp32: the first and the last one, which take little time and change much."""
_LEAST_FEATURES = 32
_MOST_MEASURED = 4
"""Maximum number of calls on which layers are compared: of the smallest size, spread over the timesteps."""
_GROUP = 4
_ATTEMPTS = 8


@dataclass(slots=True)
class Layer:
    """A convolution or linear layer: its module, multiply-adds per call, and the range of each input and output channel."""

    name: str
    module: Any
    cost: float = 0.0
    low: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    high: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    out_low: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    out_high: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, whose output is quantized, too; that of a linear layer is not."""
        return isinstance(self.module, torch.nn.Conv2d)

    def observe(self, value: torch.Tensor, output: torch.Tensor) -> None:
        """Widens the ranges by a call's input and output."""
        axes = (0, 2, 3) if self.is_convolution else tuple(range(value.ndim - 1))
        # Zero is always in the range: it must be exact, because convolutions pad with it.
        self.low, self.high = torch.minimum(self.low, value.amin(axes)), torch.maximum(self.high, value.amax(axes))
        self.out_low, self.out_high = (
            torch.minimum(self.out_low, output.amin(axes)),
            torch.maximum(self.out_high, output.amax(axes)),
        )
        self.cost += output.numel() * self.module.weight[0].numel()


@dataclass(frozen=True, slots=True)
class Numbers:
    """The scales of a layer in int8.

    Values are divided by the factors, then quantized. `weight_scales` [O] are those of the weight times the input's factors.
    `result` is for a convolution's output.
    """

    value: "Scale"
    weight_scales: torch.Tensor
    result: "Scale"


@dataclass(frozen=True, slots=True)
class Scale:
    """How values are quantized to uint8: divided by `factors` [C] (None: not), then by `scale`, and shifted by `zero`."""

    factors: torch.Tensor | None
    scale: float
    zero: int

    @classmethod
    def of(cls, low: torch.Tensor, high: torch.Tensor, per_channel: bool) -> "Scale":
        """The scale of channels with these ranges, which include zero. It has factors if it is per channel."""
        if not per_channel:
            scale = max(float(high.max() - low.min()) / _LEVELS, _TINY)
            return cls(None, scale, min(round(-float(low.min()) / scale), _LEVELS))
        # One zero point for all channels, which divides the range as in the median channel; factors so that every channel fits.
        shares = -low / (high - low).clamp_min(_TINY)
        zero = int(torch.round(_LEVELS * shares.median()).clamp(0, _LEVELS))
        return cls(torch.maximum(high / max(_LEVELS - zero, 0.5), -low / max(zero, 0.5)).clamp_min(_TINY), 1.0, zero)

    def emulate(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        """The value after quantization, in fp32; its channels are on `axis`."""
        if self.factors is None:
            return torch.fake_quantize_per_tensor_affine(value, self.scale, self.zero, 0, _LEVELS)
        factors = self.factors.reshape(-1, *[1] * (value.ndim - 1 - axis % value.ndim))
        return torch.fake_quantize_per_tensor_affine(value / factors, self.scale, self.zero, 0, _LEVELS) * factors


@dataclass(frozen=True, slots=True)
class Choice:
    """How to quantize the layers of a module.

    `layers` maps the names of int8 layers to whether they are quantized per channel. `kept` names the layers that stay in fp32,
    the worst first. `error` is the relative error of the module's output on the calls compared.
    """

    layers: Mapping[str, bool]
    kept: tuple[str, ...]
    error: float


def numbers_of(layer: Layer, per_channel: bool) -> Numbers:
    """The scales of a layer, from its ranges and its weight."""
    value = Scale.of(layer.low, layer.high, per_channel)
    weight = scaled(layer.module.weight.detach().float(), value)
    weight_scales = (weight.abs().flatten(1).amax(1) / GREATEST).clamp_min(1e-30)
    return Numbers(value, weight_scales, Scale.of(layer.out_low, layer.out_high, per_channel))


def scaled(weight: torch.Tensor, value: Scale) -> torch.Tensor:
    """A weight [O, I, ...] times the factors of its input."""
    return weight if value.factors is None else weight * value.factors.reshape(1, -1, *[1] * (weight.ndim - 2))


class Calibration:
    """The layers of a module that int8 is possible for, their ranges over `calls`, and their sensitivity, measured once.

    The module must compute in fp32. `weights` are the parameters that the graph multiplies with, by their identity: other layers
    cannot be quantized. `known` is the calibration of the same module when it was loaded before; its measurements are kept.
    """

    def __init__(
        self,
        module: Any,
        part: Part,
        calls: Sequence[Tensors],
        weights: set[int],
        progress: Progress,
        known: "Calibration | None" = None,
    ) -> None:
        self._part = part
        self._progress = progress
        self._calls = _spread(calls)
        self._errors: dict[tuple[str, bool], float] = {}
        self._groups: dict[tuple[str, ...], float] = {}
        self.layers: dict[str, Layer] = {}
        if known is not None:
            modules = dict(module.named_modules())
            self.layers = {name: dataclasses.replace(layer, module=modules[name]) for name, layer in known.layers.items()}
            self._errors, self._groups = known._errors, known._groups
            return
        found = (
            Layer(name, layer) for name, layer in module.named_modules() if _is_possible(layer) and id(layer.weight) in weights
        )
        self.layers = {layer.name: layer for layer in found}
        self._observe(module, calls)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.cost}

    def release(self) -> None:
        """Forgets the module, and keeps the measurements."""
        for layer in self.layers.values():
            layer.module = None

    def choose(self, module: Any, budget: float) -> Choice:
        """Chooses layers so that the module's output is within the relative error `budget`, keeping as many as possible."""
        if not self.layers:
            return Choice({}, (), 0.0)
        with torch.no_grad():
            expected = [self._run(module, call) for call in self._calls]
            return self._choose(lambda modes: self._error(module, modes, expected), budget**2)

    def _choose(self, measure: Callable[[Mapping[str, bool]], float], allowed: float) -> Choice:
        """`allowed` and all errors here are squared: those of single layers then add up to that of all."""
        share = allowed / len(self.layers)
        with self._progress.task(f"{self._part.name}: comparing layers in int8", len(self.layers), "layers") as advance:
            names = list(self.layers)
            for start in range(0, len(names), _GROUP):
                self._divide(names[start : start + _GROUP], measure, share)
                advance(len(names[start : start + _GROUP]))
        modes: dict[str, bool] = {}
        for name in names:
            modes[name] = False
            if self._errors[name, False] > share:
                if (name, True) not in self._errors:
                    self._errors[name, True] = measure({name: True})
                modes[name] = self._errors[name, True] < self._errors[name, False] / 2
        order = sorted(names, key=lambda name: self._errors[name, modes[name]] / self.layers[name].cost, reverse=True)
        kept = self._least(order, modes, allowed)
        for _ in range(_ATTEMPTS):
            chosen = {name: modes[name] for name in names if name not in order[:kept]}
            error = measure(chosen) if chosen else 0.0
            if error <= allowed:
                break
            # Errors did not add up to the measured one.
            kept = max(kept + 1, self._least(order, modes, allowed * allowed / error))
        else:
            chosen, kept, error = {}, len(order), 0.0
        return Choice(chosen, tuple(order[:kept]), error**0.5)

    def _least(self, order: Sequence[str], modes: Mapping[str, bool], allowed: float) -> int:
        """The least number of the first layers in `order` without which the sum of errors is allowed."""
        left = sum(self._errors[name, modes[name]] for name in order)
        count = 0
        while count < len(order) and left > allowed:
            left -= self._errors[order[count], modes[order[count]]]
            count += 1
        return count

    def _divide(self, names: Sequence[str], measure: Callable[[Mapping[str, bool]], float], share: float) -> None:
        """Measures layers together, and halves of them if together they change more than their share."""
        if (error := self._groups.get(tuple(names))) is None:
            error = self._groups[tuple(names)] = measure(dict.fromkeys(names, False))
        if len(names) == 1 or error <= share * len(names) / 2:
            self._errors.update(((name, False), error / len(names)) for name in names)
            return
        middle = len(names) // 2
        self._divide(names[:middle], measure, share)
        self._divide(names[middle:], measure, share)

    def _observe(self, module: Any, calls: Sequence[Tensors]) -> None:
        handles = [layer.module.register_forward_hook(_observer(layer)) for layer in self.layers.values()]
        try:
            with torch.no_grad(), self._progress.task(f"{self._part.name}: calibrating", len(calls), "calls") as advance:
                for call in calls:
                    self._run(module, call)
                    advance(1)
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, module: Any, call: Tensors) -> torch.Tensor:
        return next(iter(self._part.call(module, call).values())).float()

    def _error(self, module: Any, modes: Mapping[str, bool], expected: Sequence[torch.Tensor]) -> float:
        """The squared relative error of the module's output with some layers in int8.

        An error at a timestep changes the image in proportion to the noise that the step removes, so calls are weighted by
        their timestep.
        """
        difference = reference = 0.0
        with emulated({name: (self.layers[name], per_channel) for name, per_channel in modes.items()}):
            for call, right in zip(self._calls, expected, strict=True):
                weight = float(call["timestep"].max()) if "timestep" in call else 1.0
                difference += weight * float((self._run(module, call) - right).square().sum())
                reference += weight * float(right.square().sum())
        return difference / reference if reference else 0.0


def _is_possible(layer: Any) -> bool:
    if isinstance(layer, torch.nn.Conv2d):
        usual = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return usual and min(layer.in_channels, layer.out_channels) >= _LEAST_CHANNELS
    return isinstance(layer, torch.nn.Linear) and layer.in_features >= _LEAST_FEATURES


def _observer(layer: Layer) -> Callable[..., None]:
    def observe(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # A linear layer with one row for each sample, such as a timestep embedding, stays in fp32.
        if args and args[0].ndim >= 3:
            layer.observe(args[0].float(), output.float())

    return observe


def _spread(calls: Sequence[Tensors]) -> list[Tensors]:
    """A few of the calls: those of the smallest size, spread over their timesteps."""

    def size(call: Tensors) -> int:
        first = next(iter(call.values()))
        return first[0].numel()

    least = min(map(size, calls))
    small = [call for call in calls if size(call) == least]
    small.sort(key=lambda call: float(call["timestep"].max()) if "timestep" in call else 0.0)
    count = min(_MOST_MEASURED, len(small))
    return [small[(2 * index + 1) * len(small) // (2 * count)] for index in range(count)]


@contextlib.contextmanager
def emulated(layers: Mapping[str, tuple[Layer, bool]]) -> Iterator[None]:
    """Within it, these layers compute as they would in int8, in fp32 arithmetic."""
    for layer, per_channel in layers.values():
        layer.module.forward = _int8_forward(layer.module, numbers_of(layer, per_channel), layer.is_convolution)
    try:
        yield
    finally:
        for layer, _ in layers.values():
            del layer.module.forward


def _int8_forward(module: Any, numbers: Numbers, is_convolution: bool) -> Callable[..., torch.Tensor]:
    def forward(value: torch.Tensor, *unused: Any) -> torch.Tensor:
        value = numbers.value.emulate(value, 1 if is_convolution else -1)
        weight = scaled(module.weight, numbers.value)
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(weight, numbers.weight_scales, zeros, 0, -GREATEST, GREATEST)
        if numbers.value.factors is not None:
            weight = weight / numbers.value.factors.reshape(1, -1, *[1] * (weight.ndim - 2))
        if not is_convolution:
            return torch.nn.functional.linear(value, weight, module.bias)
        output: torch.Tensor = module._conv_forward(value, weight, module.bias)
        return numbers.result.emulate(output, 1)

    return forward
