"""Keeps measured costs on disk, so that a model is measured only once on a machine."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2img_server.bundle.manifest import MANIFEST_NAME, sha256_of
from img2img_server.engine.costs import STAGES, Measured, Timing
from img2img_server.engine.measurements import Measurements
from img2img_server.engine.request import Pipeline

_log = logging.getLogger(__name__)

_FORMAT = 1
_MOST_NUMBER = 2**40
_MOST_SECONDS = 1e6


class CostStore:
    """Keeps the measurements of warm-up in the folder `root`, one file for each model and machine.

    `facts` are JSON values that costs depend on besides the bundle and its engine: machine, versions and settings. Costs for
    other facts are not found; a damaged file is ignored and written again. Nothing here raises: if the disk is full or read-only,
    the next start measures again.
    """

    def __init__(self, root: Path, facts: Mapping[str, Any]) -> None:
        self._kept = Measurements(root)
        self._facts = facts

    def find(self, bundle: Path | None, pipeline: Pipeline) -> Measured | None:
        """The costs of the model in the folder `bundle`, None if there is no valid file."""
        try:
            return _parse(self._kept.find(self._key(bundle, pipeline)))
        except OSError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            _log.info("the costs of %s are invalid and are measured again: %s", bundle, error)
            return None

    def keep(self, bundle: Path | None, pipeline: Pipeline, measured: Measured) -> None:
        """Writes the costs of the model in the folder `bundle`, atomically."""
        if not measured.timings:
            return
        try:
            self._kept.keep(self._key(bundle, pipeline), _values(measured))
        except OSError as error:
            _log.warning("measured costs are not kept in %s (%s): the next start measures again", self._kept.root, error.strerror)

    def _key(self, bundle: Path | None, pipeline: Pipeline) -> dict[str, Any]:
        if bundle is None:
            raise FileNotFoundError("the model has no bundle")
        key = {
            "format": _FORMAT,
            "bundle": sha256_of(bundle / MANIFEST_NAME),
            "engine": pipeline.engine,
            "max_rows": pipeline.max_rows,
        }
        return {**self._facts, **key}


def _values(measured: Measured) -> dict[str, Any]:
    timings = [[one.stage, one.shape, one.pixels, one.rows, one.seconds] for one in measured.timings]
    return {"timings": timings, "full": measured.full}


def _parse(content: Mapping[str, Any]) -> Measured:
    """Parses kept values. Raises ValueError, TypeError or KeyError for anything that `_values` does not make."""
    timings = tuple(_timing(*one) for one in content["timings"])
    if not timings:
        raise ValueError("it has no timings")
    return Measured(timings, tuple((_number(pixels), _number(rows)) for pixels, rows in content["full"]))


def _timing(stage: Any, shape: Any, pixels: Any, rows: Any, seconds: Any) -> Timing:
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is not a stage")
    if type(seconds) not in (int, float) or not 0 <= seconds <= _MOST_SECONDS:
        raise ValueError(f"{seconds!r} is not a time")
    if not isinstance(shape, list):
        raise TypeError(f"{shape!r} is not a shape")
    return Timing(stage, tuple(map(_number, shape)), _number(pixels), _number(rows), float(seconds))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MOST_NUMBER:
        raise ValueError(f"{value!r} is not a size")
    return value
