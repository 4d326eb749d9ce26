"""How a pipeline's methods call torch: without gradients, on as many threads as suit that pipeline, and one error for no room."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from img2img_server.pipelines.memory import RUNTIME_ERRORS, out_of_memory
from img2img_server.pipelines.transfers import enter_stream

_P = ParamSpec("_P")
_R = TypeVar("_R")


class HasThreads(Protocol):
    """A pipeline that knows how many CPU threads of torch its calls are to use."""

    threads: int


_Self = TypeVar("_Self", bound=HasThreads)


def torch_call(method: Callable[Concatenate[_Self, _P], _R]) -> Callable[Concatenate[_Self, _P], _R]:
    """Decorates a pipeline's method. Both settings belong to the thread that calls, and several pipelines share one.

    Raises OutOfMemory where torch or ONNX Runtime finds no room.
    """

    @functools.wraps(method)
    def call(self: _Self, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        torch.set_num_threads(self.threads)
        enter_stream()
        try:
            with torch.inference_mode():
                return method(self, *args, **kwargs)
        except RUNTIME_ERRORS as error:
            if (full := out_of_memory(error)) is None:
                raise
            raise full from None

    return call
