"""Measures a model before it is served: what a call takes by batch size and pixels, so that batches are as large as pays."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from PIL import Image

from img2img_server.engine.costs import Measured, Stage, Timing
from img2img_server.engine.executor import CallsInFlight
from img2img_server.engine.request import Pipeline, Request
from img2img_server.support.device_lock import recording_at_once

_log = logging.getLogger(__name__)

_ROUNDS = 7
"""Rounds at the most. In each, every batch is run once: a median of 7 is right while 3 are disturbed."""
_FEW_ROUNDS = 3
"""Rounds that there is to be time for before one more batch size is tried. The median of 3 is right while 1 is disturbed."""

_SURPRISE = 1.5
"""Times longer than was expected that a batch takes if it is run once more."""

_TOGETHER = 4
"""Images that are encoded or decoded in one call while calls are recorded."""

Size = tuple[int, int]
"""Width and height in pixels."""

_R = TypeVar("_R")


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch size at one image size. `seconds` has the times of its stages in each round; `first` those of the first call,
    which is slower, as memory is allocated and kernels are chosen in it."""

    request: Request
    rows: int
    first: dict[Stage, float] = field(default_factory=dict)
    seconds: dict[Stage, list[float]] = field(default_factory=dict)

    @property
    def took(self) -> float:
        """Seconds that running it once more is expected to take."""
        return sum(min(self.first[stage], *self.seconds.get(stage, (self.first[stage],))) for stage in self.first)

    @property
    def rounds(self) -> int:
        """How many rounds it was in."""
        return len(self.seconds.get("denoise", ()))

    def add(self, times: dict[Stage, float]) -> None:
        """Notes the times of one round."""
        for stage, seconds in times.items():
            self.seconds.setdefault(stage, []).append(seconds)


class WarmUp:
    """Runs batches of 1, 2, 4 ... rows at the model's native size and at half of it, in rounds.

    In each round every batch is run once, alternately forwards and backwards: other load on the machine slows all of them alike,
    and what each takes is a median over the rounds, so a call that is held up changes nothing. Goes on for about `budget`
    seconds; at 0 nothing is done, and costs are learnt from the requests themselves. `in_flight` sees each call. Calls of
    `sizes`, width and height in pixels, are recorded, too.
    """

    def __init__(
        self,
        max_batch_size: int,
        budget: float,
        clock: Callable[[], float] = time.monotonic,
        in_flight: CallsInFlight | None = None,
        sizes: Sequence[Size] = (),
    ) -> None:
        self._max_batch_size = max_batch_size
        self._sizes = sizes
        self._budget = budget
        self._clock = clock
        self._in_flight = in_flight or CallsInFlight(clock)

    def measure(self, name: str, pipeline: Pipeline) -> Measured:
        """Measures one model that can be measured. One that runs a single request at a time has no batches to measure.

        A batch that fails is not tried again. Raises what the model raises for a single row: it cannot be served.
        """
        limit = self._limit(pipeline)
        full = self.record(name, pipeline)
        if limit < 2 or not pipeline.measurable:
            return Measured()
        end = self._clock() + self._budget
        batches: list[_Batch] = []
        for size in _measured_sizes(pipeline):
            request = _request(name, size)
            rows, took = 1, 0.0
            pixels = request.image.width * request.image.height
            while rows <= limit and self._is_time(batches, took, end):
                if any(pixels * rows >= size * count for size, count in full):
                    break
                batch = _Batch(request, rows)
                try:
                    batch.first = self._first(pipeline, batch, took, end)
                except Exception as error:  # a model may raise anything; most likely memory ran out
                    if rows == 1:
                        raise
                    _log.warning("model '%s' failed on %d rows of %d x %d: %s", name, rows, *request.image.size, error)
                    _log.debug("where it failed", exc_info=True)
                    full.append((pixels, rows))
                    break
                if not batch.first:
                    break
                batches.append(batch)
                took, rows = 2 * batch.took, 2 * rows
        self._take_rounds(pipeline, batches, end)
        # A round that was not finished counts for none: all medians are to be over the same time.
        rounds = min((batch.rounds for batch in batches), default=0)
        timings = (timing for batch in batches for timing in _timings(pipeline, batch, rounds))
        return Measured(tuple(timings), tuple(full))

    def check(self, name: str, pipeline: Pipeline) -> None:
        """Runs one row once, for a model whose costs are known, and records its calls. Raises what the model raises."""
        if self._budget > 0 and pipeline.measurable:
            self.record(name, pipeline)
            self._once(pipeline, _Batch(_request(name, pipeline.native_size), 1))

    def record(
        self, name: str, pipeline: Pipeline, run: Callable[[Callable[[], None]], None] = lambda work: work()
    ) -> list[tuple[int, int]]:
        """Has each call that is padded be recorded, at the sizes that are measured and at `sizes`; nothing if the budget is 0.

        `run` runs what it is given, on the thread that serves: recordings belong to it. After a batch that fails no larger one of
        that size is tried, and in the end all others are recorded again, as recordings are dropped when memory runs out. Returns
        the pixels and rows of what failed. Raises what the model raises for the smallest of a size that is measured.
        """
        full: list[tuple[int, int]] = []
        if self._budget <= 0:
            return full
        measured, done = _measured_sizes(pipeline), []
        for size in dict.fromkeys((*measured, *(_rounded(each, pipeline) for each in self._sizes))):
            for rows in _recorded_rows(pipeline, self._limit(pipeline)):
                requests = list(_filling(name, pipeline, size, rows))
                try:
                    run(lambda requests=requests: self._record(pipeline, requests))  # type: ignore[misc]
                except Exception as error:  # a model may raise anything; most likely memory ran out
                    if rows == 1 and size in measured:
                        raise
                    _log.warning("model '%s': calls of %d rows of %d x %d are not recorded: %s", name, rows, *size, error)
                    full.append((size[0] * size[1], rows))
                    break
                done.append(requests)
        for requests in done if full else ():
            try:
                run(lambda requests=requests: self._record(pipeline, requests))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - memory may not suffice for all recordings: the others are recorded when they are called
                _log.warning("model '%s': calls of %d rows are not recorded: %s", name, _rows(pipeline, requests), error)
        return full

    def _record(self, pipeline: Pipeline, requests: Sequence[Request]) -> None:
        """Makes each call of a batch of one step under `recording_at_once`."""
        states: list[Any] = []
        with self._in_flight.call("warm-up (recording)", requests[0].model, len(requests)), recording_at_once():
            try:
                for start in range(0, len(requests), _TOGETHER):
                    states += pipeline.prepare(requests[start : start + _TOGETHER])
                pipeline.advance(states, pipeline.denoise(states))
                pipeline.finish(states[:_TOGETHER])
            finally:
                for state in states:
                    pipeline.release(state)

    def _limit(self, pipeline: Pipeline) -> int:
        """The most rows of one call."""
        return min(self._max_batch_size, pipeline.max_rows or self._max_batch_size)

    def _is_time(self, batches: Sequence[_Batch], took: float, end: float) -> bool:
        """Whether one more batch, which is expected to take `took` seconds, can be run once and then in a few rounds."""
        round_seconds = took + sum(batch.took for batch in batches)
        return self._clock() + took + (_FEW_ROUNDS * round_seconds if batches else 0.0) < end

    def _first(self, pipeline: Pipeline, batch: _Batch, expected: float, end: float) -> dict[Stage, float]:
        """Runs a batch for the first time; twice if that took much longer than `expected`: how many batches are measured
        must not depend on a call that is held up. Returns the seconds of its stages; nothing if there is no time for the second
        time, as that call alone says nothing of a batch, except of a single row."""
        first = self._once(pipeline, batch)
        took = sum(first.values())
        if took <= _SURPRISE * expected:
            return first
        if self._clock() + took >= end:
            return first if batch.rows == 1 else {}
        again = self._once(pipeline, batch)
        return {stage: min(seconds, again[stage]) for stage, seconds in first.items()}

    def _take_rounds(self, pipeline: Pipeline, batches: Sequence[_Batch], end: float) -> None:
        for number in range(_ROUNDS):
            for batch in reversed(batches) if number % 2 else batches:
                if self._clock() + batch.took >= end:
                    return
                batch.add(self._once(pipeline, batch))

    def _once(self, pipeline: Pipeline, batch: _Batch) -> dict[Stage, float]:
        """Runs a batch of one step from end to end. Returns the seconds of its stages."""
        times: dict[Stage, float] = {}
        states: Sequence[Any] = ()

        def timed(stage: Stage, work: Callable[[], _R]) -> _R:
            with self._in_flight.call(f"warm-up ({stage})", batch.request.model, batch.rows, batch.rows):
                begun = self._clock()
                result = work()
                if (wait := pipeline.mark()) is not None:
                    wait()
                times[stage] = self._clock() - begun
            return result

        try:
            states = timed("prepare", lambda: pipeline.prepare([batch.request] * batch.rows))
            noises = timed("denoise", lambda: pipeline.denoise(states))
            pipeline.advance(states, noises)
            if batch.rows == 1:
                timed("finish", lambda: pipeline.finish(states))
        finally:
            for state in states:
                pipeline.release(state)
        return times


