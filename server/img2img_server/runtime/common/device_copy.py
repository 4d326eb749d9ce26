"""Copies between host and device, the CUDA stream that this process uses, and waiting for the device."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_THREAD = threading.local()
"""`stream`: torch's current stream on this thread, as set by `enter_stream`."""

_COPIES = frozenset({torch.Tensor.to, torch.Tensor.cpu})


@functools.cache
def device_stream() -> torch.cuda.Stream:
    """The CUDA stream of this process. All pipelines use it on all threads, so work is done in the order of submission. It is not
    the default stream, on which CUDA graphs cannot be recorded."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def start_device(provider: str) -> None:
    """Initializes CUDA in torch if models may run on a GPU, so that the first model's measured load excludes it. `provider` is
    the setting."""
    if provider in ("auto", "cuda", "tensorrt") and torch.cuda.is_available():
        device_stream()


def enter_stream() -> None:
    """Makes `device_stream` torch's current stream on this thread, if this process uses CUDA."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        stream = device_stream()
        if getattr(_THREAD, "stream", None) is not stream:
            go_over(stream)
            _THREAD.stream = stream


def go_over(stream: torch.cuda.Stream) -> None:
    """Makes `stream` torch's current stream on this thread, ordered after the work that torch submitted before.

    Torch and ONNX Runtime then share one order of work, and neither has to wait for the other on the host.
    """
    current = torch.cuda.current_stream()
    if current != stream:
        stream.wait_stream(current)
        torch.cuda.set_stream(stream)


def send(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` on `device`, converted to `dtype` if one is given.

    A copy from pageable memory waits until the device has finished all submitted work; a copy from pinned, contiguous memory is
    queued like other work. A copy to the host is complete on return, in pinned memory.
    """
    target = device if isinstance(device, torch.device) else torch.device(device)
    if tensor.device.type == target.type:
        return tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)
    small = tensor if dtype is None or dtype.itemsize >= tensor.dtype.itemsize else tensor.to(dtype)
    if target.type == "cuda":
        small = small.contiguous().pin_memory()
    elif tensor.device.type == "cuda":
        host = fetch_later(small)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host.to(dtype or small.dtype)
    # A copy to the host must be complete before it is read.
    return small.to(target, non_blocking=target.type != "cpu").to(dtype or small.dtype)


def fetch_later(tensor: torch.Tensor) -> torch.Tensor:
    """A host copy of a CUDA tensor, valid after the next wait for the device; a tensor on another device as it is."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class PinnedCopies(TorchFunctionMode):
    """Within the block, torch's copies between the host and a CUDA device on this thread are made by `send`."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES and "memory_format" not in kwargs:
            wanted = (*args[1:], *kwargs.values())
            devices = ["cpu"] if func is torch.Tensor.cpu else [each for each in map(_device_of, wanted) if each is not None]
            if devices and {args[0].device.type, torch.device(devices[0]).type} == {"cpu", "cuda"}:
                return send(args[0], devices[0], next((each for each in map(_dtype_of, wanted) if each is not None), None))
        return func(*args, **kwargs)


def _device_of(argument: Any) -> torch.device | str | None:
    """The device that an argument of Tensor.to names."""
    if isinstance(argument, torch.Tensor):
        return argument.device
    return argument if isinstance(argument, torch.device | str) else None


def _dtype_of(argument: Any) -> torch.dtype | None:
    """The type that an argument of Tensor.to names."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return argument if isinstance(argument, torch.dtype) else None


def mark(device: torch.device) -> Callable[[], None] | None:
    """A function that waits until `device` has done all work submitted to `device_stream` so far; None if it is not CUDA.

    The engine waits for a step after it has submitted the next one. Otherwise it would measure submission instead of computation,
    report steps that are not done, and have many steps queued when a request is cancelled.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(device_stream())
    return event.synchronize
