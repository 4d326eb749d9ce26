"""The Python part of `scripts/try_dynamo`: compares torch.onnx.export(dynamo=True) with tracing.

Heavy imports are inside the functions."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MODELS = (
    "sd1",
    "sd2",
    "sdxl",
    "refiner",
    "lcm",
    "pix2pix",
    "sd3",
    "flux",
    "kandinsky22",
    "kandinsky3",
    "kolors",
    "zimage",
    "qwenimage",
)


def main() -> int:
    """Prints a Markdown table with a row per graph. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Exports graphs of tiny models with torch.onnx.export(dynamo=True), runs each on the cases of an export's "
        "comparison (batches of 1 and 3, two sizes), and prints the results."
    )
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"tiny models; by default {', '.join(MODELS)}")
    names = parser.parse_args().models
    # torch prints the whole graph of a failed trace to standard output, so the table uses a duplicate of it.
    with os.fdopen(os.dup(1), "w") as table, tempfile.TemporaryDirectory() as folder:
        os.dup2(2, 1)
        print("| model | graph | outcome | nodes | by tracing | seconds |\n|---|---|---|---|---|---|", file=table)
        for name in names:
            for row in _try_model(name, Path(folder)):
                print(f"| {name} | {' | '.join(row)} |", file=table, flush=True)
    return 0


def _try_model(name: str, folder: Path) -> Iterator[tuple[str, ...]]:
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import tiny_models
    from img2img_export.attempts import draw
    from img2img_export.convert import models
    from img2img_export.errors import ExportError
    from img2img_export.options import ExportOptions
    from img2img_export.progress import Progress
    from img2img_export.read.checkpoint import INDEX_NAME, read_index, read_layout
    from short_exports import cut_short

    source = tiny_models.build(name, folder / name)
    layout = read_layout(read_index(source / INDEX_NAME))
    loader = models.Loader(source, layout)
    plan = models.plan(layout, "auto")
    with cut_short(2):
        drawn = draw(loader, plan, ExportOptions(source=str(source), output=folder / "out"), Progress())
    for graph, calls in drawn.calls.items():
        module = loader.component("vae" if graph.startswith("vae_") else graph)
        try:
            yield (graph, *_try_graph(graph, module, calls, folder))
        except ExportError as error:
            yield graph, str(error).replace("|", "/"), "", "", ""


def _try_graph(name: str, module: Any, calls: Any, folder: Path) -> tuple[str, ...]:
    import torch
    from img2img_export.component import described
    from img2img_export.convert.graphs import quiet
    from img2img_export.convert.tracing import _Flat, trace
    from img2img_export.errors import ExportError
    from img2img_export.verify.parity import compare
    from img2img_server.bundle.manifest import LIMITS
    from onnxruntime import InferenceSession

    with quiet(), torch.no_grad():
        part, example, cases = described(name, module, calls)
        try:
            traced = str(len(trace(module, part, example).model.graph.node))
        except ExportError:
            traced = "refused"
        path = folder / "model.onnx"
        begun = time.perf_counter()
        try:
            shapes = tuple(dict.fromkeys(part.inputs.get(key, {}), torch.export.Dim.DYNAMIC) for key in example)
            program = torch.onnx.export(
                _Flat(module, part.call, list(example)).eval(), tuple(example.values()), dynamo=True, verbose=False,
                dynamic_shapes=(shapes,), input_names=list(example), output_names=list(part.outputs), external_data=False,
            )  # fmt: skip
            assert program is not None, "dynamo=True returns a program"
            program.save(str(path))
            nodes = sum(1 for _ in program.model.graph.all_nodes())
        except Exception as error:  # noqa: BLE001 - reported in the table
            return _short(error), "", traced, f"{time.perf_counter() - begun:.0f}"
        seconds = time.perf_counter() - begun
        found = compare(part, InferenceSession(str(path), providers=["CPUExecutionProvider"]), cases, LIMITS["fp32"])
    wrong = [parity.case for parity in found if not parity.passed]
    outcome = f"differs or refuses: {'; '.join(wrong)}" if wrong else f"same, to {max(p.relative_error for p in found):.0e}"
    return outcome, str(nodes), traced, f"{seconds:.0f}"


def _short(error: BaseException) -> str:
    """The innermost cause of an error, in one line of a table."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:160]}".replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
