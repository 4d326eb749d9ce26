"""torch.compile for models that run in PyTorch. Requests never wait for the compiler.

Denoiser and VAE decoder are compiled when the model is loaded, by drawing images of its native size. If a denoiser's class lists
its repeated blocks, only the blocks are compiled, once for all of them (regional compilation). On a GPU the compiled code is
recorded as CUDA graphs ("reduce-overhead"). Only calls of shapes that were seen during loading use the compiled code. All others
run eagerly: other image sizes, more rows, or other prompt lengths if a model does not pad prompts. Not yet run on a GPU.
"""

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_map_only

from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.runtime.common.pipe import parts

_log = logging.getLogger(__name__)

_DENOISERS = ("unet", "transformer")
_DECODED_BY = ("vae", "movq")
_GUIDANCE = (7.5, 1.0)
"""Guidance scales of the images drawn while compiling: with guidance a call has more rows than without."""
_STEPS = 2
_MOST_SHAPES = 64
"""Maximum number of shapes that one function is compiled for: a block is used at several widths, sizes and row counts. torch runs
further ones uncompiled."""

_ERRORS = (RuntimeError, OSError, ImportError, AttributeError, TypeError, ValueError, AssertionError, KeyError)
"""Errors that torch.compile passes on from compilers and third-party code, and its own, which are RuntimeErrors."""


class Compiled:
    """A module's forward: compiled for the shapes that it gets while `learning`, eager for all others.

    If the module repeats blocks, the blocks are compiled and the rest is eager.
    """

    def __init__(self, module: torch.nn.Module, backend: str | Callable[..., Any]) -> None:
        self._module = module
        self._eager = module.forward
        self._recorded = backend == "inductor" and next(module.parameters()).device.type == "cuda"
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self._recorded else {}
        # Static sizes make the code fast; with dynamic=None torch would replace them by dynamic ones at the second shape.
        options |= {"backend": backend, "dynamic": False, "recompile_limit": _MOST_SHAPES}
        self._blocks = _compile_blocks(module, options)
        self._compiled = self._with_blocks if self._blocks else torch.compile(module.forward, **options)
        self.learning = True
        self.known: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward."""
        signature = _signature((args, kwargs))
        if self.learning:
            self.known.add(signature)
        if signature not in self.known:
            return self._eager(*args, **kwargs)
        if not self._recorded:
            return self._compiled(*args, **kwargs)
        # The next step overwrites a recording's outputs, so they are cloned.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return tree_map_only(torch.Tensor, torch.clone, self._compiled(*args, **kwargs))

    def _with_blocks(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own forward with compiled blocks. Only one thread at a time may run a module."""
        try:
            for block, compiled in self._blocks.items():
                block._compiled_call_impl = compiled
            return self._eager(*args, **kwargs)
        finally:
            for block in self._blocks:
                block._compiled_call_impl = None

    def install(self) -> None:
        """Replaces the module's forward."""
        self._module.__dict__["forward"] = self

    def remove(self) -> None:
        """Restores the module's own forward."""
        self._module.__dict__.pop("forward", None)


def compile_modules(pipe: Any, pipeline: Pipeline, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compiles the torch modules of the diffusers pipeline `pipe` by drawing images with `pipeline`, which wraps it.

    Takes minutes for a real model; call it before the model is served. Returns False if there is nothing to compile or the
    compiler failed, which is logged; then the model runs uncompiled.
    """
    begun, compiled = time.monotonic(), list[Compiled]()
    try:
        for module in _modules(pipe):
            compiled.append(Compiled(module, backend))
            compiled[-1].install()
        if not compiled:
            return False
        for guidance in _GUIDANCE:
            run_alone(pipeline, _request(pipeline, guidance))
    except _ERRORS as error:
        for forward in compiled:
            forward.remove()
        _log.warning("torch.compile failed; the model runs without it: %s: %s", type(error).__name__, _cause(error))
        return False
    for forward in compiled:
        forward.learning = False
    shapes = sum(len(forward.known) for forward in compiled)
    _log.info("torch.compile took %.0f s for %d modules and %d shapes", time.monotonic() - begun, len(compiled), shapes)
    return True


def _compile_blocks(module: torch.nn.Module, options: Mapping[str, Any]) -> dict[torch.nn.Module, Callable[..., Any]]:
    """The repeated blocks of `module`, as its class lists them, each with its compiled call; empty for other modules."""
    names = getattr(module, "_repeated_blocks", None) or ()
    if not any(type(part).__name__ in names for part in module.modules()):
        return {}
    module.compile_repeated_blocks(**options)  # type: ignore[operator] # ModelMixin's
    blocks = {part: part._compiled_call_impl for part in module.modules() if part._compiled_call_impl is not None}
    for block in blocks:
        block._compiled_call_impl = None
    return blocks


def _modules(pipe: Any) -> Iterator[torch.nn.Module]:
    """The modules that take most of the time, if they are torch modules with weights."""
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
    """The key of compiled code: shapes and types of tensors, and the values of all other arguments."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device, value.stride()
    if isinstance(value, dict):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(_signature(item) for item in value)
    return value if isinstance(value, Hashable) else id(value)


def _cause(error: Exception) -> str:
    """The error in one line: the cause is in the second line of the compiler's own errors."""
    return " ".join(str(error).strip().splitlines()[:2])