def _measured_sizes(pipeline: Pipeline) -> list[Size]:
    """The model's native size, and half of it."""
    return [
        _rounded((width // divisor, height // divisor), pipeline)
        for divisor in (1, 2)
        for width, height in [pipeline.native_size]
    ]


def _rounded(size: Size, pipeline: Pipeline) -> Size:
    """The nearest size below that the pipeline can draw."""
    width, height = (max(side // pipeline.size_multiple, 1) * pipeline.size_multiple for side in size)
    return width, height


def _request(name: str, size: Size) -> Request:
    """A request of one step."""
    return Request(name, Image.new("RGB", size, "gray"), "", "", 1.0, 1, 1.0, (0,))


def _recorded_rows(pipeline: Pipeline, limit: int) -> Iterator[int]:
    """Rows of up to `limit`, one for each bucket that a call of so many may be padded to."""
    before = 0
    for bucket in pipeline.row_buckets:
        if before < limit:
            yield min(bucket, limit)
        before = bucket


def _rows(pipeline: Pipeline, requests: Sequence[Request]) -> int:
    return sum(pipeline.plan(request).rows for request in requests)


def _filling(name: str, pipeline: Pipeline, size: Size, rows: int) -> Iterator[Request]:
    """Requests of `rows` rows in all, guided ones as far as that goes. Each has a scope of its own, so that its texts are
    encoded."""
    plain = _request(name, size)
    guided = replace(plain, guidance_scale=2.0, negative_prompt="warm-up")
    for number in range(rows):
        request = guided if pipeline.plan(guided).rows <= rows else plain
        rows -= pipeline.plan(request).rows
        yield replace(request, cache_scope=f"warm-up {number}")
        if not rows:
            return


def _timings(pipeline: Pipeline, batch: _Batch, rounds: int) -> list[Timing]:
    """What the stages of a batch take in so many rounds: of a few the first call counts, too, and of two times the shorter."""
    plan = pipeline.plan(batch.request)
    timings = []
    for stage, first in batch.first.items():
        seconds = batch.seconds.get(stage, [])[:rounds]
        enough = seconds if rounds >= _FEW_ROUNDS else [*seconds, first]
        timings.append(Timing(stage, plan.shape, plan.pixels, batch.rows, statistics.median_low(enough)))
    return timings
