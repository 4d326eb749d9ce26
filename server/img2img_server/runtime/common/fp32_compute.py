"""Computes in fp32 with weights stored in half precision, without a second copy of all weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from img2img_server.runtime.common.layers import make_layers_ready, report

HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def computing_in_fp32(*modules: Any) -> Iterator[None]:
    """Makes `modules` compute in fp32, and report fp32 as their dtype, within the block."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(compute_in_fp32(module).close)
        yield


def compute_in_fp32(module: Any) -> contextlib.ExitStack:
    """Makes `module` compute in fp32, and report fp32 as its dtype, until the result is closed. Its buffers are converted."""
    stack = contextlib.ExitStack()
    if not any(is_half(value) for value in module.state_dict().values()):
        return stack
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and is_half(value):
                stack.callback(part._buffers.__setitem__, name, value)
                part._buffers[name] = value.float()
    report(module, stack, dtype=torch.float32)
    make_layers_ready(module, is_half, torch.Tensor.float, stack)
    return stack


def is_half(value: torch.Tensor) -> bool:
    """Whether a tensor is in half precision."""
    return value.dtype in HALVES
