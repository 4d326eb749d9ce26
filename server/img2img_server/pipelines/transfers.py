"""Tensors between the host and the device, the stream that all work of this process shares, and when to wait for the device."""

import functools
from collections.abc import Sequence

import torch


@functools.cache
def device_stream() -> torch.cuda.Stream:
    """The CUDA stream of this process. All pipelines use it, on all threads, so that everything is done in the order in which it
    was asked for. It is not the default stream, on which nothing can be recorded."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def enter_stream() -> None:
    """Has torch, on this thread, use `device_stream` from now on, if this process uses CUDA."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        go_over(device_stream())


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
    must be contiguous for that, the copy is one more thing asked of it.
    """
    target = torch.device(device)
    if tensor.device.type == target.type:
        return tensor if dtype is None else tensor.to(dtype)
    small = tensor if dtype is None or dtype.itemsize >= tensor.dtype.itemsize else tensor.to(dtype)
    if target.type == "cuda":
        small = small.contiguous().pin_memory()
    # A copy to the host must be over before anyone reads it.
    return small.to(target, non_blocking=target.type != "cpu").to(dtype or small.dtype)


def per_row(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """A factor for each row of a tensor [B, C, h, w]: `numbers` in float32 as [B, 1, 1, 1] on `device`."""
    return send(torch.tensor(numbers, dtype=torch.float32), device)[:, None, None, None]


def settle(tensor: torch.Tensor) -> None:
    """Waits until the device has computed `tensor`.

    Once for a call of the model: without it the engine would time how long asking takes, tell of steps that are not done, and
    have asked for many when a request is cancelled.
    """
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
