"""OpenVINO's execution provider, a plugin of ONNX Runtime: sessions of fixed shapes for common sizes, one for all others.

On CPUs with AMX it computes in bfloat16, about three times as fast as ONNX Runtime's CPU provider in fp32; on others in float32.
The accuracy check (accuracy_check.py) decides whether bfloat16 may be used. Graphs that OpenVINO does not support run on ONNX
Runtime's CPU provider, and the log says why.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from img2img_server.bundle.manifest import BODY_NAME, HEAD_NAME, Manifest
from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Bucket, Execution
from img2img_server.runtime.onnx.graph_sizes import Shapes, Sizes, shapes_of, try_on_zeros
from img2img_server.runtime.onnx.providers import openvino_device
from img2img_server.runtime.onnx.runners import HostRunner, Make, Runner, SplitGraphRunner
from img2img_server.runtime.onnx.sessions import Open, SessionOptions

_log = logging.getLogger(__name__)

_GROWTH = {"fp32": 1.1, "fp16": 4.0, "bf16": 4.0}
"""Memory of a session as a multiple of its weights' bytes: OpenVINO keeps a copy in its kernels' layout, and a float32 copy if
the file has less. Measured with Stable Diffusion 1.5's UNet: 3.4 GiB of private memory in fp32 (3.2 GiB of weights, whose mapped
file all sessions share), 6.5 GiB in fp16 (1.6 GiB of weights)."""


class BucketRunner:
    """A graph with sessions of fixed shapes, and one session for all other shapes."""

    def __init__(self, any_shape: Runner, fixed: Mapping[Shapes, Runner]) -> None:
        self._any_shape = any_shape
        self._fixed = dict(fixed)
        self.inputs: Sequence[Any] = any_shape.inputs
        self.outputs: Sequence[Any] = any_shape.outputs
        self._names = [item.name for item in self.inputs]

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph on CPU tensors, in the session of their shapes, if there is one."""
        shapes = tuple(tuple(feed[name].shape) for name in self._names)
        return self._fixed.get(shapes, self._any_shape).run(feed)


class Sessions:
    """Makes the runners of a bundle's graphs (a Make, see runners.py). `arithmetic` is OpenVINO's, "f32" or "bf16"."""

    def __init__(
        self, execution: Execution, threads: int, bundle: Path, manifest: Manifest, open_graph: Open, arithmetic: str
    ) -> None:
        self._sizes = Sizes(bundle)
        native = (self._sizes.native,) if self._sizes.native is not None else ()
        self._asked = execution.buckets is not None
        self._buckets = native if execution.buckets is None else execution.buckets
        self._manifest = manifest
        self._open = open_graph
        self._threads = threads
        self._arithmetic = arithmetic

    def __call__(self, name: str, graph: Path) -> Runner:
        """Makes the runner of the component `name` on OpenVINO, or else on the CPU provider. Raises BundleError if both fail."""
        problem = self._refusal(name)
        if not problem:
            try:
                return self._in_parts(name, graph)
            except BundleError as error:
                problem = str(error).splitlines()[0]
        _log.warning("%s: runs on ONNX Runtime's CPU provider instead of OpenVINO: %s", name, problem)
        return HostRunner(self._open(graph, SessionOptions("cpu", self._threads)))

    def _refusal(self, name: str) -> str:
        component = next((item for item in self._manifest.components if item.name == name), None)
        if component is not None and component.precision == "int8":
            # Not tried: some int8 graphs crash the process on a CPU with AMX.
            return "int8 graphs are not faster in OpenVINO's provider, and some crash it"
        return ""

    def _in_parts(self, name: str, graph: Path) -> Runner:
        """In bfloat16 the CPU provider computes a denoiser's timestep embedding, if the bundle has the split graph."""
        head, body = graph.with_name(HEAD_NAME), graph.with_name(BODY_NAME)
        if self._arithmetic != "bf16" or not {f"{name}/{HEAD_NAME}", f"{name}/{BODY_NAME}"} <= set(self._manifest.files):
            return self._ready(name, graph)
        return SplitGraphRunner(HostRunner(self._open(head, SessionOptions("cpu", self._threads))), self._ready(name, body))

    def _ready(self, name: str, graph: Path) -> Runner:
        any_shape = self._session(graph, {})
        trial = self._sizes.axes(name, any_shape.inputs, self._sizes.trial())
        if trial is not None:
            try_on_zeros(graph, any_shape, trial)
        fixed: dict[Shapes, Runner] = {}
        for bucket in self._buckets if not name.startswith("text_encoder") else ():
            axes = self._sizes.axes(name, any_shape.inputs, bucket)
            if axes and self._has_room(name, bucket):
                shapes = shapes_of(any_shape.inputs, axes)
                fixed[shapes] = self._session(graph, axes)
                try_on_zeros(graph, fixed[shapes], axes)
        return BucketRunner(any_shape, fixed) if fixed else any_shape

    def _has_room(self, name: str, bucket: Bucket) -> bool:
        """Whether there is enough memory for a session of fixed shapes. Always true for buckets that the operator set."""
        component = next((item for item in self._manifest.components if item.name == name), None)
        if component is None or self._asked:
            return True
        needed = _GROWTH.get(component.precision, 4.0) * component.bytes
        left = cpu.available_memory()
        if needed > left / 2:
            _log.warning(
                "%s: no session for %s, which could take %.1f of the available %.1f GiB; --buckets %s forces it",
                *(name, bucket, needed / 2**30, left / 2**30, bucket),
            )
        return needed <= left / 2

    def _session(self, graph: Path, axes: Mapping[str, int]) -> Runner:
        settings = (("load_config", load_config(self._arithmetic, self._threads)),)
        options = SessionOptions(
            "openvino", self._threads, provider_options=settings, dimensions=tuple(axes.items()), arithmetic=self._arithmetic
        )
        return HostRunner(self._open(graph, options))


def runners(
    execution: Execution, threads: int, bundle: Path, manifest: Manifest, open_graph: Open, arithmetic: str = "f32"
) -> Make:
    """A Make of runners for OpenVINO, which must be the chosen provider (providers.py)."""
    return Sessions(execution, threads, bundle, manifest, open_graph, arithmetic)


def arithmetic(execution: Execution) -> str:
    """OpenVINO's precision on this machine: "bf16" if the CPU has AMX and `execution` allows it, else "f32"."""
    device = openvino_device()
    able = device is not None and "BF16" in device.ep_metadata.get("OPTIMIZATION_CAPABILITIES", "").split()
    return "bf16" if execution.arithmetic == "auto" and able and has_amx() else "f32"


def has_amx(information: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has AMX for bfloat16. Without it bfloat16 is emulated, or hardly faster than float32."""
    try:
        lines = information.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))


def load_config(arithmetic: str, threads: int) -> str:
    """OpenVINO's properties of its CPU device as JSON for the plugin: one call at a time, on all `threads`."""
    properties = {
        "INFERENCE_PRECISION_HINT": arithmetic,
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return json.dumps({"CPU": properties})
