"""Measures a model's calls by batch size and pixels before it is served, so that the engine knows which batch sizes pay."""

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
from img2img_server.support.device_lock import measuring, recording_at_once

_log = logging.getLogger(__name__)

_ROUNDS = 7
"""Maximum rounds. Each runs every batch once; the median of 7 tolerates 3 disturbed ones."""
_FEW_ROUNDS = 3
"""Rounds that must fit into the remaining time before another batch size is tried. The median of 3 tolerates a disturbed one."""

_SURPRISE = 1.5
"""A batch's first run is repeated if it takes more than this many times the expected time."""

_TOGETHER = 4
"""Images encoded or decoded in one call during recording."""

Size = tuple[int, int]
"""Width and height in pixels."""

_R = TypeVar("_R")


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch size at one image size. `seconds` are the times of its stages in each round; `first` those of the first call, which
    is slower, because it allocates memory and chooses kernels."""

    request: Request
    rows: int
    first: dict[Stage, float] = field(default_factory=dict)
    seconds: dict[Stage, list[float]] = field(default_factory=dict)

    @property
    def took(self) -> float:
        """The expected seconds of another run."""
        return sum(min(self.first[stage], *self.seconds.get(stage, (self.first[stage],))) for stage in self.first)

    @property
    def rounds(self) -> int:
        """The number of rounds that it was run in."""
        return len(self.seconds.get("denoise", ()))

    def add(self, times: dict[Stage, float]) -> None:
        """Adds the times of one round."""
        for stage, seconds in times.items():
            self.seconds.setdefault(stage, []).append(seconds)


class WarmUp:
    """Runs batches of 1, 2, 4 ... rows at the model's native size and at half of it, in rounds.

    Each round runs every batch once, in alternating order, so that other load on the machine slows all of them alike. The result
    is the median over the rounds, which ignores single delayed calls. Takes about `budget` seconds; with 0 it does nothing, and
    costs are learnt from requests. `in_flight` tracks each call. Calls of `sizes`, (width, height) in pixels, are recorded too.
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
        """Measures one model, if it is measurable and supports batches.

        A batch that fails is not retried. Raises the model's error if a single row fails, since it cannot be served.
        """
        limit = self._limit(pipeline)
        full = self.record(name, pipeline)
        if limit < 2 or not pipeline.measurable:
            return Measured()
        with measuring():
            return self._measured(name, pipeline, limit, full)

    def _measured(self, name: str, pipeline: Pipeline, limit: int, full: list[tuple[int, int]]) -> Measured:
        requests = [_request(name, size) for size in _measured_sizes(pipeline)]
        if self._budget > 0:
            for request in requests:
                pipeline.plan(request)  # opens the graphs, which is not measured
        end = self._clock() + self._budget
        batches: list[_Batch] = []
        for request in requests:
            rows, took = 1, 0.0
            pixels = request.image.width * request.image.height
            while rows <= limit and self._is_time(batches, took, end):
                if any(pixels * rows >= size * count for size, count in full):
                    break
                batch = _Batch(request, rows)
                try:
                    batch.first = self._first(pipeline, batch, took, end)
                except Exception as error:  # a model may raise any exception; most likely memory ran out
                    if rows == 1:
                        raise
                    _log.warning("model '%s' failed on %d rows of %d x %d: %s", name, rows, *request.image.size, error)
                    _log.debug("traceback of the failure", exc_info=True)
                    full.append((pixels, rows))
                    break
                if not batch.first:
                    break
                batches.append(batch)
                took, rows = 2 * batch.took, 2 * rows
        self._take_rounds(pipeline, batches, end)
        # Unfinished rounds are ignored, so that all medians cover the same period.
        rounds = min((batch.rounds for batch in batches), default=0)
        timings = (timing for batch in batches for timing in _timings(pipeline, batch, rounds))
        return Measured(tuple(timings), tuple(full))

    def check(self, name: str, pipeline: Pipeline) -> None:
        """Runs one request once, for a model whose costs are known, and records its calls: a guided one if the model has
        guidance, as most are, which needs no further graph. Raises the model's errors."""
        if self._budget > 0 and pipeline.measurable:
            self.record(name, pipeline)
            guided = replace(_request(name, pipeline.native_size), guidance_scale=2.0, negative_prompt="warm-up")
            self._once(pipeline, _Batch(guided, 1))

    def record(
        self, name: str, pipeline: Pipeline, run: Callable[[Callable[[], None]], None] = lambda work: work()
    ) -> list[tuple[int, int]]:
        """Records the padded calls (CUDA graphs) at the measured sizes and at `sizes`; does nothing if the budget is 0.

        `run` runs a function on the serving thread, which recordings belong to. After a batch fails, larger ones of its size are
        skipped, and at the end the others are recorded again, because recordings are dropped when memory runs out. Returns the
        pixels and rows of failed batches. Raises the model's error if the smallest batch of a measured size fails.
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
                except Exception as error:  # a model may raise any exception; most likely memory ran out
                    if rows == 1 and size in measured:
                        raise
                    _log.warning("model '%s': calls of %d rows of %d x %d are not recorded: %s", name, rows, *size, error)
                    full.append((size[0] * size[1], rows))
                    break
                done.append(requests)
        for requests in done if full else ():
            try:
                run(lambda requests=requests: self._record(pipeline, requests))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001 - without memory for all, the others are recorded on first use
                _log.warning("model '%s': calls of %d rows are not recorded: %s", name, _rows(pipeline, requests), error)
        return full

    def _record(self, pipeline: Pipeline, requests: Sequence[Request]) -> None:
        """Runs each stage of a batch with one step under `recording_at_once`."""
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
        """The maximum rows of one call."""
        return min(self._max_batch_size, pipeline.max_rows or self._max_batch_size)

    def _is_time(self, batches: Sequence[_Batch], took: float, end: float) -> bool:
        """Whether there is time to run another batch, expected to take `took` seconds, once and then in a few rounds."""
        round_seconds = took + sum(batch.took for batch in batches)
        return self._clock() + took + (_FEW_ROUNDS * round_seconds if batches else 0.0) < end

    def _first(self, pipeline: Pipeline, batch: _Batch, expected: float, end: float) -> dict[Stage, float]:
        """Runs a batch for the first time, and again if that took much longer than `expected`: a single delayed call must not
        reduce the number of measured batches. Returns the seconds of its stages; empty if there is no time for the second run,
        because the first alone is not meaningful, except for a single row."""
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
        """Runs a batch with one step through all stages. Returns their seconds."""
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
    """The size rounded down to the pipeline's `size_multiple`."""
    width, height = (max(side // pipeline.size_multiple, 1) * pipeline.size_multiple for side in size)
    return width, height


def _request(name: str, size: Size) -> Request:
    """A request of one step."""
    return Request(name, Image.new("RGB", size, "gray"), "", "", 1.0, 1, 1.0, (0,))


def _recorded_rows(pipeline: Pipeline, limit: int) -> Iterator[int]:
    """Row counts of up to `limit`, one for each bucket that calls may be padded to."""
    before = 0
    for bucket in pipeline.row_buckets:
        if before < limit:
            yield min(bucket, limit)
        before = bucket


def _rows(pipeline: Pipeline, requests: Sequence[Request]) -> int:
    return sum(pipeline.plan(request).rows for request in requests)


def _filling(name: str, pipeline: Pipeline, size: Size, rows: int) -> Iterator[Request]:
    """Requests of `rows` rows in total, guided ones if possible. Each has its own cache scope, so that its texts are encoded."""
    plain = _request(name, size)
    guided = replace(plain, guidance_scale=2.0, negative_prompt="warm-up")
    for number in range(rows):
        request = guided if pipeline.plan(guided).rows <= rows else plain
        rows -= pipeline.plan(request).rows
        yield replace(request, cache_scope=f"warm-up {number}")
        if not rows:
            return


def _timings(pipeline: Pipeline, batch: _Batch, rounds: int) -> list[Timing]:
    """The median times of a batch's stages over `rounds` rounds. If there are few, the first call counts too."""
    plan = pipeline.plan(batch.request)
    timings = []
    for stage, first in batch.first.items():
        seconds = batch.seconds.get(stage, [])[:rounds]
        enough = seconds if rounds >= _FEW_ROUNDS else [*seconds, first]
        timings.append(Timing(stage, plan.shape, plan.pixels, batch.rows, statistics.median_low(enough)))
    return timings
