"""OpenVINO: ONNX graphs compiled by its CPU plugin: of fixed shapes for common sizes, one for all other shapes (buckets.py).

On CPUs that multiply bfloat16 (AVX512_BF16, AMX) it computes in bfloat16, on others in float32. The accuracy check
(accuracy_check.py) decides whether bfloat16 may be used. Graphs that OpenVINO does not run are on ONNX Runtime's CPU provider,
and the log says why. Compiled graphs are kept on disk, so that a later start does not compile them again.
"""

import contextlib
import importlib
import importlib.metadata
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.manifest import BODY_NAME, HEAD_NAME, Manifest
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.onnx.graph_sizes import Shapes, Sizes, shapes_of, try_on_zeros
from img2img_server.runtime.onnx.providers import openvino_core
from img2img_server.runtime.onnx.runners import (
    CONTROL_RUNNER,
    LIGHT_RUNNER,
    LORA_RUNNER,
    HostRunner,
    Make,
    Runner,
    SplitGraphRunner,
)
from img2img_server.runtime.onnx.sessions import Open, SessionOptions
from img2img_server.runtime.providers.buckets import BucketRunner, LaterRunner, RowGraphs, Size, of_one_row

_log = logging.getLogger(__name__)

_GROWTH = {"fp32": 1.1, "fp16": 4.0, "bf16": 4.0}
"""Memory of a compiled graph as a multiple of its weights' bytes: OpenVINO keeps a copy in its kernels' layout, and a float32
copy if the file has less. Measured with Stable Diffusion 1.5's UNet in ONNX Runtime's plugin of OpenVINO: 3.4 GiB of private
memory in fp32 (3.2 GiB of weights, whose mapped file all share), 6.5 GiB in fp16 (1.6 GiB of weights)."""
_WIDE_ROWS = 8
"""Rows of a further graph of the denoiser at the native size. The demo model's UNet in bfloat16 takes 18.1 ms of CPU time for a
row in a graph of 1 row, 15.9 of 2, 15.0 of 8, 15.1 of 16, and 19 to 31 in the graph for any shape; that of the former, smaller
model 5.3 of 2, 4.2 of 8 (2026-11-30, AVX512_BF16, one thread)."""
_PART, _WIDE_PART = 2, 16
"""A graph for the native size may take this part of the available memory, the wide one a sixteenth, others half. The wide graph
is a further copy of the weights, and pays for small models: large ones have enough work in two rows."""
_ANY_SHAPE = {"SNIPPETS_MODE": "DISABLE"}
"""Settings of graphs for any shape. With OpenVINO's fused kernels ("snippets", 2026.4.1) all calls of such a graph are wrong if
the first one has one place at the UNet's deepest level: by 13 % of the demo model's output in float32, and NaN in bfloat16."""
_MOST_CACHED = 32 * 2**30
"""Maximum bytes of compiled graphs on disk; the oldest are deleted."""

_REFUSED = {
    "int8": "int8 graphs are made for it",
    "bf16": "the results of bf16 graphs are wrong in OpenVINO 2026.4",
}
"""Why graphs of some precisions are not run."""
_NARROW = "its weights are quantized by an operator of ONNX Runtime"

_TYPES = {
    "f32": "tensor(float)",
    "f16": "tensor(float16)",
    "i64": "tensor(int64)",
    "i32": "tensor(int32)",
    "boolean": "tensor(bool)",
}
"""ONNX Runtime's names of OpenVINO's types."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output, with the attributes of an onnxruntime.NodeArg. A dynamic axis has a name of its own."""

    name: str
    type: str
    shape: tuple[int | str, ...]


