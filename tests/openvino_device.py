"""OpenVINO's plugin on a machine whose CPU is not Intel's: for tests and benchmarks only.

The plugin computes on any x86-64 CPU, but offers a device only where ONNX Runtime says that the CPU's vendor is Intel. So that
its sessions, its arithmetic and what the server makes of them can be seen anywhere, `pretend_intel` writes Intel's number over
the vendor in ONNX Runtime's own record of the CPU, registers the plugin, and puts the true one back. It reaches into memory by
what is known of pybind11's and ONNX Runtime's layouts, checks that what it finds there is what it expects, and raises
RuntimeError where it is not. The server does no such thing: on AMD's CPUs it says that the plugin finds no device, and uses the
CPU provider.

The record belongs to the process, and a plugin's sessions must not outlive it. So the plugin stays, but nothing sees its devices
outside of `openvino_device()`: every other test of the process finds the machine as it is.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

import onnxruntime
from img2img_server.runtime.onnx import providers

_INTEL = 0x8086
_NAME = "img2img-tests-openvino"
_PYTHON_OBJECT = 16
"""Bytes of a Python object's head, before pybind11's pointer to the C++ object."""

_get_ep_devices = onnxruntime.get_ep_devices
_visible = False


def is_installed() -> bool:
    """Whether the plugin is there to be run at all."""
    return platform.machine() == "x86_64" and importlib.util.find_spec("onnxruntime_ep_openvino") is not None


@contextlib.contextmanager
def openvino_device() -> Iterator[Any]:
    """Inside, OpenVINO can be used, as on a machine with Intel's CPU; gives its device. Outside, all is as it really is."""
    global _visible
    providers.probe.cache_clear()
    if providers.probe("openvino").problem:
        pretend_intel()
    before, _visible = _visible, True
    providers.probe.cache_clear()
    try:
        yield providers.openvino_device()
    finally:
        _visible = before
        providers.probe.cache_clear()


def pretend_intel() -> None:
    """Registers the plugin, once in a process, as it would be on Intel's CPU. Its devices are hidden: see `openvino_device`."""
    if onnxruntime.get_ep_devices is _true_devices:
        return
    cpu = next(device.device for device in _get_ep_devices() if device.ep_name == "CPUExecutionProvider")
    address = ctypes.c_void_p.from_address(id(cpu) + _PYTHON_OBJECT).value
    # The head of ONNX Runtime's OrtHardwareDevice: its type, the vendor's number, the device's.
    record = (ctypes.c_uint32 * 3).from_address(address or 0)
    if tuple(record) != (0, cpu.vendor_id, cpu.device_id):
        raise RuntimeError(f"ONNX Runtime {onnxruntime.__version__} keeps its devices otherwise than this knows")
    plugin = importlib.import_module("onnxruntime_ep_openvino")
    vendor, record[1] = record[1], _INTEL
    try:
        onnxruntime.register_execution_provider_library(_NAME, plugin.get_library_path())
    finally:
        record[1] = vendor
    onnxruntime.get_ep_devices = _true_devices


def _true_devices() -> Any:
    devices = _get_ep_devices()
    return devices if _visible else [device for device in devices if device.ep_metadata.get("library_path") is None]
