"""ONNX Runtime sessions: which execution provider runs a graph, decided explicitly.

ONNX Runtime's Python wrapper falls back silently when a provider does not load: it drops the options or lands on the CPU
with a log line. So the provider list is built here explicitly, and every session is asked what it really got.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from img2img_server.errors import BundleError
from img2img_server.runtime.onnx.providers import ERRORS, FULL_NAMES, openvino_device

_WARNING, _ERROR, _FATAL = 2, 3, 4
"""ONNX Runtime's log levels."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to run graphs.

    `provider` is one of execution.PROVIDERS; `provider_options` are settings of it, by ONNX Runtime's names. `threads` is how
    many CPU threads one call may use. `dimensions` gives named axes of the graph's inputs their size: where all have one the
    session is static, and takes that size only. A `lean` session reads its weights from the mapped file and keeps nothing from
    call to call: it takes little memory, and is slower. `arithmetic` is for the log only: what the session computes in, if
    that is not the graph's own. `recordable` says that `provider_options` ask for CUDA graphs.
    """

    provider: str = "cpu"
    threads: int = 1
    lean: bool = False
    provider_options: tuple[tuple[str, str], ...] = ()
    dimensions: tuple[tuple[str, int], ...] = ()
    arithmetic: str = ""
    recordable: bool = False


Open = Callable[[Path, SessionOptions], onnxruntime.InferenceSession]
"""Opens an ONNX file."""


def provider_list(options: SessionOptions) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session, in order of preference, each with its settings.

    A GPU's list ends with the CPU, for nodes that it lacks; TensorRT's has CUDA between. OpenVINO, a plugin, is in no list:
    it is added by its device. The options of GPUs are not yet run on one.
    """
    cpu: tuple[str, dict[str, str]] = (FULL_NAMES["cpu"], {})
    own = dict(options.provider_options)
    # DEFAULT takes a slow algorithm where the fastest wants more memory than it may have.
    cuda = {"cudnn_conv_algo_search": "HEURISTIC"}
    return {
        "cpu": [cpu],
        "cuda": [(FULL_NAMES["cuda"], cuda | own), cpu],
        "tensorrt": [(FULL_NAMES["tensorrt"], own), (FULL_NAMES["cuda"], cuda), cpu],
    }[options.provider]


def open_session(graph: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
    """Opens the ONNX file `graph`. Raises BundleError if the session runs on another provider than requested."""
    session_options = _session_options(options)
    arguments: dict[str, Any] = {}
    if options.provider == "openvino":
        device = openvino_device()
        if device is None:
            raise BundleError(f"{graph} was to run on OpenVINO, whose plugin has no device here")
        session_options.add_provider_for_devices([device], dict(options.provider_options))
    else:
        if options.provider != "cpu":
            onnxruntime.preload_dlls()
        wanted = provider_list(options)
        arguments = {"providers": [name for name, _ in wanted], "provider_options": [settings for _, settings in wanted]}
    try:
        session = onnxruntime.InferenceSession(str(graph), session_options, enable_fallback=0, **arguments)
    except (*ERRORS, RuntimeError) as error:
        # What fails in a GPU provider's constructor, and options that it does not know, are plain RuntimeErrors.
        raise BundleError(f"{graph} does not open: {error}") from error
    session.disable_fallback()
    if session.get_providers()[0] != FULL_NAMES[options.provider]:
        raise BundleError(f"{graph} was to run on {FULL_NAMES[options.provider]}, ONNX Runtime gave {session.get_providers()}")
    return session


def describe(session: Any) -> dict[str, int]:
    """How many nodes of the graph run on which provider, by its name in execution.PROVIDERS, the most first.

    Empty if the session was not opened by `open_session`, and so does not know.
    """
    short = {full: name for name, full in FULL_NAMES.items()}
    counts: Counter[str] = Counter()
    try:
        for part in session.get_provider_graph_assignment_info():
            counts[short.get(part.ep_name, part.ep_name)] += len(part.get_nodes())
    except (*ERRORS, AttributeError):
        return {}
    return dict(counts.most_common())


def last_line(error: Exception) -> str:
    """The end of ONNX Runtime's message: what was wrong, without where in its source that was found."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _severity(options: SessionOptions) -> int:
    """Errors only. A graph that cannot be recorded is opened again, so that error is not shown; then its copies are counted."""
    return _FATAL if options.recordable else _WARNING if options.provider == "cuda" else _ERROR


def _session_options(options: SessionOptions) -> onnxruntime.SessionOptions:
    result = onnxruntime.SessionOptions()
    result.intra_op_num_threads = options.threads
    result.inter_op_num_threads = 1
    result.log_severity_level = _severity(options)
    for name, size in options.dimensions:
        result.add_free_dimension_override_by_name(name, size)
    if options.recordable:
        # It asks for one block of memory for a whole call; if that fails, as each call again, the recording is lost.
        result.enable_mem_pattern = False
    if options.lean:
        result.enable_cpu_mem_arena = result.enable_mem_pattern = False
        result.add_session_config_entry("session.disable_prepacking", "1")
        # Higher levels copy the weights of convolutions into another layout.
        result.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Each session has threads of its own, which go on spinning for a while when its call is over: then those of the next
    # session's call, the VAE's after the UNet's, share the cores with them and take twice as long.
    result.add_session_config_entry("session.force_spinning_stop", "1")
    # For `describe`.
    result.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return result
