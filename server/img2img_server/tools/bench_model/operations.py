"""How many operations a graph takes: multiplications and additions of its matrix products and convolutions, counted apart.

Counted from what ONNX Runtime's own profile says of the shapes that each node saw, since the server has no `onnx` to read graphs
with. The rest of a graph (norms, softmax, activations) is small beside them, and is left out, as torch's FlopCounterMode does.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from img2img_server.runtime.onnx.providers import ERRORS
from img2img_server.runtime.onnx.runners import dtype_of

Shape = Sequence[int]

_MATRIX_PRODUCTS = frozenset(
    {
        "MatMul",
        "FusedMatMul",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "QLinearMatMul",
        "MatMulNBits",
        "Gemm",
        "FusedGemm",
    }
)
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "ConvInteger", "QLinearConv"})
_WEIGHT = {"QLinearConv": 3}
"""Where a convolution's kernel [M, C / groups, ...] is among its inputs, but for the second place."""

_SIDES = (8, 16, 24)
"""Squares of latents to count on. They divide by what models divide latents by, and take little time."""
_PIXELS = 8
"""Pixels of a side of one latent, for graphs that take images."""


class Uncounted(Exception):
    """A graph whose operations cannot be counted here: ONNX Runtime's CPU provider does not run it."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Those of one row of a graph's batch, as a function of its image's or latents' area in its own units."""

    at: Callable[[int], int]

    @classmethod
    def count(cls, graph: Path, feed: Mapping[str, torch.Tensor], pictures: bool = False, threads: int = 1) -> "Operations":
        """Counts on small inputs like `feed`, in which one tensor may be of four axes: latents, or `pictures`.

        A graph without such an input takes what it takes for `feed`, whatever the area. Raises Uncounted.
        """
        spatial = [name for name, tensor in feed.items() if tensor.ndim == 4]
        rows = len(next(iter(feed.values())))
        one = {name: tensor[:1] if tensor.ndim and len(tensor) == rows else tensor for name, tensor in feed.items()}
        if len(spatial) != 1:
            (counted,) = count_operations(graph, [one], threads)
            return cls(lambda area: counted)
        (name,) = spatial
        sides = [side * (_PIXELS if pictures else 1) for side in _SIDES]
        feeds = [one | {name: torch.zeros(1, one[name].shape[1], side, side, dtype=one[name].dtype)} for side in sides]
        return cls(quadratic(sides, count_operations(graph, feeds, threads)))


def count_operations(graph: Path, feeds: Sequence[Mapping[str, torch.Tensor]], threads: int = 1) -> list[int]:
    """Runs the ONNX file `graph` on each of `feeds` on the CPU, unoptimized: the operations of each run. Raises Uncounted."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_profiling = True
    # Optimized graphs have operators of other names and blocked shapes; packed weights are missing in the profile.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            types = {item.name: dtype_of(item) for item in session.get_inputs()}
            for feed in feeds:
                session.run(None, {name: _array(tensor.to("cpu", types[name])) for name, tensor in feed.items()})
        except ERRORS as error:
            raise Uncounted(f"{graph}: {error}") from error
        profile = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in profile if event.get("cat") == "Node" and "output_type_shape" in event.get("args", {})]
    # Every run has the same nodes, one run after the other.
    each = len(nodes) // len(feeds)
    return [operations_of(nodes[index * each : (index + 1) * each]) for index in range(len(feeds))]


def operations_of(profile: Sequence[Mapping[str, Any]]) -> int:
    """The operations of all the nodes of one run, which are events of a profile."""
    return sum(
        node_operations(arguments["op_name"], _shapes(arguments["input_type_shape"]), _shapes(arguments["output_type_shape"]))
        for arguments in (event["args"] for event in profile)
    )


def node_operations(kind: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Those of one node by its operator, and the shapes of its inputs and outputs; 0 for what is no product."""
    if kind in _MATRIX_PRODUCTS:
        # Of Gemm's transposed inputs none is met in the graphs of these models: the first is [..., M, K].
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if kind in _CONVOLUTIONS:
        return 2 * math.prod(outputs[0]) * math.prod(inputs[_WEIGHT.get(kind, 1)][1:])
    if kind == "NhwcConv":
        # Its kernel is [M, ..., C / groups].
        return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if kind == "ConvTranspose":
        return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind == "MultiHeadAttention":
        # Queries [B, S, H], keys and values [B, T, H], each with each: once to compare, once to take the values.
        return 4 * math.prod(inputs[0]) * inputs[1][1]
    return 0


def quadratic(sides: Sequence[int], counts: Sequence[int]) -> Callable[[int], int]:
    """The polynomial of an area, of degree two, that goes through three counts for squares of `sides`: a function of the area.

    Convolutions grow with an image's area, attention with the area's square, and nothing with more. It is exact where all
    sizes divide by what the model divides by.
    """
    areas = [side * side for side in sides]
    # Newton's divided differences, exact.
    first = [Fraction(counts[i + 1] - counts[i], areas[i + 1] - areas[i]) for i in range(2)]
    second = (first[1] - first[0]) / (areas[2] - areas[0])

    def at(area: int) -> int:
        return round(counts[0] + first[0] * (area - areas[0]) + second * (area - areas[0]) * (area - areas[1]))

    return at


def _array(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise Uncounted("NumPy has no bfloat16")
    return tensor.numpy()


def _shapes(listed: Sequence[Mapping[str, list[int]]]) -> list[list[int]]:
    """A profile names each tensor's type: [{"float": [1, 4, 8, 8]}, ...]."""
    return [next(iter(entry.values())) if entry else [] for entry in listed]
