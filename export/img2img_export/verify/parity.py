"""Compares each graph with its PyTorch module in fp32.

Each graph runs batches of one and three, at two sizes, on random inputs and on inputs recorded while the pipeline generated
images. Samples in a batch have different timesteps, which the server relies on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from img2img_server.bundle.manifest import AccuracyLimits, ComponentParity
from img2img_server.bundle.speedups import FEATURES
from img2img_server.runtime.common.pipe import fits_any_size

from img2img_export.convert.emulation import open_emulated
from img2img_export.convert.graph_kinds import CLIPText
from img2img_export.convert.graphs import RUNTIME_ERRORS
from img2img_export.convert.parts import Part, Tensors
from img2img_export.errors import FAILURES, ExportError, first_line
from img2img_export.verify.contrib_functions import open_expanded
from img2img_export.verify.recorded_inputs import Calls

_BATCHES = (1, 3)
_RANDOM_LATENTS = {1: (8, 8), 3: (9, 13)}
"""Sizes of a UNet's random latents by batch size. The second is odd, which optimum's graphs refuse."""
_MOST_SIDE = {"vae_encoder": 512, "vae_decoder": 64}
"""Larger images and latents are cropped. ONNX Runtime's normalization on the CPU sums in fp32: of 1024 x 1024 pixels with a
relative error of 6e-5, which would hide faults. The images of the whole pipeline are compared whole."""
_STEPS = (1.0, 0.4, 0.002)
"""The timesteps of a batch, as fractions of the largest recorded one."""

_LEGACY_END = 2
"""Old CLIP configurations have end token 2 but mean the largest id (transformers then pools by argmax)."""

_KINDS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
"""NumPy types by ONNX Runtime's names."""


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: the graph's inputs by name, in fp32, and PyTorch's outputs.

    `padded`: the graph's outputs may be longer than the expected ones, on each axis.
    """

    name: str
    inputs: Tensors
    expected: dict[str, np.ndarray]
    is_random: bool = False
    padded: bool = False


def make_cases(part: Part, module: Any, calls: Calls, stock: bool = False) -> list[Case]:
    """Makes the comparisons of a part; the module must compute in fp32.

    `stock`: the graph was made by optimum-cli, and takes one timestep per batch and latents of even sizes.
    """
    inputs: dict[str, Tensors] = {}
    sizes = calls.two_sizes()
    for index, batch in enumerate(_BATCHES):
        real = _cropped(part, _batch(sizes[index % len(sizes)], batch, calls))
        if stock and "timestep" in real:
            real["timestep"] = real["timestep"][:1].repeat(batch)
        inputs[f"real, batch {batch}, {_size(real)}"] = real
        made = _random(part, real, batch, any_size=takes_any_size(module) and not stock, config=module.config)
        inputs[f"random, batch {batch}, {_size(made)}"] = made
    cases = []
    for name, given in inputs.items():
        try:
            with torch.no_grad():
                expected = part.call(module, given)
        except FAILURES as error:
            raise ExportError(f"{part.name} cannot run {name}: {type(error).__name__}: {first_line(error)}") from error
        values = {key: value.float().numpy() for key, value in expected.items()}
        cases.append(Case(name, given, values, is_random=name.startswith("random")))
    return cases


def compare(
    part: Part,
    session: Any,
    cases: list[Case],
    limits: AccuracyLimits,
    graph: str = "plain",
    random_limits: AccuracyLimits | None = None,
) -> list[ComponentParity]:
    """Runs the cases in an ONNX Runtime session. `graph` is "plain" or "fused". `random_limits` are those of random inputs, if
    they differ."""
    results = []
    names = list(part.outputs)
    for case in cases:
        inputs = {item.name: _as_input(case.inputs[item.name], item) for item in session.get_inputs()}
        try:
            outputs = session.run(names, inputs)
        except RUNTIME_ERRORS:
            # The graph refuses the inputs, for example because a size is frozen.
            outputs = [np.array(np.nan)] * len(names)
        if case.padded:
            outputs = [_cut(actual, case.expected[name]) for name, actual in zip(names, outputs, strict=True)]
        allowed = random_limits if random_limits is not None and case.is_random else limits
        errors = [measure(actual, case.expected[name], allowed) for name, actual in zip(names, outputs, strict=True)]
        worst, relative = max(error.worst for error in errors), max(error.relative for error in errors)
        passed = all(error.passed for error in errors)
        results.append(ComponentParity(part.name, case.name, worst, relative, passed, graph))
    return results


def problems_of(parities: list[ComponentParity]) -> Iterator[str]:
    """One line per failed comparison, the worst first."""
    for part in sorted(parities, key=lambda part: -part.relative_error):
        if part.passed:
            continue
        if math.isinf(part.relative_error):
            found = "NaN, infinite values or a different shape"
        else:
            found = f"relative error {part.relative_error:.2e}, maximum error {part.max_abs_error:.2e}"
        yield f"{part.component} differs from PyTorch ({part.case}): {found}"


def _cut(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """`actual` cut to the shape of `expected`, if it has as many axes."""
    return actual[tuple(slice(size) for size in expected.shape)] if actual.ndim == expected.ndim else actual


def _as_input(value: torch.Tensor, item: Any) -> np.ndarray:
    """Converts a tensor to the type of the graph's input `item`; its first number if that is a scalar."""
    array: np.ndarray = value.numpy().astype(_KINDS[item.type])
    return array if item.shape else array.reshape(-1)[:1].reshape(())


