"""ONNX Runtime sessions: which execution provider runs a graph, decided openly.

ONNX Runtime's Python wrapper falls back silently when a provider does not load: it drops the options or lands on the CPU
with a log line. So the provider list is built here explicitly, and every session is asked what it really got.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from img2img_server.errors import BundleError

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
"""The providers that can be asked for by name, best first, and their names in ONNX Runtime."""


_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
"""What ONNX Runtime raises for a graph that it cannot run. They have no base of their own."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to run graphs. `provider` is a key of PROVIDERS; `threads` is how many CPU threads one call may use; a `lean` session
    reads its weights from the mapped file and keeps nothing from call to call: it takes little memory, and is slower."""

    provider: str = "cpu"
    threads: int = 1
    lean: bool = False


Open = Callable[[Path, SessionOptions], onnxruntime.InferenceSession]
"""Opens an ONNX file."""


def resolve_provider(provider: str) -> str:
    """Turns "auto" into the best provider that is there.

    Raises BundleError where a provider is asked for by name and ONNX Runtime does not have it.
    """
    available = onnxruntime.get_available_providers()
    there = [name for name, full_name in PROVIDERS.items() if full_name in available]
    chosen = there[0] if provider == "auto" else provider
    if chosen not in there:
        raise BundleError(f"provider '{provider}' is not in this ONNX Runtime, which has {', '.join(there)}")
    return chosen


def provider_list(options: SessionOptions) -> list[tuple[str, dict[str, Any]]]:
    """The providers of a session, in order of preference. CUDA's list ends with the CPU, for nodes that CUDA lacks.

    CUDA's options are not yet run on a GPU.
    """
    cpu: tuple[str, dict[str, Any]] = (PROVIDERS["cpu"], {})
    if options.provider == "cpu":
        return [cpu]
    return [(PROVIDERS["cuda"], {"cudnn_conv_algo_search": "HEURISTIC"}), cpu]


def open_session(graph: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
    """Opens the ONNX file `graph`. Raises BundleError where the session runs on another provider than it was told to."""
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    session_options.log_severity_level = 3
    if options.lean:
        session_options.enable_cpu_mem_arena = session_options.enable_mem_pattern = False
        session_options.add_session_config_entry("session.disable_prepacking", "1")
        # What comes after it lays out the weights of convolutions anew.
        session_options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Each session has threads of its own, which go on spinning for a while when its call is over: then those of the next
    # session's call, the VAE's after the UNet's, share the cores with them and take twice as long.
    session_options.add_session_config_entry("session.force_spinning_stop", "1")
    if options.provider == "cuda":
        onnxruntime.preload_dlls()
    wanted = provider_list(options)
    try:
        session = onnxruntime.InferenceSession(
            str(graph),
            session_options,
            providers=[name for name, _ in wanted],
            provider_options=[settings for _, settings in wanted],
        )
    except _ERRORS as error:
        raise BundleError(f"{graph} does not open: {error}") from error
    session.disable_fallback()
    if session.get_providers()[0] != wanted[0][0]:
        raise BundleError(f"{graph} was to run on {wanted[0][0]}, ONNX Runtime gave {session.get_providers()}")
    return session
