"""Measures which of several ways to run a bundle is the fastest on this machine, and keeps the times on disk.

Each way is loaded and draws a reference image of the bundle a few times, for seconds. Later starts of the same bundle on the same
machine, with the same versions and settings, load the fastest way at once.
"""

import contextlib
import gc
import importlib.metadata
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from img2img_server.bundle.manifest import Manifest
from img2img_server.engine.measurements import Measurements
from img2img_server.engine.request import Pipeline, Request, run_alone
from img2img_server.errors import BundleError, OutOfMemory
from img2img_server.runtime import accuracy_check
from img2img_server.runtime.common import cpu
from img2img_server.runtime.execution import Execution
from img2img_server.support.device_lock import measuring
from img2img_server.support.distribution import user_cache, version

_log = logging.getLogger(__name__)

_FOLDER = "choices"
_FORMAT = 1
_DRAWS = 3
_MOST_SECONDS = 10.0
"""Seconds of a way's timed draws after which no further one starts."""

Ways = Mapping[str, Callable[[], Pipeline]]
"""Functions that load a bundle, by the way's name. The last way is taken if nothing can be measured."""


def cache_root(execution: Execution) -> Path | None:
    """The folder of built engines and measurements; None for a user without a home."""
    try:
        return execution.cache or user_cache("engines")
    except RuntimeError:
        return None


def fastest(
    bundle: Path, manifest: Manifest, execution: Execution, threads: int, ways: Ways, clock: Callable[[], float] = time.monotonic
) -> Pipeline:
    """Loads the bundle in the fastest way, after measuring all if that was not done before.

    A way that does not load or draw (accuracy_check.CANNOT_DRAW) is left out. Raises the last one's error if there is no other,
    and OutOfMemory if any way runs out of memory.
    """
    cases = accuracy_check.cases(manifest, bundle)[:1]
    if not cases or len(ways) == 1:
        return list(ways.values())[-1]()
    store = _Store(cache_root(execution), _key(manifest, execution, threads, ways))
    seconds = store.find()
    if seconds is not None:
        try:
            return _chosen(bundle, ways, seconds, "measured before")
        except BundleError as error:
            _log.warning("%s: the way that was fastest before does not load: %s", bundle.name, error)
    held: list[Pipeline] = []
    seconds = _measure(bundle, cases[0].request, ways, clock, held)
    store.keep(seconds)
    if held and list(ways)[-1] == min(seconds, key=lambda name: seconds[name]):
        _report(bundle, seconds, "measured now")
        return held.pop()
    free(held)
    return _chosen(bundle, ways, seconds, "measured now")


def free(held: list[Pipeline]) -> None:
    """Closes the pipelines and frees their memory, if there are no other references to them."""
    while held:
        held.pop().close()
    gc.collect()


def _measure(bundle: Path, request: Request, ways: Ways, clock: Callable[[], float], held: list[Pipeline]) -> dict[str, float]:
    """The seconds of each way that draws. The last way's pipeline is in `held` afterwards, if it draws."""
    seconds: dict[str, float] = {}
    failure: Exception | None = None
    for name, load in ways.items():
        free(held)  # one pipeline in memory at a time
        try:
            held.append(load())
            with measuring():
                seconds[name] = _time(held[0], request, clock)
        except OutOfMemory:
            free(held)
            raise
        except accuracy_check.CANNOT_DRAW as error:
            _log.warning("%s: %s cannot run it: %s", bundle.name, name, error)
            failure = error.with_traceback(None)  # whose frames refer to the pipeline
            free(held)
    if not seconds:
        assert failure is not None, "each way was measured or failed"
        raise failure
    return seconds


def _chosen(bundle: Path, ways: Ways, seconds: Mapping[str, float], when: str) -> Pipeline:
    _report(bundle, seconds, when)
    return ways[min(seconds, key=lambda name: seconds[name])]()


def _report(bundle: Path, seconds: Mapping[str, float], when: str) -> None:
    best, *others = sorted(seconds.items(), key=lambda item: item[1])
    compared = "".join(f", {name} {took:.3g} s ({took / best[1]:.2f} times as long)" for name, took in others)
    _log.info("%s: %s is the fastest here: %.3g s for a reference image%s; %s", bundle.name, *best, compared, when)


def _time(pipeline: Pipeline, request: Request, clock: Callable[[], float]) -> float:
    """The least seconds of a few draws, after one that is not timed."""
    run_alone(pipeline, request)
    begun = clock()
    taken: list[float] = []
    while len(taken) < _DRAWS and (not taken or clock() - begun < _MOST_SECONDS):
        started = clock()
        run_alone(pipeline, request)
        taken.append(clock() - started)
    return max(min(taken), 1e-9)


def _key(manifest: Manifest, execution: Execution, threads: int, ways: Ways) -> dict[str, Any]:
    """Everything that the times depend on."""
    versions = {"img2img": version(), "diffusers": importlib.metadata.version("diffusers")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["openvino"] = importlib.metadata.version("openvino")
    return {
        "format": _FORMAT,
        "bundle": manifest.digest,
        "machine": cpu.machine(),
        "versions": versions,
        "threads": threads,
        "execution": {name: str(value) for name, value in asdict(execution).items() if name != "cache"},
        "ways": list(ways),
    }


class _Store:
    """The seconds of each way, by key. Nothing here raises: without a file, the next start measures again."""

    def __init__(self, root: Path | None, key: Mapping[str, Any]) -> None:
        self._key = key
        self._kept = None if root is None else Measurements(root / _FOLDER)

    def find(self) -> dict[str, float] | None:
        """The seconds by way; None if there is no valid file."""
        if self._kept is None:
            return None
        try:
            kept = self._kept.find(self._key)["seconds"]
            seconds = {name: float(kept[name]) for name in kept}
            known = set(seconds) <= set(self._key["ways"])
            return seconds if known and seconds and all(map(_is_time, seconds.values())) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Writes the seconds."""
        if self._kept is None:
            return
        try:
            self._kept.keep(self._key, {"seconds": seconds})
        except OSError as error:
            _log.warning("the fastest way is not kept in %s (%s): the next start measures again", self._kept.root, error.strerror)


def _is_time(value: float) -> bool:
    return math.isfinite(value) and value > 0
