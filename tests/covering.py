"""Parameters of which `scripts/test` runs a part and `scripts/test --all` every one: the others carry the mark `nightly`."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Combination = tuple[Any, ...]


def nightly_but(values: Iterable[Any], *always: Any) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`: all but `always` are marked nightly."""
    found = list(values)
    assert set(always) <= set(found), set(always) - set(found)
    return [value if value in always else pytest.param(value, marks=pytest.mark.nightly) for value in found]


def covering(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with every combination of the axes' values; some run always, the others nightly. With three axes or
    more, the former cover each pair of values; with two, each value.
    """
    every = list(product(*(list(values) for values in axes.values())))
    always = cover(every, 1 if len(axes) < 3 else 2)
    marks = [() if index in always else (pytest.mark.nightly,) for index in range(len(every))]
    parameters = [
        pytest.param(*combination, marks=mark, id="-".join(map(str, combination)))
        for combination, mark in zip(every, marks, strict=True)
    ]
    return pytest.mark.parametrize(tuple(axes), parameters)


def cover(every: list[Combination], strength: int) -> set[int]:
    """Indices of combinations that have, together, all sets of `strength` values that occur in `every`: few, not the fewest."""
    parts = [_parts(combination, strength) for combination in every]
    missing, chosen = set[Any]().union(*parts), set[int]()
    while missing:
        best = max(range(len(every)), key=lambda index: len(parts[index] & missing))
        chosen.add(best)
        missing -= parts[best]
    return chosen


def _parts(combination: Combination, strength: int) -> set[Any]:
    """Sets of `strength` values of a combination, each value by its axis and text."""
    return set(combinations([(axis, str(value)) for axis, value in enumerate(combination)], strength))
