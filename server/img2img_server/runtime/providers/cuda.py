"""CUDA: the options of its sessions, and the runners that keep tensors on the GPU.

The options are documented in ONNX Runtime's cuda_execution_provider_info.cc. tests/cuda runs the provider on fake CUDA libraries.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from img2img_server.errors import BundleError
from img2img_server.runtime.common.device_copy import device_stream, enter_stream
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.graph_sizes import Sizes, try_on_zeros
from img2img_server.runtime.onnx.graph_weights import SharedWeights, Weights
from img2img_server.runtime.onnx.runners import HostRunner, Make, Runner, bundle_of
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, last_line
from img2img_server.runtime.providers.cuda_graphs import Replays
from img2img_server.runtime.providers.device_runner import DeviceRunner

_log = logging.getLogger(__name__)

_ALL_ATTENTION = 1 + 2 + 4 + 8 + 16
"""The bits of `sdpa_kernel`: flash, memory-efficient, TensorRT's fused, cuDNN's and plain attention."""
_CUDNN_ATTENTION = 8


def tensor_device() -> str:
    """Where CUDA's runners expect tensors: "cuda", or "cpu" if PyTorch has no CUDA."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def provider_options(
    execution: Execution,
    *,
    stream: int | None = None,
    graphs: bool = False,
    cudnn_attention: bool | None = None,
    tf32: bool | None = None,
) -> tuple[tuple[str, str], ...]:
    """The CUDA provider's options for one session.

    `stream` is the address of the CUDA stream that it shares with torch, None for its own; `graphs` enables recording calls, and
    needs a stream, because the default stream cannot be recorded. `cudnn_attention` and `tf32` are for benchmarks: with None,
    ONNX Runtime chooses the attention (cuDNN's on compute capability 9 and later, unless the environment has
    ORT_ENABLE_CUDNN_FLASH_ATTENTION=0), and TF32 is allowed unless `execution` requires fp32.

    `prefer_nhwc` is never set: it moves a plain graph's shape arithmetic to the GPU, with copies of single numbers in both
    directions, and has no bfloat16 kernels; the convolutions of fused graphs are in NHWC already.
    """
    assert stream is not None or not graphs, "the default stream cannot be recorded"
    options = {
        # Heuristic mode A of cuDNN; EXHAUSTIVE is its mode B, and searches nothing either (conv.cc).
        "cudnn_conv_algo_search": "HEURISTIC",
        # kSameAsRequested fragments memory: each new shape allocates while requests are served.
        "arena_extend_strategy": "kNextPowerOfTwo",
        "use_tf32": str(int(execution.arithmetic != "fp32" if tf32 is None else tf32)),
    }
    if execution.gpu_memory is not None:
        options["gpu_mem_limit"] = str(execution.gpu_memory)
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    if graphs:
        options["enable_cuda_graph"] = "1"
    if cudnn_attention is not None:
        options["sdpa_kernel"] = str(_ALL_ATTENTION if cudnn_attention else _ALL_ATTENTION - _CUDNN_ATTENTION)
    return tuple(options.items())


def runners(execution: Execution, threads: int, open_graph: Open, sizes: Sizes | None = None) -> Make:
    """A Make of runners for CUDA, all on the process's stream; `open_graph` opens the sessions.

    If `sizes` are given, each graph runs once on zeros, because some kernels fail only when they run. If PyTorch has no CUDA,
    tensors are copied through the host in every call.
    """
    device = tensor_device()
    if device == "cpu":
        _log.warning("PyTorch has no CUDA: tensors are copied to the GPU and back in every call: install a PyTorch with CUDA")
    stream = device_stream().cuda_stream if device == "cuda" else None

    if stream is not None:
        # So this thread's allocations and copies are ordered before other work on the stream.
        enter_stream()
    shared = None if stream is None else SharedWeights(device)
    return _Runners(execution, threads, open_graph, sizes, device, stream, shared).make


@dataclass(frozen=True, slots=True)
class _Runners:
    """Makes runners. Without a `stream` and `shared` weights tensors are copied through the host."""

    execution: Execution
    threads: int
    open_graph: Open
    sizes: Sizes | None
    device: str
    stream: int | None
    shared: SharedWeights | None

    def make(self, name: str, graph: Path) -> Runner:
        """Opens a graph, over weights that others use, too, if it does. One that is offloaded is opened on the CPU. Raises
        BundleError."""
        if self.execution.offloads(name):
            return HostRunner(self.open_graph(graph, SessionOptions("cpu", self.threads, lean=True)))
        weights = {} if self.shared is None else self.shared.of(graph)
        try:
            runner = self._best(name, graph, weights)
        except BundleError as error:
            if not weights:
                raise
            _log.warning("%s is opened with weights of its own: %s", graph, last_line(error))
            runner = self._best(name, graph, {})
        if self.sizes is not None and (axes := self.sizes.axes(name, runner.inputs, self.sizes.trial())) is not None:
            try_on_zeros(graph, runner, axes, self.device)
        return runner

    def _best(self, name: str, graph: Path, weights: Weights) -> Runner:
        recorded = self._recordable(name, graph, weights) if self.execution.cuda_graphs and self.stream is not None else None
        return recorded or self._opened(name, graph, weights, graphs=False)

    def _recordable(self, name: str, graph: Path, weights: Weights) -> Runner | None:
        try:
            return self._opened(name, graph, weights, graphs=True)
        except BundleError as error:
            # Usually some of its tensors are copied between CPU and GPU. For other errors, opening it without recording fails
            # again.
            _log.warning("%s cannot be recorded as a CUDA graph; export the bundle again: %s", graph, last_line(error))
            return None

    def _opened(self, name: str, graph: Path, weights: Weights, *, graphs: bool) -> Runner:
        options = SessionOptions(
            "cuda",
            self.threads,
            provider_options=provider_options(self.execution, stream=self.stream, graphs=graphs),
            recordable=graphs,
            weights=tuple(weights.items()),
        )
        session = self.open_graph(graph, options)
        if self.stream is None:
            return HostRunner(session)
        replays = Replays(session, self.device, graph.parent.name) if graphs else None
        return DeviceRunner(session, self.device, enter_stream, replays, bundle_of(name, graph), weights)
