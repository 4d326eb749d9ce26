"""The steps of a request: a scheduler that was set, the timesteps that are left of it, and its compiled coefficients."""

import copy
import itertools
import logging
import sys
import threading
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Request
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.pipe import view_of
from img2img_server.runtime.schedulers import registry
from img2img_server.runtime.schedulers.linear import LinearSolver, compile_schedule

_BYTES = 16 * 2**20
"""What the cached schedulers of one pipeline may take, in bytes."""


@dataclass(frozen=True, slots=True)
class CachedScheduler:
    """Shared by all requests with the same scheduler and steps, and never changed.

    `scheduler` was set and begun, and is not stepped; `times` are the `timesteps` as numbers. `schedule` is None where its steps
    are not linear: then a request steps a copy of `scheduler`. Tensors are on the CPU.
    """

    scheduler: Any
    timesteps: torch.Tensor
    times: tuple[float, ...]
    schedule: LinearSolver | None


class SchedulerCache:
    """Makes and keeps the schedulers of one diffusers pipeline, as linear solvers. Thread-safe: one takes up to tens of
    milliseconds to make, which the engine's thread does not spend if another thread asks first."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._cache = Cache(_BYTES)
        self._schedulers: dict[str | None, Any] = {}
        self._lock = threading.Lock()
        self.names = registry.supported(pipe.scheduler)

    def get(self, request: Request) -> CachedScheduler:
        """The scheduler of the request. Raises InvalidField if the model cannot use it."""
        self._check(request)
        key = self._key(request)
        with self._lock:
            known: CachedScheduler | None = self._cache.get(key)
            if known is None:
                known = self._make(request)
                self._cache.put(key, known, size_of(known))
        return known

    def _make(self, request: Request) -> CachedScheduler:
        # On the host, whatever the pipeline runs on: steps are counted and scaled there, and another thread than the engine's may
        # come here, which must not use the device while a CUDA graph is recorded.
        device = torch.device("cpu")
        view = view_of(self._pipe, scheduler=copy.deepcopy(self._scheduler(request.scheduler)))
        try:
            timesteps = self._set(view, request, device)
        except ValueError as error:
            raise InvalidField("num_inference_steps", f"the scheduler cannot do that: {error}") from None
        schedule = compile_schedule(view.scheduler, timesteps)
        if schedule is None:
            logging.getLogger(__name__).info("%s is not linear: stepped one by one", type(view.scheduler).__name__)
        return CachedScheduler(view.scheduler, timesteps, tuple(timesteps.tolist()), schedule)

    def _check(self, request: Request) -> None:
        """Raises InvalidField for a request that has no steps, or a scheduler that is not there."""
        self._check_name(request)
        if _first_steps(request) == 0:
            raise InvalidField("strength", "strength times num_inference_steps is below 1: no step would be run")

    def _check_name(self, request: Request) -> None:
        if request.scheduler is not None and request.scheduler not in self.names:
            raise InvalidField("scheduler", f"this model cannot use '{request.scheduler}'")

    def _key(self, request: Request) -> Hashable:
        """The key of a request's cached scheduler."""
        return request.scheduler, request.num_inference_steps, _first_steps(request)

    def _scheduler(self, name: str | None) -> Any:
        """The scheduler of that name, made once: some compute all of their training's timesteps."""
        if name not in self._schedulers:
            self._schedulers[name] = registry.make(name, self._pipe.scheduler)
        return self._schedulers[name]

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        """Sets and begins the scheduler of `view`, and gives the timesteps that are to be run."""
        view.scheduler.set_timesteps(request.num_inference_steps, device=device)
        timesteps: torch.Tensor
        timesteps, _ = view.get_timesteps(request.num_inference_steps, request.strength, device)
        return timesteps


def size_of(value: object, known: set[int] | None = None) -> int:
    """Bytes that an object takes with all that it holds: tensors and arrays with their storage, each object once. Classes,
    modules and functions are the program's own, and count nothing."""
    known = set() if known is None else known
    if id(value) in known or isinstance(value, type | ModuleType | FunctionType | torch.dtype | torch.device):
        return 0
    known.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, torch.Tensor):
        return size + value.untyped_storage().nbytes()
    if isinstance(value, np.ndarray):
        return size + (0 if value.base is None else value.nbytes)
    held: Iterable[object] = ()
    if isinstance(value, Mapping):
        held = itertools.chain(value.keys(), value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        held = value
    slots = (getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
    return size + sum(size_of(each, known) for each in (*held, *slots, getattr(value, "__dict__", None)))


def _first_steps(request: Request) -> int:
    """How many of num_inference_steps run at this strength: diffusers' rule."""
    return min(int(request.num_inference_steps * request.strength), request.num_inference_steps)