def open_graph(path: Path) -> Any:
    """Opens a session that emulates the graph as on a GPU. Raises ExportError if ONNX Runtime cannot load the graph."""
    return _open(path, open_emulated)


def open_fused(path: Path) -> Any:
    """Opens a session for a fused graph with its operators expanded. Raises ExportError like `open_graph`."""
    return _open(path, open_expanded)


def _open(path: Path, function: Callable[[Path], Any]) -> Any:
    try:
        return function(path)
    except RUNTIME_ERRORS as error:
        raise ExportError(f"ONNX Runtime cannot open {path.parent.name}: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class Error:
    """The difference of two tensors: `worst` is absolute, `relative` by L2 norms; both infinite if a value is not finite."""

    worst: float
    relative: float
    passed: bool


def measure(actual: np.ndarray, expected: np.ndarray, limits: AccuracyLimits) -> Error:
    """Compares two tensors. A different shape, a NaN or an infinity fails."""
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return Error(float("inf"), float("inf"), False)
    reference = expected.astype(np.float64)
    difference = actual.astype(np.float64) - reference
    worst, norm = float(np.abs(difference).max()), float(np.linalg.norm(reference))
    if norm == 0.0:
        return Error(worst, 0.0 if worst == 0.0 else float("inf"), worst == 0.0)
    relative = float(np.linalg.norm(difference)) / norm
    root_mean_square = norm / reference.size**0.5
    return Error(worst, relative, relative <= limits.relative_error and worst <= limits.worst * root_mean_square)


def _batch(call: Tensors, batch: int, calls: Calls) -> Tensors:
    """`batch` rows from the recorded calls of this size, each with its own timestep."""
    alike = next(kept for kept in calls.by_shape.values() if any(value is call for value in kept))
    rows = len(next(iter(call.values())))
    index = [row % (rows * len(alike)) for row in range(batch)]
    given: Tensors = {}
    for name, value in call.items():
        if name == "timestep":
            given[name] = value[:1] * torch.tensor(_STEPS[:batch])
        elif value.ndim and len(value) == rows:
            given[name] = torch.cat([other[name] for other in alike])[index]
        else:
            given[name] = value
    return given


def _cropped(part: Part, real: Tensors) -> Tensors:
    side = _MOST_SIDE.get(part.name)
    return {name: value[..., :side, :side] if side and value.ndim == 4 else value for name, value in real.items()}


def _random(part: Part, real: Tensors, batch: int, any_size: bool, config: Any) -> Tensors:
    """Random inputs with the spread of the recorded ones. Timesteps and inputs without a row per sample (positions) are kept.
    Texts with a mask have other lengths."""
    generator = torch.Generator("cpu").manual_seed(batch)
    made: Tensors = {}
    if {"input_ids", "attention_mask"} <= real.keys():
        real = _padded_texts(real, batch)
    for name, value in real.items():
        if name == "input_ids":
            made[name] = _random_ids(config, value, generator, isinstance(part.kind, CLIPText))
        elif name == "timestep" or not value.is_floating_point() or len(value) != batch:
            made[name] = value
        else:
            shape = list(value.shape)
            if name == "sample" and any_size:
                shape[2:] = _RANDOM_LATENTS[batch]
            spread = value.std() if value.numel() > 1 else torch.tensor(1.0)
            made[name] = torch.randn(shape, generator=generator) * spread + value.mean()
    return made


def takes_any_size(module: Any) -> bool:
    """Whether the module is a UNet that takes latents of odd sizes, like Stable Diffusion's."""
    is_unet = getattr(module.config, "addition_embed_type", "") != ""
    return is_unet and fits_any_size(module)


def _padded_texts(real: Tensors, batch: int) -> Tensors:
    """The inputs with fewer tokens, an odd number, of which some are padding: after the text of the first row, and before that of
    the last one."""
    count = real["input_ids"].shape[1] // (batch + 1) | 1
    mask = torch.ones_like(real["attention_mask"][:, :count])
    mask[-1, : count // 3] = 0
    mask[0] = mask[-1].flip(-1)
    return {**real, "input_ids": real["input_ids"][:, :count], "attention_mask": mask}


def _random_ids(config: Any, ids: torch.Tensor, generator: torch.Generator, pooled: bool) -> torch.Tensor:
    """Random token ids of texts; if they are `pooled`, followed by end tokens, which pooling searches for."""
    marks = [value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))]
    known = torch.tensor([token for token in range(config.get_text_config().vocab_size - 2) if token not in marks])
    made = known[torch.randint(len(known), ids.shape, generator=generator)]
    if not pooled:
        return made
    end = config.eos_token_id if config.eos_token_id != _LEGACY_END else config.vocab_size - 1
    for row in range(len(made)):
        made[row, 5 + 9 * row :] = end
    return made


def _size(inputs: Tensors) -> str:
    first = next(iter(inputs.values()))
    return " x ".join(map(str, first.shape[2:] if first.ndim > 3 else first.shape[1:2]))


def light_cases(part: Part, cases: list[Case]) -> tuple[Part, list[Case]]:
    """The light graph's description and its comparisons: on features of the same inputs, its output is the whole graph's."""
    made = []
    for case in cases:
        expected = {name: value for name, value in case.expected.items() if name != FEATURES}
        features = torch.from_numpy(np.ascontiguousarray(case.expected[FEATURES]))
        made.append(replace(case, inputs={**case.inputs, FEATURES: features}, expected=expected))
    outputs = {name: axes for name, axes in part.outputs.items() if name != FEATURES}
    return replace(part, inputs={**part.inputs, FEATURES: part.outputs[FEATURES]}, outputs=outputs), made
