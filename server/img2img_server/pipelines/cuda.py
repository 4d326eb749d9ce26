"""CUDA: the options of its sessions, and the runners that keep tensors on the GPU. Not yet run on a GPU.

The options' names and what they do are those of ONNX Runtime's cuda_execution_provider_info.cc.
"""

import functools
import logging
from pathlib import Path

import torch

from img2img_server.errors import BundleError
from img2img_server.execution import Execution
from img2img_server.pipelines.device_runner import DeviceRunner
from img2img_server.pipelines.graph_replay import Replays
from img2img_server.pipelines.runners import HostRunner, Make, Runner
from img2img_server.pipelines.sessions import Open, SessionOptions

_log = logging.getLogger(__name__)

_ALL_ATTENTION = 1 + 2 + 4 + 8 + 16
"""Flash, memory-efficient, TensorRT's fused, cuDNN's and the plain one: the bits of `sdpa_kernel`."""
_CUDNN_ATTENTION = 8


def tensor_device() -> str:
    """Where CUDA's runners want tensors: "cuda", or "cpu" beside a PyTorch that has no CUDA."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def provider_options(
    execution: Execution,
    *,
    fused: bool,
    stream: int | None = None,
    graphs: bool = False,
    static: bool = False,
    cudnn_attention: bool | None = None,
    tf32: bool | None = None,
) -> tuple[tuple[str, str], ...]:
    """The CUDA provider's options for one session.

    `stream` is the address of the CUDA stream that it shares with torch, None for its own; `graphs` lets it record calls, and
    needs a stream, as what runs on the default one cannot be recorded. A `static` session has one shape, for which the quickest
    convolutions are searched by running them all. A `fused` graph has its convolutions in NHWC already. `cudnn_attention` and
    `tf32` are for measuring; None leaves them to ONNX Runtime, which prefers cuDNN's attention on compute capability 9 and later,
    unless the environment has ORT_ENABLE_CUDNN_FLASH_ATTENTION=0, and allows TF32.
    """
    assert stream is not None or not graphs, "what runs on the default stream cannot be recorded"
    options = {
        "cudnn_conv_algo_search": "EXHAUSTIVE" if static else "HEURISTIC",
        # By powers of two, what comes after 5 GB is 8 GB more.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if not fused:
        options["prefer_nhwc"] = "1"
    if execution.gpu_memory is not None:
        options["gpu_mem_limit"] = str(execution.gpu_memory)
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    if graphs:
        options["enable_cuda_graph"] = "1"
    if cudnn_attention is not None:
        options["sdpa_kernel"] = str(_ALL_ATTENTION if cudnn_attention else _ALL_ATTENTION - _CUDNN_ATTENTION)
    if tf32 is not None:
        options["use_tf32"] = str(int(tf32))
    return tuple(options.items())


def runners(execution: Execution, threads: int, open_graph: Open) -> Make:
    """Readies graphs for CUDA, each opened by `open_graph`, all on one stream of torch's.

    Beside a PyTorch that has no CUDA, tensors go through the host at every call.
    """

    def opened(graph: Path, fused: bool, stream: int | None, graphs: bool) -> Runner:
        options = provider_options(execution, fused=fused, stream=stream, graphs=graphs)
        session = open_graph(graph, SessionOptions("cuda", threads, provider_options=options))
        if stream is None:
            return HostRunner(session)
        return DeviceRunner(session, device, enter, Replays(session, device, graph.parent.name) if graphs else None)

    def make(name: str, graph: Path) -> Runner:
        fused, stream = graph.parent.name != name, stream_address
        if execution.cuda_graphs and stream is not None:
            try:
                return opened(graph, fused, stream, graphs=True)
            except BundleError as error:
                # Most likely some of its nodes are the CPU's. If it is something else, it fails again.
                _log.info("%s is opened without CUDA graphs: %s", name, error)
        return opened(graph, fused, stream, graphs=False)

    device = tensor_device()
    if device == "cpu":
        _log.warning("this PyTorch has no CUDA: tensors are copied to the GPU and back at every call of ONNX Runtime")
        stream_address, enter = None, lambda: None
    else:
        own = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream_address, enter = own.cuda_stream, functools.partial(go_over, own)
    return make


def go_over(stream: torch.cuda.Stream) -> None:
    """Has torch, on this thread, use `stream` from now on, for what follows on what it asked for before.

    So latents and what ONNX Runtime makes of them are asked for in one order, and neither waits for the other.
    """
    current = torch.cuda.current_stream()
    if current != stream:
        stream.wait_stream(current)
        torch.cuda.set_stream(stream)
