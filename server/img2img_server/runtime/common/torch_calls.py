"""Decorators for pipeline methods that call torch: no gradients, the pipeline's thread count, and one out-of-memory error."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from img2img_server.errors import OutOfMemory
from img2img_server.runtime.common.device_copy import enter_stream
from img2img_server.runtime.common.out_of_memory import RUNTIME_ERRORS, is_out_of_memory, out_of_memory, worked

_P = ParamSpec("_P")
_R = TypeVar("_R")


class HasThreads(Protocol):
    """A pipeline with the number of CPU threads of its torch calls. Its `owner`, if any, identifies its model
    (out_of_memory.py)."""

    threads: int


_Self = TypeVar("_Self", bound=HasThreads)


def torch_call(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Decorates a pipeline's method that uses the device. Sets threads and inference mode on the calling thread.

    Raises OutOfMemory if torch or ONNX Runtime runs out of memory.
    """

    @functools.wraps(method)
    def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        owner = getattr(self, "owner", None)
        torch.set_num_threads(self.threads)
        enter_stream()
        try:
            with torch.inference_mode():
                result = method(self, *args, **kwargs)
        except RUNTIME_ERRORS as error:
            if (full := out_of_memory(error, owner)) is None:
                raise
            raise full from None
        worked(owner)
        return result

    return call


def host_call(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Decorates a pipeline's method that computes on the CPU only; any thread may call it at any time.

    It does not touch the device or its stream: a thread that enters the stream while another one records on it breaks the
    recording. Raises OutOfMemory if torch runs out of memory.
    """

    @functools.wraps(method)
    def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return method(self, *args, **kwargs)
        except RUNTIME_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory("the machine ran out of memory") from None

    return call
