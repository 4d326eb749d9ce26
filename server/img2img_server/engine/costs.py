"""The durations of model calls, measured at warm-up and updated by every call after that."""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Group = tuple[str, Hashable]
"""Model and shape."""
Stage = Literal["prepare", "denoise", "finish"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages whose calls are measured."""

_WEIGHT = 0.1
"""The weight of the newest time in a running mean."""
_PACE_WEIGHT = 0.1
"""The weight of the newest call in the running mean of the machine's pace."""
_DOUBT = 2.0
"""A call counts as at most this many times slower or faster than expected, which limits the effect of outliers."""
_INSTANT = 1e-9
"""A lower bound of expected seconds, which avoids division by zero."""
_GAIN = 0.04
"""A larger batch pays if it saves this share of the time per row."""
_PATIENCE = 1000
"""Calls of a stage after which a size that ran out of memory is retried: other processes may have used the memory before. The
number doubles after each failure, so failures cost less than a thousandth of all calls."""
_CURIOSITY = 32
"""Full batches of a shape after which a larger one than pays is tried once, because its measurement may have been disturbed."""
_SAMPLES = 3
"""Trials of a batch size before their median replaces its estimated cost."""
_MOST_SHAPES = 256
"""Maximum shapes stored per model and stage, since callers choose them."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of a call of one stage with `rows` rows of `pixels` pixels each."""

    stage: Stage
    shape: Hashable
    pixels: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Results of a model's warm-up: its timings, and the pixels and rows of batches that failed."""

    timings: tuple[Timing, ...] = ()
    full: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Trials:
    """Trials of batches larger than pays, and their times.

    After `patience` full batches of `base` rows, one of up to `allowed` rows is tried once, if enough requests wait. After
    `_SAMPLES` trials of a size the next larger one is tried; after all of them, patience doubles.
    """

    patience: int = _CURIOSITY
    calls: int = 0
    base: int = 0
    allowed: int = 0
    beyond: int = 0
    samples: dict[int, list[float]] = field(default_factory=dict)

    def note(self, rows: int, seconds: float, cap: int, form: list[int]) -> float | None:
        """Records a call of `rows` rows; `form` are the measured batch sizes. Returns the median of a size's trials once there
        are enough."""
        if self.allowed and rows > self.base:
            self.allowed = self.calls = 0
            samples = self.samples.setdefault(rows, [])
            samples.append(seconds)
            if len(samples) < _SAMPLES:
                return None
            self.beyond = rows
            return sorted(self.samples.pop(rows))[_SAMPLES // 2]
        if rows >= cap:
            self.calls += 1
        if self.calls >= self.patience and not self.allowed:
            self._allow(max(cap, rows), form)
        return None

    def _allow(self, base: int, form: list[int]) -> None:
        larger = next((rows for rows in form if rows > max(base, self.beyond)), None)
        if larger is None:  # all of them were tried
            self.calls, self.beyond, self.patience = 0, 0, 2 * self.patience
        else:
            self.base, self.allowed = base, larger


@dataclass(slots=True)
class _Curve:
    """Mean seconds of a call by its rows, for one stage, model and shape. `rows` is sorted."""

    pixels: int
    rows: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    trials: _Trials = field(default_factory=_Trials)

    def set(self, rows: int, seconds: float) -> None:
        """Sets the mean of calls of `rows` rows to `seconds`."""
        index = bisect_left(self.rows, rows)
        if index == len(self.rows) or self.rows[index] != rows:
            self.rows.insert(index, rows)
            self.means.insert(index, seconds)
        self.means[index] = seconds

    def record(self, rows: int, seconds: float, expected: float) -> None:
        """Records a call. For a new batch size, the expectation has the same weight as its first time."""
        if rows not in self.rows:
            return self.set(rows, (seconds + expected) / 2)
        index = bisect_left(self.rows, rows)
        self.means[index] += _WEIGHT * (seconds - self.means[index])

    def paying(self, most: int | None = None) -> int:
        """The largest batch that pays, of up to `most` rows: no larger one saves `_GAIN` of its time per row."""
        chosen, best = self.rows[0], self.means[0] / self.rows[0]
        for rows, mean in zip(self.rows[1:], self.means[1:], strict=True):
            if (most is None or rows <= most) and mean / rows < best * (1 - _GAIN):
                chosen, best = rows, mean / rows
        return chosen

    def seconds(self, rows: int) -> float:
        """Interpolates between two measured batches, and extrapolates outside of them.

        If only one batch size was measured, all are assumed to take as long, so that larger ones are tried and measured.
        """
        if len(self.rows) == 1:
            return self.means[0]
        index = min(max(bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        left, right = self.rows[index - 1], self.rows[index]
        rise = (self.means[index] - self.means[index - 1]) / (right - left)
        if rows > right:
            return self.means[index] + max(0.0, rise) * (rows - right)
        return max(self.means[index - 1] + rise * (rows - left), self.means[0] * min(1.0, rows / self.rows[0]))


@dataclass(slots=True)
class _Bound:
    """The memory bound learnt from calls that ran out of memory: calls of up to `limit` pixels fit. After `patience` calls, of
    which `calls` were made, a somewhat larger limit is tried; `safe` is the limit before that."""

    limit: int
    patience: int = _PATIENCE
    calls: int = 0
    safe: int | None = None

    def lower(self, pixels: int, limit: int) -> None:
        """Records that a call of `pixels` did not fit; `limit` pixels are tried next."""
        if self.safe is not None and self.safe < pixels:
            self.limit, self.patience = self.safe, 2 * self.patience
        else:
            self.limit = min(self.limit, limit)
        self.calls, self.safe = 0, None

    def count(self) -> None:
        """Records a call that fitted."""
        self.calls += 1
        if self.calls >= self.patience:
            self.calls, self.safe, self.limit = 0, self.limit, 3 * self.limit // 2 + 1


class _Curves:
    """The curves of a stage of a model, by shape, and the one that is nearest to a number of pixels."""

    def __init__(self) -> None:
        self._shapes: dict[Hashable, _Curve] = {}  # the one that was not run for longest comes first
        # Sorted by pixels: curves of a single batch, and curves of several, which have a form.
        self._single: list[tuple[int, int, _Curve]] = []
        self._several: list[tuple[int, int, _Curve]] = []

    def get(self, shape: Hashable) -> _Curve | None:
        """The curve of a shape, None before its first call."""
        return self._shapes.get(shape)

    def items(self) -> Iterable[tuple[Hashable, _Curve]]:
        """All shapes with their curves."""
        return self._shapes.items()

    def set(self, shape: Hashable, pixels: int, rows: int, seconds: float) -> None:
        """Sets the cost of a call of `rows` rows to `seconds`."""
        curve = self._run(shape, pixels)
        before = len(curve.rows)
        curve.set(rows, seconds)
        self._note(curve, before)

    def record(self, shape: Hashable, pixels: int, rows: int, seconds: float, expected: float) -> _Curve:
        """Records a call that was expected to take `expected` seconds. Returns the curve of its shape."""
        curve = self._run(shape, pixels)
        before = len(curve.rows)
        curve.record(rows, seconds, expected)
        self._note(curve, before)
        return curve

    def _run(self, shape: Hashable, pixels: int) -> _Curve:
        """The curve of a shape that was just run. If there are too many, the least recently run is evicted, curves of a single
        batch size first: curves of several sizes are used to scale the others."""
        self._shapes[shape] = curve = self._shapes.pop(shape, None) or _Curve(pixels)
        if len(self._shapes) > _MOST_SHAPES:
            single = (old for old, known in self._shapes.items() if len(known.rows) < 2 and known is not curve)
            forgotten = self._shapes.pop(next(single, next(iter(self._shapes))))
            _index(forgotten, self._single if len(forgotten.rows) < 2 else self._several, remove=True)
        return curve

    def _note(self, curve: _Curve, before: int) -> None:
        """Updates the sorted lists for a curve that had `before` batch sizes and may have one more."""
        if len(curve.rows) == before:
            return
        if before == 0:
            _index(curve, self._single)
        elif before == 1:
            _index(curve, self._single, remove=True)
            _index(curve, self._several)

    def nearest(self, pixels: int) -> _Curve:
        """The curve of the shape nearest in pixels, preferring curves of several batch sizes."""
        curves = self._several or self._single
        index = bisect_left(curves, (pixels,))
        return min(curves[max(0, index - 1) : index + 1], key=lambda entry: abs(entry[0] - pixels))[2]

    def form(self, shape: Hashable, pixels: int) -> _Curve:
        """The curve of a shape's costs by rows: its own, or the nearest shape's with several batch sizes."""
        own = self._shapes.get(shape)
        return own if own is not None and len(own.rows) > 1 else self.nearest(pixels)


def _index(curve: _Curve, curves: list[tuple[int, int, _Curve]], remove: bool = False) -> None:
    """Adds a curve to a list that is sorted by pixels, or removes it."""
    entry = (curve.pixels, id(curve), curve)
    if remove:
        del curves[bisect_left(curves, entry[:2])]
    else:
        insort(curves, entry)


class Costs:
    """Seconds of calls by stage, model, shape and rows, and the machine's current pace relative to them.

    The costs of a shape that was never run are scaled from the one nearest in pixels. Not thread-safe: guarded by the engine's
    lock.
    """

    def __init__(self) -> None:
        self._curves: dict[tuple[Stage, str], _Curves] = {}
        self._pace: dict[str, float] = {}
        self._bounds: dict[tuple[Stage, str], _Bound] = {}
        self._buckets: dict[str, Sequence[int]] = {}
        # Results of lookups since the last observation of a stage of a model, before the pace is applied.
        self._found: dict[tuple[Stage, str], dict[tuple[Hashable, int, int], float | None]] = {}

    def measured(self, stage: Stage, group: Group, pixels: int, rows: int, seconds: float) -> None:
        """Records the undisturbed seconds of a call of `rows` rows of `pixels` pixels each."""
        self._observe(stage, group[0]).set(group[1], pixels, self.padded(group[0], rows), seconds)

    def pad(self, model: str, buckets: Sequence[int]) -> None:
        """Sets the ascending `buckets` that calls of `model` are padded to; more rows than the last are computed in parts.

        A call costs as much as its padded rows, so further rows up to the next bucket are free. Without buckets calls are not
        padded.
        """
        self._found.clear()
        self._buckets[model] = buckets

    def padded(self, model: str, rows: int) -> int:
        """The rows that are computed in a call of `rows`."""
        if not (buckets := self._buckets.get(model)):
            return rows
        parts, rest = divmod(rows, buckets[-1])
        return parts * buckets[-1] + (buckets[bisect_left(buckets, rest)] if rest else 0)

    def adopt(self, model: str, measured: Measured) -> None:
        """Records the results of the warm-up of `model`."""
        for timing in measured.timings:
            self.measured(timing.stage, (model, timing.shape), timing.pixels, timing.rows, timing.seconds)
        for pixels, rows in measured.full:
            self.forbid(model, pixels, rows)

    def knows(self, model: str) -> bool:
        """Whether a step of `model` was measured at least once."""
        return ("denoise", model) in self._curves

    def record(self, stage: Stage, group: Group, pixels: int, rows: int, seconds: float) -> None:
        """Learns from a call that took `seconds`."""
        if (bound := self._bounds.get((stage, group[0]))) is not None:
            bound.count()
        rows = self.padded(group[0], rows)
        expected = self._table_seconds(stage, group, pixels, rows)
        if expected is None:
            return self.measured(stage, group, pixels, rows, seconds)
        pace = self._pace.get(group[0], 1.0)
        paced = seconds / pace
        # Some calls are delayed by other load, so outliers are clipped.
        seconds = min(max(paced, expected / _DOUBT), expected * _DOUBT)
        if stage == "denoise":
            # Other load on the machine slows all calls alike, and denoising calls are the most frequent.
            self._pace[group[0]] = pace * (1 + _PACE_WEIGHT * (seconds / max(expected, _INSTANT) - 1))
        curves = self._observe(stage, group[0])
        curve = curves.record(group[1], pixels, rows, seconds, expected)
        if stage == "denoise":
            form = curves.form(group[1], pixels)
            tried = curve.trials.note(rows, paced, form.paying(), form.rows)
            if tried is not None:
                curve.set(rows, tried)

    def seconds(self, stage: Stage, group: Group, pixels: int, rows: int) -> float | None:
        """The expected seconds of such a call at the current pace; None before the first call of that model."""
        model, shape = group
        found = self._found.setdefault((stage, model), {})
        try:
            known = found[shape, pixels, rows]
        except KeyError:
            known = found[shape, pixels, rows] = self._table_seconds(stage, group, pixels, self.padded(model, rows))
        return None if known is None else known * self._pace.get(model, 1.0)

    def _observe(self, stage: Stage, model: str) -> _Curves:
        """The curves of a stage of a model, one of which is about to change."""
        self._found.pop((stage, model), None)
        return self._curves.setdefault((stage, model), _Curves())

    def _table_seconds(self, stage: Stage, group: Group, pixels: int, rows: int) -> float | None:
        curves = self._curves.get((stage, group[0]))
        if curves is None:
            return None
        own = curves.get(group[1])
        if own is not None and (len(own.rows) > 1 or own.rows[0] == rows):
            return own.seconds(rows)
        like = curves.nearest(pixels)
        if own is None:
            return like.seconds(rows) * pixels / like.pixels
        # The one measured batch scales the form of another shape's curve.
        return own.means[0] * like.seconds(rows) / max(like.seconds(own.rows[0]), _INSTANT)

    def forbid(self, model: str, pixels: int, rows: int, stage: Stage = "denoise", largest: int | None = None) -> None:
        """Records that such a call ran out of memory. Until a retry much later, calls have fewer pixels, and at most `largest`
        rows if given."""
        total = pixels * self.padded(model, rows)
        limit = total - 1 if largest is None else pixels * largest
        self._bounds.setdefault((stage, model), _Bound(total)).lower(total, limit)

    def fitting_rows(self, stage: Stage, model: str, pixels: int) -> int | None:
        """The maximum rows of `pixels` that fit into a call, at least one; None if no call has run out of memory."""
        bound = self._bounds.get((stage, model))
        return None if bound is None else self._fitting(model, max(1, bound.limit // pixels))

    def _fitting(self, model: str, rows: int) -> int:
        """The largest number of rows that, padded to a bucket, is at most `rows`; at least one."""
        return next(fewer for fewer in range(rows, 0, -1) if fewer == 1 or self.padded(model, fewer) <= rows)

    def describe(self, model: str, most: int) -> list[str]:
        """A model's measured calls as text, one line per shape."""
        lines = []
        curves = self._curves.get(("denoise", model))
        for shape, curve in () if curves is None else curves.items():
            times = ", ".join(f"{rows}: {mean * 1e3:.1f} ms" for rows, mean in zip(curve.rows, curve.means, strict=True))
            cap = self.cap((model, shape), curve.pixels, most)
            lines.append(f"a step at {curve.pixels} pixels, by rows: {times}; batches of up to {cap}")
        return lines

    def cap(self, group: Group, pixels: int, most: int) -> int:
        """The largest batch that pays, in rows, up to `most`; `most` if costs are unknown."""
        if (fitting := self.fitting_rows("denoise", group[0], pixels)) is not None:
            most = min(most, fitting)
        curves = self._curves.get(("denoise", group[0]))
        if curves is None:
            return most
        curve, own = curves.form(group[1], pixels), curves.get(group[1])
        chosen = curve.paying(most)
        # Costs beyond the largest tried batch are unknown and do not limit batches.
        if chosen == curve.rows[-1]:
            return most
        return chosen if own is None else max(chosen, min(own.trials.allowed, most))
