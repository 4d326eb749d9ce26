"""torch.compile for models that run in PyTorch, such that no request ever waits for the compiler.

Denoiser and VAE decoder are compiled when the model is loaded, by drawing pictures of its native size. Only calls of the
shapes that were seen then go to what was compiled. All others run as they always did: a picture of another size, of more rows, or
with a prompt of another length where a model does not pad prompts. Not yet run on a GPU.
"""

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from PIL import Image

from img2img_server.engine.request import Pipeline, Request
from img2img_server.pipelines.alone import run_alone
from img2img_server.pipelines.whole_sizes import parts

_log = logging.getLogger(__name__)

_DENOISERS = ("unet", "transformer")
_DECODED_BY = ("vae", "movq")
_GUIDANCE = (7.5, 1.0)
"""Of the pictures drawn while compiling: with guidance a call has more rows than without."""
_STEPS = 2

_ERRORS = (RuntimeError, OSError, ImportError, AttributeError, TypeError, ValueError, AssertionError, KeyError)
"""What torch.compile raises beside its own errors, which are RuntimeErrors: it runs a compiler and other people's code."""


class Compiled:
    """A module's forward that is compiled for the shapes it meets while it is `learning`, and eager for all others."""

    def __init__(self, module: torch.nn.Module, backend: str | Callable[..., Any]) -> None:
        self._module = module
        self._eager = module.forward
        # Sizes that are fixed in the code make it fast; with dynamic=None torch would let go of them at the second shape.
        self._compiled = torch.compile(module.forward, backend=backend, dynamic=False)
        self.learning = True
        self.known: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        signature = _signature((args, kwargs))
        if self.learning:
            self.known.add(signature)
        return (self._compiled if signature in self.known else self._eager)(*args, **kwargs)

    def install(self) -> None:
        """Takes the place of the module's forward."""
        self._module.__dict__["forward"] = self

    def remove(self) -> None:
        """Gives the module its own forward back."""
        self._module.__dict__.pop("forward", None)


def compile_modules(pipe: Any, pipeline: Pipeline, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compiles the torch modules of the diffusers pipeline `pipe`, which `pipeline` serves, and draws with them once.

    Takes minutes for a real model, and is to be done before it is served. False where the compiler failed, which is logged, or
    there is nothing to compile: then the model runs as it is.
    """
    compiled = [Compiled(module, backend) for module in _modules(pipe)]
    if not compiled:
        return False
    begun = time.monotonic()
    for forward in compiled:
        forward.install()
    try:
        for guidance in _GUIDANCE:
            run_alone(pipeline, _request(pipeline, guidance))
    except _ERRORS as error:
        for forward in compiled:
            forward.remove()
        _log.warning("torch.compile failed, the model runs without it: %s: %s", type(error).__name__, _cause(error))
        return False
    for forward in compiled:
        forward.learning = False
    shapes = sum(len(forward.known) for forward in compiled)
    _log.info("torch.compile took %.0f s for %d modules and %d shapes", time.monotonic() - begun, len(compiled), shapes)
    return True


def _modules(pipe: Any) -> Iterator[torch.nn.Module]:
    """The modules that most of the time goes into, where they are torch's and not stand-ins over graphs."""
    found: dict[int, Any] = {}
    for part in parts(pipe):
        for name in _DENOISERS:
            module = getattr(part, name, None)
            found[id(module)] = module
        for name in _DECODED_BY:
            decoder = getattr(getattr(part, name, None), "decoder", None)
            found[id(decoder)] = decoder
    return (module for module in found.values() if isinstance(module, torch.nn.Module) and _has_weights(module))


def _has_weights(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _request(pipeline: Pipeline, guidance: float) -> Request:
    source = Image.linear_gradient("L").resize(pipeline.native_size).convert("RGB")
    return Request("", source, "a lake", None, 1.0, _STEPS, guidance, (0,))


def _signature(value: Any) -> Hashable:
    """What the compiler depends on: shapes and types of tensors, all other values themselves."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device, value.stride()
    if isinstance(value, dict):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_signature(item) for item in value)
    return value if isinstance(value, Hashable) else id(value)


def _cause(error: Exception) -> str:
    """What is wrong, in a line: the compiler's own errors say in the first that there is one, in the second which."""
    return " ".join(str(error).strip().splitlines()[:2])
