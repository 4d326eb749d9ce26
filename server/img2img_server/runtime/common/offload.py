"""Keeps a module's weights in host memory, and brings them to the device layer by layer while it runs.

Weights that are stored in the type of the file are its mapped pages, which the system may drop and read again. A layer's weights
are on the device only while it runs, so the device needs memory for one layer and its activations, and each call copies all
weights once.
"""

import contextlib
from typing import Any, TypeVar

import torch

from img2img_server.runtime.common.device_copy import send
from img2img_server.runtime.common.fp32_compute import HALVES, is_half
from img2img_server.runtime.common.layers import ReadyWeight, make_layers_ready, report

_Module = TypeVar("_Module")


def offload(module: Any, device: str, in_fp32: bool = False) -> None:
    """Makes `module`, whose weights are on the CPU, compute on `device` and report it as its own; `to` no longer moves it.

    Buffers, which are small, are moved at once. With `in_fp32` weights in half precision are converted on the device, and the
    module reports fp32. After a call its memory on a GPU is free for other libraries, too.
    """

    def bring(value: torch.Tensor) -> torch.Tensor:
        # A plain copy waits for the device, so only one layer is there; `send` would queue all of them in pinned memory.
        there = value if value.device.type == device else torch.empty_like(value, device=device).copy_(value)
        return there.float() if in_fp32 and is_half(there) else there

    stack = contextlib.ExitStack()
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = send(value, device, torch.float32 if in_fp32 and value.dtype in HALVES else None)
    report(module, stack, device=torch.device(device), **({"dtype": torch.float32} if in_fp32 else {}))
    make_layers_ready(module, lambda weight: not isinstance(weight, ReadyWeight), bring, stack)
    _stay(module)
    if device == "cuda":
        module.register_forward_hook(_give_back, always_call=True)


def _stay(module: torch.nn.Module) -> None:
    """Makes `to` do nothing."""
    kind = type(module)

    def to(module: _Module, *_: Any, **__: Any) -> _Module:
        return module

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "to": to}
    module.__class__ = type(kind.__name__, (kind,), names)


def _give_back(*_: Any) -> None:
    """Returns memory that PyTorch keeps for later to the device."""
    torch.cuda.empty_cache()
