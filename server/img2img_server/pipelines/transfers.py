"""Tensors between the host and the device, and when to wait for what the device still has to do."""

import torch


def send(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` on `device`, and of `dtype` where one is given.

    torch copies from ordinary memory only when the device has done all that was asked of it before. From pinned memory the copy
    is one more thing asked of it. Not yet run on a GPU.
    """
    target = torch.device(device)
    if tensor.device.type == target.type:
        return tensor if dtype is None else tensor.to(dtype)
    small = tensor if dtype is None or dtype.itemsize >= tensor.dtype.itemsize else tensor.to(dtype)
    if target.type == "cuda":
        small = small.pin_memory()
    # A copy to the host must be over before anyone reads it.
    return small.to(target, dtype, non_blocking=target.type != "cpu")


def settle(tensor: torch.Tensor) -> None:
    """Waits until the device has computed `tensor`. Not yet run on a GPU.

    Once for a call of the model: without it the engine would time how long asking takes, tell of steps that are not done, and
    have asked for many when a request is cancelled.
    """
    if tensor.device.type == "cuda":
        torch.cuda.current_stream(tensor.device).synchronize()
