"""Measures a model before it is served: what a call takes by batch size and pixels, so that batches are as large as pays."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from PIL import Image

from img2img_server.engine.costs import Costs, Stage
from img2img_server.engine.request import Pipeline, Request

_log = logging.getLogger(__name__)

_REPEATS = 4
"""Calls of each batch, of which the quickest counts."""

_R = TypeVar("_R")


class WarmUp:
    """Runs batches of 1, 2, 4 ... rows at the model's native size and at half of it, and notes their times in `costs`.

    Goes on for about `budget` seconds: no batch is begun that would, at the pace of the last one, end after that. At 0 nothing
    is done, and then costs are learnt from the requests themselves.
    """

    def __init__(self, costs: Costs, max_batch_size: int, budget: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._costs = costs
        self._max_batch_size = max_batch_size
        self._budget = budget
        self._clock = clock
        self._end = 0.0

    def run(self, name: str, pipeline: Pipeline) -> None:
        """Measures one model that can be measured. One that runs a single request at a time has no batches to measure.

        A batch that fails is not tried again. Raises what the model raises for a single row: it cannot be served.
        """
        limit = min(self._max_batch_size, pipeline.max_rows or self._max_batch_size)
        self._end = self._clock() + self._budget
        if limit < 2 or not pipeline.measurable:
            return
        for divisor in (1, 2):
            multiple = pipeline.size_multiple
            width, height = (max(side // divisor // multiple, 1) * multiple for side in pipeline.native_size)
            request = Request(name, Image.new("RGB", (width, height), "gray"), "", "", 1.0, 1, 1.0, (0,))
            took, rows = 0.0, 1
            while rows <= limit and self._clock() + 2 * took < self._end:
                before = self._clock()
                try:
                    self._measure(pipeline, request, rows)
                except Exception:  # whatever a model raises: most likely that there is no room for that many
                    if rows == 1:
                        raise
                    _log.warning("model '%s' failed on %d rows of %d x %d", name, rows, width, height, exc_info=True)
                    self._costs.forbid(name, width * height, rows)
                    break
                took = self._clock() - before
                rows *= 2

    def _measure(self, pipeline: Pipeline, request: Request, rows: int) -> None:
        """Times one batch from end to end."""
        states: list[Any] = []

        def release() -> None:
            while states:
                pipeline.release(states.pop())

        def prepare() -> None:
            release()
            states.extend(pipeline.prepare([request] * rows))

        try:
            self._timed("prepare", pipeline, request, rows, prepare)
            noises = self._timed("denoise", pipeline, request, rows, lambda: pipeline.denoise(states))
            pipeline.advance(states, noises)
            self._timed("finish", pipeline, request, 1, lambda: pipeline.finish(states[:1]))
        finally:
            release()

    def _timed(self, stage: Stage, pipeline: Pipeline, request: Request, rows: int, work: Callable[[], _R]) -> _R:
        """Notes the quickest of a few times: the first call of a size is not what it takes later, nor one that was disturbed."""
        times: list[float] = []
        while not times or (len(times) < _REPEATS and self._clock() < self._end):
            begun = self._clock()
            result = work()
            times.append(self._clock() - begun)
        plan = pipeline.plan(request)
        self._costs.measured(stage, (request.model, plan.shape), plan.pixels, rows, min(times))
        return result
