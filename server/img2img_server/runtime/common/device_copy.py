"""Tensors between the host and the device, the stream that all work of this process shares, and when to wait for the device."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_THREAD = threading.local()
"""`stream`: the one that torch was last made to use on this thread."""

_COPIES = frozenset({torch.Tensor.to, torch.Tensor.cpu})


@functools.cache
def device_stream() -> torch.cuda.Stream:
    """The CUDA stream of this process. All pipelines use it, on all threads, so that everything is done in the order in which it
    was asked for. It is not the default stream, on which nothing can be recorded."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def start_device(provider: str) -> None:
    """Has torch start the GPU if models may run there, so that what is measured of the first one leaves that out. `provider` is
    the setting."""
    if provider in ("auto", "cuda", "tensorrt") and torch.cuda.is_available():
        device_stream()


def enter_stream() -> None:
    """Has torch, on this thread, use `device_stream` from now on, if this process uses CUDA."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        stream = device_stream()
        if getattr(_THREAD, "stream", None) is not stream:
            go_over(stream)
            _THREAD.stream = stream


def go_over(stream: torch.cuda.Stream) -> None:
    """Has torch, on this thread, use `stream` from now on, for what follows on what it asked for before.

    So latents and what ONNX Runtime makes of them are asked for in one order, and neither waits for the other.
    """
    current = torch.cuda.current_stream()
    if current != stream:
        stream.wait_stream(current)
        torch.cuda.set_stream(stream)


def send(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` on `device`, and of `dtype` if one is given.

    torch copies from ordinary memory only when the device has done all that was asked of it before. From pinned memory, which
    must be contiguous for that, the copy is one more thing asked of it. What comes to the host is there on return, and pinned.
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
    # A copy to the host must be over before anyone reads it.
    return small.to(target, non_blocking=target.type != "cpu").to(dtype or small.dtype)


def fetch_later(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or if it is on a CUDA device a copy on the host, which is there after the next wait for the device."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class PinnedCopies(TorchFunctionMode):
    """Within the block, copies between the host and a CUDA device that anyone asks of torch on this thread are made by `send`."""

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
    """What waits until `device` has done all that was asked of it in `device_stream`; None if it is no CUDA device.

    The engine waits for a step once it has asked for the next one. Without that it would time how long asking takes, tell of
    steps that are not done, and have asked for many when a request is cancelled.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(device_stream())
    return event.synchronize
