"""Which execution providers work on this machine, and why the others do not.

ONNX Runtime lists every provider that its wheel was built with, and loads a provider's libraries only when a session is opened.
So each one is probed here without a session: wheel, driver, device, libraries. Results are cached for the life of the process.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from img2img_server.errors import BundleError
from img2img_server.runtime.execution import PROVIDERS
from img2img_server.support.distribution import install_hint

FULL_NAMES = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""ONNX Runtime's names of those of execution.PROVIDERS that are its own. OpenVINO runs without it."""

ERRORS = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
"""ONNX Runtime's errors. They have no common base class."""

_LOADED_LATER = ("libcudnn.so.9",)
"""Libraries that the CUDA provider loads at the first convolution, without being linked to them."""
_TENSORRT = "libnvinfer.so.10"

_TITLES = {"tensorrt": "TensorRT", "cuda": "CUDA", "openvino": "OpenVINO", "cpu": "CPU"}


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of probing a provider: `detail` is the device or version, `problem` why it cannot be used, or ""."""

    name: str
    detail: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return f"{_TITLES[self.name]}: {self.problem or self.detail}"


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """The provider to use, and the better ones that cannot be used."""

    provider: str
    detail: str = ""
    declined: tuple[Probe, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(map(str, self.declined))
        used = f"{_TITLES[self.provider]} ({self.detail})" if self.detail else _TITLES[self.provider]
        return f"{used}; {reasons}" if reasons else used


def choose(asked: str) -> ProviderChoice:
    """Chooses the provider for the setting `asked`: one of execution.PROVIDERS, or "auto" for the best that can be used.

    Raises BundleError with the reason if a provider that is set by name cannot be used.
    """
    if asked != "auto":
        found = probe(asked)
        if found.problem:
            raise BundleError(f"provider '{asked}' cannot be used: {found.problem}")
        return ProviderChoice(asked, found.detail)
    declined: list[Probe] = []
    for found in map(probe, PROVIDERS):
        if not found.problem:
            return ProviderChoice(found.name, found.detail, tuple(declined))
        declined.append(found)
    raise BundleError("no provider can be used: " + "; ".join(map(str, declined)))


def check(asked: str) -> None:
    """Raises BundleError if no model can run on the provider `asked`, so that the server fails at start."""
    # On a machine with a GPU, torch models may run on it in PyTorch even if ONNX Runtime cannot use it.
    if asked not in ("cuda", "tensorrt") or _nvidia_device()[1]:
        choose(asked)


@functools.cache
def probe(name: str) -> Probe:
    """Checks whether the provider `name` can be used. Does not open a session and does not raise; results are cached."""
    if name == "openvino":
        return _probe_openvino()
    if FULL_NAMES[name] not in onnxruntime.get_available_providers():
        return Probe(name, problem=f"this ONNX Runtime ({onnxruntime.__version__}) is built without it")
    if name == "cpu":
        return Probe(name)
    return _probe_gpu(name)


def _probe_openvino() -> Probe:
    if importlib.util.find_spec("openvino") is None:
        return Probe("openvino", problem=f"it is not installed ({install_hint('openvino')})")
    try:
        devices = openvino_core().available_devices
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Probe("openvino", problem=f"it does not load: {_first_line(error)}")
    if "CPU" not in devices:
        return Probe("openvino", problem="it does not support this CPU")
    return Probe("openvino", detail=importlib.metadata.version("openvino"))


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, one for the process. The first call is the probe's. Raises what `load_openvino` and the core raise."""
    return load_openvino().Core()


def load_openvino() -> Any:
    """Imports the package openvino without openvino_telemetry, which its converter of models would use. Raises ImportError."""
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # makes its import fail
    try:
        return importlib.import_module("openvino")
    finally:
        if hidden:
            sys.modules.pop("openvino_telemetry", None)


def _probe_gpu(name: str) -> Probe:
    """Probes CUDA or TensorRT. TensorRT needs CUDA's libraries and its own."""
    device, problem = _nvidia_device()
    if not problem:
        # Finds libraries that pip installed as nvidia-* packages.
        onnxruntime.preload_dlls()
        capi = Path(onnxruntime.__file__).parent / "capi"
        names = ["cuda"] if name == "cuda" else ["cuda", "tensorrt"]
        preload_tensorrt()
        own = list(_LOADED_LATER) if name == "cuda" else [*_LOADED_LATER, _TENSORRT]
        problem = missing_library([capi / f"libonnxruntime_providers_{item}.so" for item in names], own)
    return Probe(name, detail="" if problem else device, problem=problem)


def preload_tensorrt() -> None:
    """Loads TensorRT's library from NVIDIA's wheel (tensorrt-cu13-libs), which is not on the loader's search path."""
    found = importlib.util.find_spec("tensorrt_libs")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / _TENSORRT
        if path.is_file():
            with contextlib.suppress(OSError):  # `missing_library` reports it
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def missing_library(providers: Sequence[Path], others: Sequence[str] = ()) -> str:
    """Checks that `others` and the dependencies of the libraries `providers` load. Returns the first problem, "" if none.

    ONNX Runtime's provider libraries are read, not loaded: one that is loaded by anything but ONNX Runtime crashes the process.
    """
    for library in providers:
        try:
            needed = needed_libraries(library)
        except (OSError, ValueError) as error:
            return f"{library.name} cannot be read: {_first_line(error)}"
        others = [*others, *(item for item in needed if not item.startswith("libonnxruntime"))]
    for item in others:
        try:
            ctypes.CDLL(item)
        except OSError as error:
            return f"a library does not load: {_first_line(error)}"
    return ""


def needed_libraries(path: Path) -> list[str]:
    """The names of the libraries that the ELF file `path` is linked to, such as "libcublas.so.13", in the file's order.

    Raises OSError if it cannot be read, ValueError if it is not a shared library.
    """
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        try:
            dynamic = next(item for item in ELFFile(file).iter_segments() if isinstance(item, DynamicSegment))
            return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
        except Exception as error:
            raise ValueError(f"{path.name} is not a complete shared library") from error


def _nvidia_device() -> tuple[str, str]:
    """The name of the driver's first GPU, and why there is none, or "". Not yet run on a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", "there is no NVIDIA driver (libcuda.so.1)"
    count, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    if code := driver.cuInit(0):
        return "", f"the NVIDIA driver does not start (CUDA error {code})"
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return "", "the NVIDIA driver has no device"
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace"), ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
