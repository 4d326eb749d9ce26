"""Cached schedulers: a diffusers scheduler with its timesteps set, the timesteps to run, and its linear solver."""

import copy
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from img2img_server.engine.cache import Cache
from img2img_server.engine.request import Request, no_step
from img2img_server.errors import InvalidField
from img2img_server.runtime.common.pipe import view_of
from img2img_server.runtime.schedulers import registry
from img2img_server.runtime.schedulers.linear import LinearSolver, compile_schedule, skipping
from img2img_server.runtime.schedulers.noise_levels import NoiseLevels

_BYTES = 16 * 2**20
"""Maximum size of one pipeline's cached schedulers, in bytes."""


@dataclass(frozen=True, slots=True)
class CachedScheduler:
    """The scheduler of all requests with the same scheduler and steps. Immutable.

    `scheduler` has its timesteps and begin index set, and is never stepped; `times` are the `timesteps` [S] as numbers, and
    `indices` say which of the scheduler's they are.
    `schedule` is None if the steps are not linear: then each request steps a copy of `scheduler`. Tensors are on the CPU.
    """

    scheduler: Any
    timesteps: torch.Tensor
    times: tuple[float, ...]
    schedule: LinearSolver | None
    levels: NoiseLevels
    indices: tuple[int, ...]

    @property
    def can_skip(self) -> bool:
        """Whether `part` is possible: the steps are linear, draw no noise, and the predicted image is known in each."""
        solver = self.schedule
        return (
            solver is not None
            and not any(step.draws and step.noise for step in solver.steps)
            and None not in self.levels.predicted
        )

    def part(self, called: Sequence[int]) -> "CachedScheduler":
        """The scheduler of requests that call the model in the steps `called` only, the first among them."""
        predicted = [factors for factors in self.levels.predicted if factors is not None]
        assert self.schedule is not None, "can_skip holds"
        solver = skipping(self.schedule, called, predicted)
        indices = tuple(self.indices[index] for index in called)
        times = tuple(self.times[index] for index in called)
        return CachedScheduler(self.scheduler, solver.timesteps, times, solver, self.levels.part(called), indices)


class SchedulerCache:
    """Makes and caches the schedulers of one diffusers pipeline, as linear solvers. Thread-safe: making one takes up to tens of
    milliseconds, which another thread can spend before the engine's thread needs it."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._cache = Cache(_BYTES)
        self._schedulers: dict[str | None, Any] = {}
        self._lock = threading.Lock()
        self.names = registry.supported(pipe.scheduler)

    def get(self, request: Request) -> CachedScheduler:
        """The scheduler of the request. Raises InvalidField if the model cannot use it."""
        self._check(request)
        return self._cached(self._key(request), lambda: self._make(request))

    def get_part(self, request: Request, called: tuple[int, ...]) -> CachedScheduler:
        """`part` of the request's scheduler."""
        whole = self.get(request)
        return self._cached((self._key(request), called), lambda: whole.part(called))

    def _cached(self, key: Hashable, make: Callable[[], CachedScheduler]) -> CachedScheduler:
        with self._lock:
            known: CachedScheduler | None = self._cache.get(key)
            if known is None:
                known = make()
                self._cache.put(key, known, size_of(known))
        return known

    def _make(self, request: Request) -> CachedScheduler:
        # On the CPU for every pipeline: steps are counted and scaled there, and other threads than the engine's call this, which
        # must not use the device while a CUDA graph is recorded.
        device = torch.device("cpu")
        view = view_of(self._pipe, scheduler=copy.deepcopy(self._scheduler(request.scheduler)))
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                timesteps = self._set(view, request, device)
        except ValueError as error:
            raise InvalidField("num_inference_steps", f"the scheduler does not support this number: {error}") from None
        if not timesteps.isfinite().all():  # of one step, by a scheduler with `shift_terminal`: diffusers' image is black
            raise InvalidField("num_inference_steps", "the scheduler does not support this number: increase it")
        schedule = compile_schedule(view.scheduler, timesteps)
        levels = NoiseLevels(view.scheduler, timesteps, () if schedule is None else schedule.input_scales)
        if schedule is None:
            logging.getLogger(__name__).info("%s is not linear: each request steps its own copy", type(view.scheduler).__name__)
        count = len(view.scheduler.timesteps)
        indices = tuple(range(count - len(timesteps), count))
        return CachedScheduler(view.scheduler, timesteps, tuple(timesteps.tolist()), schedule, levels, indices)

    def _check(self, request: Request) -> None:
        """Raises InvalidField if the request has no steps, or a scheduler that the model does not support."""
        self._check_name(request)
        if self._first_steps(request) == 0:
            raise no_step(request)

    def _check_name(self, request: Request) -> None:
        if request.scheduler is not None and request.scheduler not in self.names:
            raise InvalidField("scheduler", f"this model does not support '{request.scheduler}'")

    def _key(self, request: Request) -> Hashable:
        """The key of a request's cached scheduler."""
        return request.scheduler, request.num_inference_steps, self._first_steps(request)

    def _first_steps(self, request: Request) -> int:
        """How many of num_inference_steps run at this strength: diffusers' rule."""
        return min(int(request.num_inference_steps * request.strength), request.num_inference_steps)

    def _scheduler(self, name: str | None) -> Any:
        """The scheduler of that name, made once: some classes compute all training timesteps when they are made."""
        if name not in self._schedulers:
            self._schedulers[name] = registry.make(name, self._pipe.scheduler)
        return self._schedulers[name]

    def _set(self, view: Any, request: Request, device: torch.device) -> torch.Tensor:
        """Sets the timesteps and begin index of `view`'s scheduler, and returns the timesteps to run."""
        view.scheduler.set_timesteps(request.num_inference_steps, device=device)
        timesteps: torch.Tensor
        timesteps, _ = view.get_timesteps(request.num_inference_steps, request.strength, device)
        return timesteps


def size_of(value: object, known: set[int] | None = None) -> int:
    """Bytes of an object and everything that it references, each object once, with the storage of tensors and arrays. Classes,
    modules and functions are not counted."""
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
