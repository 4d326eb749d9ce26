"""Lists and sums over many requests. No operation visits all of them."""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

Rank = tuple[bool, float, float, int]
"""The sort key of jobs. The last element is the job's number, so no two ranks are equal."""

_BLOCK = 64
"""Items of a block of a RankedList, which is split at twice as many."""
_FIRST, _PER_OCTAVE, _BUCKETS = 1e-3, 4, 128
"""Buckets of a RampSum: the first ends at about a millisecond, four follow for each doubling, up to 50 days."""
_SHORTEST = 1e-6
"""The minimum duration of a ramp's rise, in seconds."""

Ramp = tuple[float, float, float]
"""A ramp's start, end and height."""

_T = TypeVar("_T")


class RankedList(Generic[_T]):
    """Items sorted by rank, each with its seconds. Kept in blocks, each with the sum of its seconds."""

    def __init__(self) -> None:
        self._blocks: list[list[tuple[Rank, float, _T]]] = [[]]
        self._seconds = [0.0]
        self._bounds: list[Rank] = []  # no item of block i + 1 has a lower rank than bound i
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_T]:
        return (item for _, _, item in chain.from_iterable(self._blocks))

    @property
    def ranks(self) -> Iterator[tuple[Rank, _T]]:
        """The items with their ranks, in order."""
        return ((rank, item) for rank, _, item in chain.from_iterable(self._blocks))

    @property
    def seconds(self) -> float:
        """The sum of the seconds of all items."""
        return sum(self._seconds)

    def add(self, rank: Rank, seconds: float, item: _T) -> None:
        """Inserts an item."""
        index = bisect_right(self._bounds, rank)
        block = self._blocks[index]
        insort(block, (rank, seconds, item))
        self._seconds[index] += seconds
        self._length += 1
        if len(block) == 2 * _BLOCK:
            self._blocks.insert(index + 1, block[_BLOCK:])
            self._bounds.insert(index, block[_BLOCK][0])
            del block[_BLOCK:]
            self._seconds[index : index + 1] = [
                sum(seconds for _, seconds, _ in half) for half in self._blocks[index : index + 2]
            ]

    def remove(self, rank: Rank) -> None:
        """Removes the item of this rank."""
        index, position = self._find(rank)
        block = self._blocks[index]
        found, seconds, _ = block.pop(position)
        assert found == rank, "only what is in the list is removed"
        self._seconds[index] -= seconds
        self._length -= 1
        if block:
            return
        self._seconds[index] = 0.0
        if self._bounds:
            del self._blocks[index], self._seconds[index], self._bounds[max(0, index - 1)]

    def before(self, rank: Rank) -> tuple[int, float]:
        """The number of items with a lower rank, and the sum of their seconds."""
        index, position = self._find(rank)
        count = sum(map(len, self._blocks[:index])) + position
        return count, sum(self._seconds[:index]) + sum([seconds for _, seconds, _ in self._blocks[index][:position]])

    def _find(self, rank: Rank) -> tuple[int, int]:
        index = bisect_right(self._bounds, rank)
        return index, bisect_left(self._blocks[index], (rank,))


class RampSum:
    """A sum of ramps: each is 0 up to its start, rises linearly to its height and stays there."""

    def __init__(self) -> None:
        self._ramps = 0
        self._clear()

    def add(self, begin: float, end: float, height: float) -> None:
        """Adds a ramp."""
        self._ramps += 1
        self._change(begin, end, height)

    def remove(self, begin: float, end: float, height: float) -> None:
        """Removes a ramp that was added."""
        self._ramps -= 1
        if self._ramps:
            self._change(begin, end, -height)
        else:
            self._clear()  # so that rounding errors do not accumulate

    def at(self, x: float, without: Sequence[Ramp] = ()) -> float:
        """The approximate sum at `x` without some ramps. A ramp that starts or ends slightly after `x` is extrapolated."""
        bucket = _bucket(x)
        total = x * sum(self._slopes[: bucket + 1]) - sum(self._offsets[: bucket + 1])
        for each in without:
            total -= sum(slope * (x - at) for at, slope in _bends(*each) if _bucket(at) <= bucket)
        return max(0.0, total)

    def _clear(self) -> None:
        self._slopes, self._offsets = [0.0] * _BUCKETS, [0.0] * _BUCKETS

    def _change(self, begin: float, end: float, height: float) -> None:
        for at, slope in _bends(begin, end, height):
            bucket = _bucket(at)
            self._slopes[bucket] += slope
            self._offsets[bucket] += slope * at


@dataclass(frozen=True, slots=True)
class Line:
    """A client's requests, which run one after the other: the seconds of the first, of all, and their number. `skip` is 1 if the
    first one does not count."""

    first: float
    seconds: float
    length: int
    skip: int

    @property
    def counts(self) -> list[Ramp]:
        """The number of finished requests after the client has had the given seconds, if each takes slightly longer than the one
        before."""
        if self.length == self.skip:
            return []
        begin = self.first if self.skip else 0.0
        middle = max(begin, min(self.first * self.length + self.seconds, 3.0 * self.seconds) / 4.0)
        half = self.length / 2.0
        return [(begin, middle, half - self.skip), (middle, self.seconds, half)]

    @property
    def work(self) -> list[Ramp]:
        """The part of these seconds that belongs to requests that count."""
        begin = self.first if self.skip else 0.0
        return [(begin, self.seconds, self.seconds - begin)] if self.length > self.skip else []


NO_LINE = Line(0.0, 0.0, 0, 0)
"""The line of a client without requests."""


class LineSums:
    """Sums over the lines of many clients that have had equal time."""

    def __init__(self) -> None:
        self._counts, self._work = RampSum(), RampSum()

    def add(self, line: Line) -> None:
        """Adds a line."""
        for each in line.counts:
            self._counts.add(*each)
        for each in line.work:
            self._work.add(*each)

    def remove(self, line: Line) -> None:
        """Removes a line that was added."""
        for each in line.counts:
            self._counts.remove(*each)
        for each in line.work:
            self._work.remove(*each)

    def done(self, x: float, without: Line) -> tuple[float, float]:
        """The approximate number of finished requests, and their seconds, when each client has had `x` seconds, except those of
        one line."""
        return self._counts.at(x, without.counts), self._work.at(x, without.work)


def _bends(begin: float, end: float, height: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """A ramp's start and end, and the change of the slope there."""
    end = max(end, begin + _SHORTEST)
    slope = height / (end - begin)
    return (begin, slope), (end, -slope)


def _bucket(seconds: float) -> int:
    """The bucket of a time: `_PER_OCTAVE` for each doubling from a millisecond on."""
    return min(_BUCKETS - 1, int(_PER_OCTAVE * math.log2(1.0 + max(0.0, seconds) / _FIRST)))
