"""Images of different numbers of tokens in one call, with padding that attention ignores: whether a row keeps its bits, and
the time of a shared call compared with a call for each."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

_MASK = "image_mask"
_EIGHTH = 9 / 8
_TEXT = 128


class _Graphs(NamedTuple):
    """Sessions of Flux's kind of transformer with and without a mask for the image's tokens, and its kind of graph."""

    masked: Any
    plain: Any
    kind: Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="attention heads of 64 (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, metavar="N", help="double and single blocks (default: %(default)s)")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="tokens on a side of a square image"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="rounds; the median is reported (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures an image with one of an eighth more tokens, and prints a table."""
    import torch

    torch.set_num_threads(1)
    title = f"milliseconds for both images, ONNX Runtime's CPU provider, one thread, median of {arguments.rounds}"
    columns = (
        "tokens",
        "two calls, no mask",
        "two calls, masked",
        "one call, padded",
        "two equal images: one call / two",
        "bits",
    )
    table = Table(*columns, title=title)
    with tempfile.TemporaryDirectory() as folder:
        graphs = _graphs(Path(folder), arguments.heads, arguments.blocks)
        for side in arguments.sides:
            table.add_row(*_measure(graphs, (side, side), (side, round(side * _EIGHTH)), arguments.rounds))
    Console(width=130).print(table)
    return 0


def _measure(graphs: _Graphs, small: tuple[int, int], large: tuple[int, int], rounds: int) -> tuple[str, ...]:
    import numpy as np
    import torch
    from img2img_server.runtime.onnx import token_graphs

    first, second = (random_row(graphs.kind, size) for size in (small, large))
    padded, equal = token_graphs.join([first, second]), token_graphs.join([first, first])
    count, most = small[0] * small[1], large[0] * large[1]
    alone, _ = _run(graphs.masked, first)
    beside, _ = _run(graphs.masked, padded)
    unmasked, _ = _run(graphs.masked, padded | {_MASK: torch.ones_like(padded[_MASK])})
    assert np.abs(unmasked[0, :count] - alone[0]).max() > 0, "the mask has an effect"
    kept = np.array_equal(alone[0].view(np.int32), beside[0, :count].view(np.int32))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, session, calls in (
            ("plain", graphs.plain, (first, second)), ("masked", graphs.masked, (first, second)),
            ("padded", graphs.masked, (padded,)), ("together", graphs.plain, (equal,)), ("apart", graphs.plain, (first, first)),
        ):  # fmt: skip
            seconds.setdefault(name, []).append(sum(_run(session, call)[1] for call in calls))
    median = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    ratio = f"{median['together'] / median['apart']:.2f}"
    times = (f"{median[name]:.0f}" for name in ("plain", "masked", "padded"))
    return (f"{count} and {most}", *times, ratio, "equal" if kept else "differ")


def _run(session: Any, inputs: dict[str, Any]) -> tuple[Any, float]:
    feed = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
    begun = time.perf_counter()
    (found,) = session.run(None, feed)
    return found, time.perf_counter() - begun


def flux_transformer(heads: int, blocks: int) -> tuple[Any, Any]:
    """A transformer of Flux's kind with random weights, and its kind of graph."""
    import diffusers
    import torch
    from img2img_export.convert.token_graphs import FluxKind

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=blocks, num_single_layers=blocks, attention_head_dim=64, num_attention_heads=heads,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    return transformer, FluxKind({**transformer.config, "_class_name": "FluxTransformer2DModel"})


def random_row(kind: Any, size: tuple[int, int]) -> dict[str, Any]:
    """The inputs for an image of so many tokens in height and width, with a mask that hides none."""
    import torch
    from img2img_export.convert.token_graphs import Layout

    row = kind.graph.inputs(kind.example(Layout(_TEXT, (size,)), 0.5, torch.Generator().manual_seed(sum(size))))
    return {**row, _MASK: torch.ones(1, size[0] * size[1], dtype=torch.bool)}


def _graphs(folder: Path, heads: int, blocks: int) -> _Graphs:
    """Makes the graphs of a transformer with random weights."""
    import onnxruntime
    import torch
    from img2img_export.convert import token_graphs
    from img2img_export.convert.external_weights import GRAPH_NAME
    from img2img_export.convert.graph_kinds import MASKED
    from img2img_export.convert.parts import Part
    from img2img_export.convert.tracing import trace
    from img2img_export.progress import Progress
    from img2img_server.runtime.onnx.token_graphs import join

    ours = token_graphs._where

    def masked(inputs: dict[str, torch.Tensor]) -> Any:
        where, image = ours(inputs), inputs["hidden_states"]
        seen = torch.cat([torch.ones_like(inputs["encoder_hidden_states"][..., 0]), inputs[_MASK].to(image.dtype)], dim=1)
        return where._replace(bias=((seen - 1) * MASKED)[:, None, None])

    transformer, kind = flux_transformer(heads, blocks)
    example = join([random_row(kind, (4, 6)), random_row(kind, (8, 3))])
    options, sessions = onnxruntime.SessionOptions(), []
    options.intra_op_num_threads = 1
    for name in ("masked", "plain"):
        inputs = kind.inputs | ({_MASK: {0: "batch_size", 1: "image_tokens"}} if name == "masked" else {})
        part = Part("transformer", "transformer", inputs, kind.outputs, kind.call, kind)
        with patch.object(token_graphs, "_where", masked if name == "masked" else ours):
            graph = trace(transformer, part, {key: example[key] for key in inputs})
        graph.write(folder / name, Progress(), name)
        sessions.append(onnxruntime.InferenceSession(folder / name / GRAPH_NAME, options, providers=["CPUExecutionProvider"]))
    masked_session, plain_session = sessions
    return _Graphs(masked_session, plain_session, kind)
