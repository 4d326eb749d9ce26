"""Makes a module's weights ready layer by layer: before a layer runs, and only until it has run.

A layer's weights are made ready with its parent, too: some modules read the type of a child's weight to choose that of the
child's input (T5's feed-forward, Qwen2.5-VL's patches, Z-Image's timesteps). Embeddings look tokens up in their stored table, and
only the result is made ready.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from img2img_server.runtime.common.device_copy import send

MakeReady = Callable[[torch.Tensor], torch.Tensor]
IsStored = Callable[[torch.Tensor], bool]


class ReadyWeight(torch.nn.Parameter):
    """A copy of a weight that exists while its layer runs."""


def make_layers_ready(module: torch.nn.Module, is_stored: IsStored, make_ready: MakeReady, stack: contextlib.ExitStack) -> None:
    """Replaces the weights of `module` of which `is_stored` is true by what `make_ready` makes of them, while their layer runs;
    until `stack` is closed."""
    for part in module.modules():
        if type(part) is torch.nn.Embedding:
            table = _Table(part, is_stored, make_ready)
            stack.callback(part.register_forward_pre_hook(table.send_tokens).remove)
            stack.callback(part.register_forward_hook(table.make_ready).remove)
            continue
        parts = [known for known in (part, *_children(part)) if any(_stored(known, is_stored))]
        if parts:
            layer = _Layer(parts, is_stored, make_ready)
            stack.callback(part.register_forward_pre_hook(layer.make_ready, prepend=True).remove)
            stack.callback(part.register_forward_hook(layer.restore, always_call=True).remove)


def report(module: torch.nn.Module, stack: contextlib.ExitStack, **values: Any) -> None:
    """Makes all parts of `module` report these `values`, until `stack` is closed, if their class has a property of that name."""
    for part in module.modules():
        kind = type(part)
        known = {name: value for name, value in values.items() if isinstance(getattr(kind, name, None), property)}
        if known:
            stack.callback(setattr, part, "__class__", kind)
            part.__class__ = _reporting(kind, known)


def _reporting(kind: Any, values: dict[str, Any]) -> Any:
    """A subclass that reports `values`. transformers finds some properties of a class by the text of its name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names | {name: _property(value) for name, value in values.items()})


def _property(value: Any) -> property:
    return property(lambda _: value)


def _children(part: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module's children, and those in its lists."""
    for child in part.children():
        yield child
        if isinstance(child, (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)):
            yield from _children(child)


def _stored(part: torch.nn.Module, is_stored: IsStored) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The module's own weights that are to be made ready."""
    for name, value in part._parameters.items():
        if value is not None and type(part) is not torch.nn.Embedding and is_stored(value):
            yield name, value


class _Layer:
    """A module and its children with weights that are to be made ready."""

    def __init__(self, parts: list[torch.nn.Module], is_stored: IsStored, make_ready: MakeReady) -> None:
        self._parts = parts
        self._is_stored = is_stored
        self._make_ready = make_ready
        self._replaced: list[list[tuple[torch.nn.Module, str, torch.nn.Parameter]]] = []

    def make_ready(self, part: torch.nn.Module, args: Any) -> None:
        """Makes ready what no caller of this module has made ready."""
        found = [(known, name, value) for known in self._parts for name, value in _stored(known, self._is_stored)]
        self._replaced.append(found)
        for known, name, value in found:
            known._parameters[name] = ReadyWeight(self._make_ready(value.data), requires_grad=False)

    def restore(self, part: torch.nn.Module, args: Any, output: Any) -> None:
        """Restores what `make_ready` has replaced."""
        for known, name, value in self._replaced.pop():
            known._parameters[name] = value


class _Table:
    """An embedding, whose table stays as it is."""

    def __init__(self, part: torch.nn.Embedding, is_stored: IsStored, make_ready: MakeReady) -> None:
        self._part = part
        self._is_stored = is_stored
        self._make_ready = make_ready

    def send_tokens(self, part: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The arguments, with the tokens where the table is."""
        return (send(args[0], self._part.weight.device), *args[1:])

    def make_ready(self, part: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The rows of the tokens, made ready."""
        return self._make_ready(output) if self._is_stored(self._part.weight) else output
