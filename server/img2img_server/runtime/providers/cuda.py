"""CUDA: the options of its sessions, and the runners that keep tensors on the GPU.

The options are documented in ONNX Runtime's cuda_execution_provider_info.cc. tests/cuda runs the provider on fake CUDA libraries.
"""

import logging
from pathlib import Path

import torch

from img2img_server.errors import BundleError
from img2img_server.runtime.common.device_copy import device_stream, enter_stream
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.onnx.graph_sizes import Sizes, try_on_zeros
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

    def opened(name: str, graph: Path, graphs: bool) -> Runner:
        options = provider_options(execution, stream=stream, graphs=graphs)
        session = open_graph(graph, SessionOptions("cuda", threads, provider_options=options, recordable=graphs))
        if stream is None:
            return HostRunner(session)
        replays = Replays(session, device, graph.parent.name) if graphs else None
        return DeviceRunner(session, device, enter_stream, replays, bundle_of(name, graph))

    def recordable(name: str, graph: Path) -> Runner | None:
        try:
            return opened(name, graph, graphs=True)
        except BundleError as error:
            # Usually some of its tensors are copied between CPU and GPU. For other errors, opening it without recording fails
            # again.
            _log.warning("%s cannot be recorded as a CUDA graph; export the bundle again: %s", graph, last_line(error))
            return None

    def make(name: str, graph: Path) -> Runner:
        runner = recordable(name, graph) if execution.cuda_graphs and stream is not None else None
        runner = runner or opened(name, graph, graphs=False)
        if sizes is not None and (axes := sizes.axes(name, runner.inputs, sizes.trial())) is not None:
            try_on_zeros(graph, runner, axes, device)
        return runner

    return make
