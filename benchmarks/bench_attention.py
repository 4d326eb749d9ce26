"""A transformer's graph with attention as products and a softmax, and the one with the fused operator, on the CPU provider: time
and memory of a call by the number of tokens."""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_padding import flux_transformer, random_row
from rich.console import Console
from rich.table import Table

_MEBI = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this sub-command."""
    parser.add_argument("--heads", type=int, default=8, metavar="N", help="attention heads of 64 (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2, metavar="N", help="double and single blocks (default: %(default)s)")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[8, 16, 32, 64], metavar="N", help="tokens on a side of a square image"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds; the median is reported (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures one image a call, and prints a table."""
    import torch
    from img2img_export.convert.external_weights import GRAPH_NAME
    from img2img_export.convert.fused_attention import NAME, write_beside
    from img2img_export.convert.making import make
    from img2img_export.convert.parts import Part
    from img2img_export.progress import Progress
    from img2img_server.runtime.onnx.token_graphs import join

    torch.set_num_threads(1)
    title = f"CPU milliseconds and MiB of a call, ONNX Runtime's CPU provider, one thread, median of {arguments.rounds}"
    table = Table("tokens", "plain", "fused", "plain / fused", "memory, plain", "memory, fused", title=title)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transformer, kind = flux_transformer(arguments.heads, arguments.blocks)
        part = Part("transformer", "transformer", kind.inputs, kind.outputs, kind.call, kind)
        rows = join([random_row(kind, (4, 6)), random_row(kind, (8, 3))])
        example = {key: rows[key] for key in kind.inputs}
        make(transformer, part, example, "fp32", "", 32).write(folder, Progress(), "plain")
        write_beside(make(transformer, part, example, "fp32", "", 32, fused_attention=True), folder, NAME)
        for side in arguments.sides:
            row = random_row(kind, (side, side))
            plain, fused = (_measure(folder / file, row, arguments.rounds) for file in (GRAPH_NAME, NAME))
            ratio = f"{plain[0] / fused[0]:.2f}"
            memory = (f"{value[1] / _MEBI:.0f}" for value in (plain, fused))
            table.add_row(str(side * side), *(f"{value[0] * 1e3:.0f}" for value in (plain, fused)), ratio, *memory)
    Console(width=130).print(table)
    return 0


def _measure(graph: Path, row: dict[str, Any], rounds: int) -> tuple[float, float]:
    """CPU seconds of a call, and the bytes by which the resident memory grows at its peak."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {item.name: row[item.name].numpy() for item in session.get_inputs()}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before, seconds = _resident("VmRSS"), []
    for _ in range(rounds + 1):
        begun = time.process_time()
        session.run(None, feed)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds[1:]), _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field))
