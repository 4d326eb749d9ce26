"""Scheduler caches count the bytes that they keep."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from fakes import make_request
from img2img_server.runtime.schedulers import cache
from img2img_server.runtime.schedulers.cache import SchedulerCache, size_of


class Pipe:
    """The part of a diffusers pipeline that scheduler caches use."""

    def __init__(self) -> None:
        self.scheduler = EulerDiscreteScheduler()

    def get_timesteps(self, steps: int, strength: float, device: torch.device) -> tuple[torch.Tensor, int]:
        first = max(steps - int(steps * strength), 0)
        self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:], steps - first


def test_scheduler_cache_stays_within_its_byte_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached scheduler of one step has the whole of its scheduler, too."""
    monkeypatch.setattr(cache, "_BYTES", 2**18)
    kept = SchedulerCache(Pipe())
    for steps in range(1, 11):
        for first in range(steps):
            kept.get(make_request(num_inference_steps=steps, strength=(steps - first) / steps))
    held: list[Any] = [value for value, _ in kept._cache._entries.values()]
    assert kept._cache.stats.evictions > 0
    assert sum(len(pickle.dumps(value)) for value in held) <= 1.5 * 2**18


def test_sizes_count_shared_storage_once_and_include_nested_objects() -> None:
    tensor = torch.zeros(1000)
    assert 4000 <= size_of(tensor) < 4500
    assert size_of(tensor[:1]) >= 4000, "a view holds the whole storage"
    assert 4000 <= size_of([tensor, tensor]) < 5000
    assert size_of(SimpleNamespace(a={"b": (tensor,)})) >= 4000
    assert size_of(torch.Tensor) == size_of(size_of) == 0
