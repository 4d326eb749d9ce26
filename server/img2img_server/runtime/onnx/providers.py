"""Which execution providers this machine can really use, and in words why not the others.

ONNX Runtime names every provider that its wheel was built with, there or not, and tries those that do not load only when a
session asks for them. So each is probed here, without a session: the wheel, the driver, the device, the libraries. What is found
is remembered for the life of the process.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
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
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""ONNX Runtime's names of execution.PROVIDERS."""

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
"""What ONNX Runtime raises for what it cannot run. They have no base of their own."""

_LOADED_LATER = ("libcudnn.so.9",)
"""What the CUDA provider loads at the first convolution only, and is linked with nowhere."""
_TENSORRT = "libnvinfer.so.10"

_TITLES = {"tensorrt": "TensorRT", "cuda": "CUDA", "openvino": "OpenVINO", "cpu": "CPU"}
_PLUGIN = "onnxruntime_ep_openvino"
_REGISTRATION = "img2img-openvino"


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found of a provider: `detail` says what would be used, `problem` why it cannot be, or is empty."""

    name: str
    detail: str = ""
    problem: str = ""

    def __str__(self) -> str:
        return f"{_TITLES[self.name]}: {self.problem or self.detail}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The provider that is used, and the better ones that cannot be."""

    provider: str
    detail: str = ""
    declined: tuple[Probe, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(map(str, self.declined))
        used = f"{_TITLES[self.provider]} ({self.detail})" if self.detail else _TITLES[self.provider]
        return f"{used}; {reasons}" if reasons else used


def choose(asked: str) -> Choice:
    """What `asked`, "auto" or one of execution.PROVIDERS, comes to on this machine: for "auto", the best that can be used.

    Raises BundleError with the reason where a provider is asked for by name and cannot be used.
    """
    if asked != "auto":
        found = probe(asked)
        if found.problem:
            raise BundleError(f"provider '{asked}' cannot be used: {found.problem}")
        return Choice(asked, found.detail)
    declined: list[Probe] = []
    for found in map(probe, PROVIDERS):
        if not found.problem:
            return Choice(found.name, found.detail, tuple(declined))
        declined.append(found)
    raise BundleError("no provider can be used: " + "; ".join(map(str, declined)))


def check(asked: str) -> None:
    """Raises BundleError where no model could run on the provider `asked`: better known at start than of each model."""
    # Where there is a GPU, models that are no graphs may run on it in PyTorch, whatever ONNX Runtime can.
    if asked not in ("cuda", "tensorrt") or _nvidia_device()[1]:
        choose(asked)


@functools.cache
def probe(name: str) -> Probe:
    """Looks whether the provider `name` can be used. Makes no session and never raises; a second call is free."""
    if name == "openvino":
        return _probe_openvino()
    if FULL_NAMES[name] not in onnxruntime.get_available_providers():
        return Probe(name, problem=f"this ONNX Runtime ({onnxruntime.__version__}) is built without it")
    if name == "cpu":
        return Probe(name)
    return _probe_gpu(name)


def openvino_device() -> Any:
    """The CPU of OpenVINO's plugin, an onnxruntime.OrtEpDevice, or None where there is none.

    The plugin must have been probed before.
    """
    for device in onnxruntime.get_ep_devices():
        # The plugin's "AUTO" device has another name.
        if device.ep_name == FULL_NAMES["openvino"] and device.device.type == onnxruntime.OrtHardwareDeviceType.CPU:
            return device
    return None


def _probe_openvino() -> Probe:
    if importlib.util.find_spec(_PLUGIN) is None:
        return Probe("openvino", problem=f"its plugin is not installed ({install_hint('openvino')})")
    if openvino_device() is None:
        try:
            _register_plugin()
        except (*ERRORS, OSError, ImportError, AttributeError) as error:
            return Probe("openvino", problem=f"its plugin does not load: {_first_line(error)}")
    device = openvino_device()
    if device is None:
        return Probe("openvino", problem=f"the plugin finds no device it supports (it takes Intel's CPUs, this is {_cpu()})")
    return Probe("openvino", detail=f"plugin {importlib.metadata.version('onnxruntime-ep-openvino')}")


@functools.cache
def _register_plugin() -> None:
    """ONNX Runtime takes a library once in a process, and keeps it."""
    plugin = importlib.import_module(_PLUGIN)
    onnxruntime.register_execution_provider_library(_REGISTRATION, plugin.get_library_path())


def _probe_gpu(name: str) -> Probe:
    """TensorRT needs all that CUDA needs, and its own library."""
    device, problem = _nvidia_device()
    if not problem:
        # Finds what pip installed as nvidia-* packages.
        onnxruntime.preload_dlls()
        capi = Path(onnxruntime.__file__).parent / "capi"
        names = ["cuda"] if name == "cuda" else ["cuda", "tensorrt"]
        preload_tensorrt()
        own = list(_LOADED_LATER) if name == "cuda" else [*_LOADED_LATER, _TENSORRT]
        problem = missing_library([capi / f"libonnxruntime_providers_{item}.so" for item in names], own)
    return Probe(name, detail="" if problem else device, problem=problem)


def preload_tensorrt() -> None:
    """Loads TensorRT's library from where NVIDIA's wheel (tensorrt-cu13-libs) puts it, which is no place that is searched."""
    found = importlib.util.find_spec("tensorrt_libs")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / _TENSORRT
        if path.is_file():
            with contextlib.suppress(OSError):  # then it is missing, and that is said
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def missing_library(providers: Sequence[Path], others: Sequence[str] = ()) -> str:
    """Says which of the libraries `others`, and of those that the libraries `providers` need, does not load; "" if all do.

    ONNX Runtime's provider libraries are read, not loaded: one that is loaded by anyone but ONNX Runtime calls its host
    before it has one, and takes the process with it.
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
    """The names of the libraries that the ELF file `path` is linked with, such as "libcublas.so.13", in its order.

    Raises OSError if it cannot be read, ValueError if it is no shared library.
    """
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        try:
            dynamic = next(item for item in ELFFile(file).iter_segments() if isinstance(item, DynamicSegment))
            return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
        except Exception as error:
            raise ValueError(f"{path.name} is no shared library, or not all of one") from error


def _nvidia_device() -> tuple[str, str]:
    """The name of the first GPU that the driver has, or why there is none. Not yet run on a GPU."""
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


def _cpu() -> str:
    """Whose the CPU is, in a word."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return {"AuthenticAMD": "AMD's", "GenuineIntel": "Intel's"}.get(vendor, vendor or platform.machine())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
