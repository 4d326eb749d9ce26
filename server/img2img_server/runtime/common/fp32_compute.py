"""Computes in fp32 with weights stored in half precision, without a second copy of all weights.

The parameters of a layer are converted before it runs and restored afterwards. A layer is converted with its parent, too: some
modules read the type of a child's weight to choose that of the child's input (T5's feed-forward, Qwen2.5-VL's patches, Z-Image's
timesteps).
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
            stack.callback(compute_in_fp32(module).close)
        yield


def compute_in_fp32(module: Any) -> contextlib.ExitStack:
    """Makes `module` compute in fp32, and report fp32 as its dtype, until the result is closed. Its buffers are converted."""
    stack = contextlib.ExitStack()
    if not any(value.dtype in HALVES for value in module.state_dict().values()):
        return stack
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and value.dtype in HALVES:
                stack.callback(part._buffers.__setitem__, name, value)
                part._buffers[name] = value.float()
        if isinstance(getattr(type(part), "dtype", None), property):
            stack.callback(setattr, part, "__class__", type(part))
            part.__class__ = _reporting_fp32(type(part))
        parts = [known for known in (part, *_children(part)) if any(_halves(known))]
        if parts:
            layer = _Layer(parts)
            stack.callback(part.register_forward_pre_hook(layer.convert, prepend=True).remove)
            stack.callback(part.register_forward_hook(layer.restore, always_call=True).remove)
    return stack


def _children(part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module's children, and those in its lists."""
    for child in part.children():
        yield child
        if isinstance(child, (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from _children(child)


def _reporting_fp32(kind: Any) -> Any:
    """A subclass that reports fp32 as its dtype. transformers finds some properties of a class by the text of its name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "dtype": property(lambda _: torch.float32)})


def _halves(part: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The module's own parameters in half precision."""
    for name, value in part._parameters.items():
        if value is not None and value.dtype in HALVES:
            yield name, value


class _Layer:
    """A module and its children with parameters in half precision."""

    def __init__(self, parts: list[torch.nn.Module]) -> None:
        self._parts = parts
        self._stored: list[list[tuple[torch.nn.Module, str, torch.nn.Parameter]]] = []

    def convert(self, part: torch.nn.Module, args: Any) -> None:
        """Converts what no caller of this module has converted."""
        found = [(known, name, value) for known in self._parts for name, value in _halves(known)]
        self._stored.append(found)
        for known, name, value in found:
            known._parameters[name] = torch.nn.Parameter(value.float(), requires_grad=False)

    def restore(self, part: torch.nn.Module, args: Any, output: Any) -> None:
        """Restores what `convert` has converted."""
        for known, name, value in self._stored.pop():
            known._parameters[name] = value