class OpenVinoRunner:
    """The compiled graph of a `model` with inputs and outputs on the CPU. One call at a time: it uses all threads."""

    def __init__(self, compiled: Any, model: Any) -> None:
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()
        # An output that a compiled graph also uses itself has several names there.
        self.inputs: Sequence[Any] = [_port(item) for item in model.inputs]
        self.outputs: Sequence[Any] = [_port(item) for item in model.outputs]

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph on CPU tensors. The results are copies."""
        values = {name: tensor.numpy() for name, tensor in feed.items()}
        with self._lock:
            results = self._request.infer(values, share_inputs=True)
            return [torch.from_numpy(results[index]) for index in range(len(self.outputs))]


class Compiler:
    """Compiles ONNX files. `arithmetic` is OpenVINO's, "f32" or "bf16"; `cache` the folder for compiled graphs, None for none."""

    def __init__(self, threads: int, arithmetic: str, cache: Path | None = None) -> None:
        self.threads = threads
        self.arithmetic = arithmetic
        self._settings = {
            "INFERENCE_PRECISION_HINT": arithmetic,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        self._any_shape = {**self._settings, **_ANY_SHAPE}
        if cache is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                _log.warning("compiled graphs are not kept in %s (%s): each start compiles them", cache, error.strerror)
            else:
                prune(cache)
                self._settings["CACHE_DIR"] = str(cache)
                # OpenVINO's key of a compiled graph does not contain all settings, and earlier versions used others.
                self._any_shape["CACHE_DIR"] = str(cache / "any_shape")

    def ports(self, graph: Path) -> tuple[list[Port], list[Port]]:
        """The inputs and outputs of the file `graph`, which is not compiled. Raises BundleError."""
        try:
            model = openvino_core().read_model(graph)
            return [_port(item) for item in model.inputs], [_port(item) for item in model.outputs]
        except RuntimeError as error:
            raise BundleError(f"{graph} does not open in OpenVINO: {_last_line(error)}") from error

    def __call__(self, graph: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> OpenVinoRunner:
        """Compiles the file `graph`, with these shapes of its inputs or for any. Raises BundleError."""
        try:
            model = openvino_core().read_model(graph)
            if shapes:
                model.reshape({name: list(shape) for name, shape in shapes.items()})
            settings = self._settings if shapes else self._any_shape
            return OpenVinoRunner(openvino_core().compile_model(model, "CPU", settings), model)
        except RuntimeError as error:
            raise BundleError(f"{graph} does not compile in OpenVINO: {_last_line(error)}") from error


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A graph of fixed shapes, which is made if it takes at most one of so many parts of the available memory."""

    bucket: Bucket
    part: int = _PART


class Graphs:
    """Makes the runners of a bundle's graphs (a Make, see runners.py)."""

    def __init__(self, execution: Execution, bundle: Path, manifest: Manifest, open_graph: Open, compiler: Compiler) -> None:
        self._sizes = Sizes(bundle)
        self._asked = execution.buckets
        self._bundle = bundle
        self._manifest = manifest
        self._open = open_graph
        self._compile = compiler

    def __call__(self, name: str, graph: Path) -> Runner:
        """Makes the runner of the component `name` on OpenVINO, or else on the CPU provider. Raises BundleError if both fail."""
        if name.endswith((LORA_RUNNER, LIGHT_RUNNER, CONTROL_RUNNER)):
            # A LoRA graph's ranks vary from call to call, and OpenVINO would compile it for each. A light graph is small, and in
            # bfloat16 it would need a split timestep embedding.
            return self._on_cpu(graph)
        problem = self._refusal(name)
        if not problem:
            try:
                return self._in_parts(name, graph)
            except BundleError as error:
                problem = str(error).splitlines()[0]
        _log.warning("%s: runs on ONNX Runtime's CPU provider instead of OpenVINO: %s", name, problem)
        return self._on_cpu(graph)

    def _refusal(self, name: str) -> str:
        component = next((item for item in self._manifest.components if item.name == name), None)
        if component is None:
            return ""
        return _REFUSED.get(component.precision, _NARROW if component.weight_format else "")

    def _on_cpu(self, graph: Path) -> Runner:
        return HostRunner(self._open(graph, SessionOptions("cpu", self._compile.threads)))

    def _in_parts(self, name: str, graph: Path) -> Runner:
        """In bfloat16 the CPU provider computes a denoiser's timestep embedding, if the bundle has the split graph."""
        head, body = graph.with_name(HEAD_NAME), graph.with_name(BODY_NAME)
        if self._compile.arithmetic != "bf16" or not {f"{name}/{HEAD_NAME}", f"{name}/{BODY_NAME}"} <= set(self._manifest.files):
            return self._ready(name, graph)
        return SplitGraphRunner(self._on_cpu(head), self._ready(name, body))

    def _ready(self, name: str, graph: Path) -> Runner:
        """Opens the smallest graph of each size with fixed shapes; if there is none, the graph for any shape."""
        inputs, outputs = self._compile.ports(graph)
        has_rows = all(item.shape and isinstance(item.shape[0], str) for item in (*inputs, *outputs))
        by_row: dict[Shapes, RowGraphs] = {}
        exact: dict[Shapes, Runner] = {}
        by_size: dict[Size, RowGraphs] = {}
        made: list[Bucket] = []
        for first, *others in self._wanted(name, has_rows):
            shapes = self._shapes(name, inputs, first.bucket)
            if not shapes or not self._has_room(name, first):
                continue
            runner = self._fixed(name, graph, inputs, first.bucket)
            made.append(first.bucket)
            if has_rows:
                rows = shapes[0][0]
                later = {
                    self._shapes(name, inputs, other.bucket)[0][0]: partial(self._later, name, graph, inputs, other)
                    for other in others
                }
                later.pop(rows, None)
                graphs = RowGraphs(f"{self._bundle.name}: {name}", rows, runner, later, self._bytes(name))
                by_row[of_one_row(shapes)] = by_size[first.bucket.width, first.bucket.height] = graphs
            else:
                exact[shapes] = runner
        any_shape = None if made else self._any_shape(name, graph)
        sizes = f", with a graph for {', '.join(map(str, made))}" if made else ""
        arithmetic, threads = self._compile.arithmetic, self._compile.threads
        _log.info("%s: %s runs on openvino in %s, %d threads%s", self._bundle.name, name, arithmetic, threads, sizes)
        if any_shape is not None:
            return any_shape
        other_sizes = LaterRunner(inputs, outputs, partial(self._any_shape_or_cpu, name, graph), self._bytes(name))
        return BucketRunner(other_sizes, by_row, exact, by_size)

    def _shapes(self, name: str, inputs: Sequence[Port], bucket: Bucket) -> Shapes:
        """The shapes of a graph's inputs for a bucket; empty if they are not known."""
        axes = self._sizes.axes(name, inputs, bucket)
        return shapes_of(inputs, axes) if axes else ()

    def _fixed(self, name: str, graph: Path, inputs: Sequence[Port], bucket: Bucket) -> Runner:
        """Opens a graph of fixed shapes. Raises BundleError."""
        shapes = self._shapes(name, inputs, bucket)
        runner = self._compile(graph, dict(zip([item.name for item in inputs], shapes, strict=True)))
        try_on_zeros(graph, runner, self._sizes.axes(name, inputs, bucket) or {})
        return runner

    def _later(self, name: str, graph: Path, inputs: Sequence[Port], wanted: _Wanted) -> Runner:
        """The same during serving. Raises BundleError also if there is not enough memory."""
        if not self._has_room(name, wanted):
            raise BundleError("it could take too much of the available memory")
        return self._fixed(name, graph, inputs, wanted.bucket)

    def _any_shape(self, name: str, graph: Path) -> Runner:
        """Opens the graph for any shape. Raises BundleError."""
        runner = self._compile(graph)
        trial = self._sizes.axes(name, runner.inputs, self._sizes.trial())
        if trial is not None:
            try_on_zeros(graph, runner, trial)
        return runner

    def _any_shape_or_cpu(self, name: str, graph: Path) -> Runner:
        """The same for calls of sizes without a graph: the CPU provider's if OpenVINO does not run it."""
        begun = time.monotonic()
        try:
            runner = self._any_shape(name, graph)
        except BundleError as error:
            problem = str(error).splitlines()[0]
            _log.warning("%s: other sizes run on ONNX Runtime's CPU provider instead of OpenVINO: %s", name, problem)
            return self._on_cpu(graph)
        _log.info("%s: %s: the graph for any shape was opened in %.1f s", self._bundle.name, name, time.monotonic() - begun)
        return runner

    def _wanted(self, name: str, has_rows: bool) -> list[list[_Wanted]]:
        """The graphs of fixed shapes of a component, by size. The first one of each is opened at start. Each size has one of one
        row, for a row that is left. If a graph's first axis is not its rows, calls are not divided, and each bucket is apart."""
        native = self._sizes.native
        if name.startswith("text_encoder"):
            return []
        if self._asked is not None and not has_rows:
            return [[_Wanted(bucket)] for bucket in self._asked]
        if self._asked is not None:
            by_size: dict[tuple[int, int], list[_Wanted]] = {}
            for bucket in sorted(self._asked, key=lambda bucket: bucket.rows):
                by_size.setdefault((bucket.width, bucket.height), []).append(_Wanted(bucket))
            return [[*some, _Wanted(replace(some[0].bucket, rows=1))] for some in by_size.values()]
        if native is None or name != "unet":
            return []
        return [[_Wanted(native), _Wanted(replace(native, rows=1)), _Wanted(replace(native, rows=_WIDE_ROWS), _WIDE_PART)]]

    def _bytes(self, name: str) -> int:
        """The memory of a compiled graph of a component, about; 0 if the manifest does not have it."""
        component = next((item for item in self._manifest.components if item.name == name), None)
        return 0 if component is None else int(_GROWTH.get(component.precision, 4.0) * component.bytes)

    def _has_room(self, name: str, wanted: _Wanted) -> bool:
        """Whether there is enough memory for a graph of fixed shapes. Always true for buckets that the operator set."""
        bucket, part, needed = wanted.bucket, wanted.part, self._bytes(name)
        if needed == 0 or (self._asked is not None and bucket in self._asked):
            return True
        left = cpu.available_memory()
        if needed > left / part:
            _log.log(
                logging.WARNING if part == _PART and bucket.rows > 1 else logging.INFO,
                "%s: no graph for %s, which could take %.1f of the available %.1f GiB; --buckets %s forces it",
                *(name, bucket, needed / 2**30, left / 2**30, bucket),
            )
        return needed <= left / part


def runners(
    execution: Execution,
    threads: int,
    bundle: Path,
    manifest: Manifest,
    open_graph: Open,
    arithmetic: str = "f32",
    cache: Path | None = None,
) -> Make:
    """A Make of runners for OpenVINO, which must be the chosen provider (providers.py). Compiled graphs are kept in `cache`."""
    folder = cache / "openvino" / importlib.metadata.version("openvino") if cache is not None else None
    return Graphs(execution, bundle, manifest, open_graph, Compiler(threads, arithmetic, folder))


def arithmetic(execution: Execution) -> str:
    """OpenVINO's precision on this machine: "bf16" if the CPU multiplies it and `execution` allows it, else "f32"."""
    able = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if execution.arithmetic == "auto" and able and cpu.multiplies_bfloat16() else "f32"


def prune(folder: Path, most: int = _MOST_CACHED) -> None:
    """Deletes the oldest compiled graphs in `folder` until they take at most `most` bytes."""
    with contextlib.suppress(OSError):
        files = sorted(folder.rglob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True)
        kept = 0
        for path in files:
            kept += path.stat().st_size
            if kept > most:
                path.unlink(missing_ok=True)


def _port(item: Any) -> Port:
    name, kind = item.get_any_name(), item.element_type.get_type_name()
    axes = enumerate(item.get_partial_shape())
    shape = tuple(axis.get_length() if axis.is_static else f"{name}.{index}" for index, axis in axes)
    return Port(name, _TYPES.get(kind, kind), shape)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
