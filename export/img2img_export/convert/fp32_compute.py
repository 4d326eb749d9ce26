"""Computing in fp32 with weights that are stored in half precision, without a second copy of them all.

Each layer's parameters are converted when the layer runs, and let go of when it has run.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def computing_in_fp32(*modules: Any) -> Iterator[None]:
    """Lets `modules` compute in fp32, and say so when they are asked for their type, while it is entered."""
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
            handles.append(part.register_forward_pre_hook(layer.raise_up, prepend=True))
            handles.append(part.register_forward_hook(layer.let_go, always_call=True))
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
    """One module with parameters of its own."""

    def __init__(self, part: torch.nn.Module) -> None:
        self._own = {name: value for name, value in part._parameters.items() if value is not None and value.dtype in HALVES}

    def raise_up(self, part: torch.nn.Module, args: Any) -> None:
        for name, value in self._own.items():
            part._parameters[name] = torch.nn.Parameter(value.float(), requires_grad=False)

    def let_go(self, part: torch.nn.Module, args: Any, output: Any) -> None:
        part._parameters.update(self._own)
