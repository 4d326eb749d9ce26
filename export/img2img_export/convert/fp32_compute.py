"""Computes in fp32 with weights stored in half precision, without a second copy of all weights.

The parameters of a layer are converted before it runs and restored afterwards.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def computing_in_fp32(*modules: Any) -> Iterator[None]:
    """Makes `modules` compute in fp32, and report fp32 as their dtype, within the block."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if any(value.dtype in HALVES for value in module.state_dict().values()):
                stack.enter_context(_upcast(module))
        yield


@contextlib.contextmanager
def _upcast(module: Any) -> Iterator[None]:
    handles = []
    buffers = []
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and value.dtype in HALVES:
                buffers.append((part, name, value))
                part._buffers[name] = value.float()
        if any(value is not None and value.dtype in HALVES for value in part._parameters.values()):
            layer = _Layer(part)
            handles.append(part.register_forward_pre_hook(layer.convert, prepend=True))
            handles.append(part.register_forward_hook(layer.restore, always_call=True))
    own_class = type(module)
    module.__class__ = type(own_class.__name__, (own_class,), {"dtype": property(lambda _: torch.float32)})
    try:
        yield
    finally:
        module.__class__ = own_class
        for handle in handles:
            handle.remove()
        for part, name, value in buffers:
            part._buffers[name] = value


class _Layer:
    """The half-precision parameters of one module."""

    def __init__(self, part: torch.nn.Module) -> None:
        self._own = {name: value for name, value in part._parameters.items() if value is not None and value.dtype in HALVES}

    def convert(self, part: torch.nn.Module, args: Any) -> None:
        for name, value in self._own.items():
            part._parameters[name] = torch.nn.Parameter(value.float(), requires_grad=False)

    def restore(self, part: torch.nn.Module, args: Any, output: Any) -> None:
        part._parameters.update(self._own)
