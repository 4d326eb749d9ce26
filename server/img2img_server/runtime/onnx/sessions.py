"""Opens ONNX Runtime sessions on an explicit execution provider.

If a provider does not load, ONNX Runtime's Python wrapper silently drops its options or falls back to the CPU with a log line. So
the list of providers is built here, and each session's actual provider is checked.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from img2img_server.errors import BundleError
from img2img_server.runtime.common import cpu
from img2img_server.runtime.onnx.providers import ERRORS, FULL_NAMES

_WARNING, _ERROR, _FATAL = 2, 3, 4
"""ONNX Runtime's log levels."""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How to run a graph.

    `provider` is one of execution.PROVIDERS; `provider_options` are its options, by ONNX Runtime's names. `threads` is the number
    of CPU threads of one call. `dimensions` fixes named axes of the graph's inputs; if all are fixed, the session is static and
    accepts only those sizes. A `lean` session reads its weights from the mapped file and keeps nothing between calls: it takes
    little memory and is slower.
    `recordable` says that `provider_options` enable CUDA graphs. `weights` are tensors on the provider's device, by name, which
    the session uses instead of copies of its own; they must outlive it and equal those of the file.
    """

    provider: str = "cpu"
    threads: int = 1
    lean: bool = False
    provider_options: tuple[tuple[str, str], ...] = ()
    dimensions: tuple[tuple[str, int], ...] = ()
    recordable: bool = False
    weights: tuple[tuple[str, Any], ...] = field(default=(), compare=False, repr=False)


_CHANGING = ["TransposeOptimizer"]
"""Optimizers that may change a weight in place. They read the file's weights, so a session with `weights` would not notice."""
Open = Callable[[Path, SessionOptions], onnxruntime.InferenceSession]
"""Opens an ONNX file."""


def provider_list(options: SessionOptions) -> list[tuple[str, dict[str, str]]]:
    """The providers of a session, in order of preference, each with its options.

    A GPU's list ends with the CPU, for nodes that the GPU does not support; TensorRT's has CUDA in between. The options of
    TensorRT are not yet run on a GPU.
    """
    on_cpu: tuple[str, dict[str, str]] = (FULL_NAMES["cpu"], {})
    own = dict(options.provider_options)
    # DEFAULT takes a slow algorithm if the fastest one needs more memory than is allowed.
    cuda = {"cudnn_conv_algo_search": "HEURISTIC"}
    return {
        "cpu": [on_cpu],
        "cuda": [(FULL_NAMES["cuda"], cuda | own), on_cpu],
        "tensorrt": [(FULL_NAMES["tensorrt"], own), (FULL_NAMES["cuda"], cuda), on_cpu],
    }[options.provider]


def open_session(graph: Path, options: SessionOptions) -> onnxruntime.InferenceSession:
    """Opens the ONNX file `graph`. Raises BundleError if the session runs on another provider than requested."""
    session_options = _session_options(options)
    if options.provider != "cpu":
        onnxruntime.preload_dlls()
    wanted = provider_list(options)
    arguments: dict[str, Any] = {"providers": [name for name, _ in wanted], "provider_options": [entry for _, entry in wanted]}
    # ONNX Runtime refuses values that own their memory; those from DLPack do not.
    weights = {name: onnxruntime.OrtValue.from_dlpack(tensor) for name, tensor in options.weights}
    for name, value in weights.items():
        session_options.add_initializer(name, value)
    if weights:
        arguments["disabled_optimizers"] = _CHANGING
    try:
        session = onnxruntime.InferenceSession(str(graph), session_options, enable_fallback=0, **arguments)
    except (*ERRORS, RuntimeError) as error:
        # Failures in a GPU provider's constructor and unknown options are plain RuntimeErrors.
        raise BundleError(f"{graph} does not open: {error}") from error
    session.disable_fallback()
    if session.get_providers()[0] != FULL_NAMES[options.provider]:
        raise BundleError(f"{graph} was to run on {FULL_NAMES[options.provider]}, ONNX Runtime used {session.get_providers()}")
    return session


def describe(session: Any) -> dict[str, int]:
    """The number of nodes that run on each provider, by its name in execution.PROVIDERS, in descending order.

    Empty if the session was not opened by `open_session`, which enables this information.
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
    """The last line of ONNX Runtime's message: the problem, without the location in its source."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@functools.cache
def _share_arena() -> None:
    """Makes one arena for all sessions on the CPU. Else each of a model's graphs keeps what its largest call took, though one
    graph runs at a time: for the demo model at 8 guided requests 130 MB a model, with this 5 MB from the second model on."""
    memory = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({}))


def _severity(options: SessionOptions) -> int:
    """The log level: errors; only fatal ones for a recordable session, which is opened again if it fails; warnings for other CUDA
    sessions, which report copies."""
    return _FATAL if options.recordable else _WARNING if options.provider == "cuda" else _ERROR


def _session_options(options: SessionOptions) -> onnxruntime.SessionOptions:
    result = onnxruntime.SessionOptions()
    result.intra_op_num_threads = options.threads
    result.inter_op_num_threads = 1
    result.log_severity_level = _severity(options)
    for name, size in options.dimensions:
        result.add_free_dimension_override_by_name(name, size)
    if options.recordable:
        # A memory pattern allocates one block for a whole call; if that allocation fails, the recording is lost.
        result.enable_mem_pattern = False
    if options.provider == "cpu" and not options.lean:
        # Weights are kept apart, so that an unloaded model gives its memory back.
        _share_arena()
        result.add_session_config_entry("session.use_env_allocators", "1")
        result.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if options.lean:
        result.enable_cpu_mem_arena = result.enable_mem_pattern = False
        result.add_session_config_entry("session.disable_prepacking", "1")
        # Higher levels copy the weights of convolutions into another layout.
        result.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    # Each session has its own threads, which spin for a while after a call and would compete with the next session's call: the
    # VAE's call after the UNet's took twice as long.
    result.add_session_config_entry("session.force_spinning_stop", "1")
    if not cpu.sums_int8_exactly():
        # Then ONNX Runtime uses kernels that do not overflow. With VNNI they take 1.7 times as long (demo model's UNet in int8).
        result.add_session_config_entry("session.x64quantprecision", "1")
    # For `describe`.
    result.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return result
