"""Cases that always run cover the parameters, and no nightly case is lost."""

from itertools import combinations, product
from typing import Any

import pytest
from covering import cover, covering, nightly_but

AXES: dict[str, list[Any]] = {"a": [1, 2, 3], "b": ["x", "y"], "c": [True, False], "d": [None, 4, 5, 6]}


def marked(parameters: Any) -> tuple[list[Any], list[Any]]:
    """Values of parameters that run always, and of those that run nightly."""
    always = [each.values for each in parameters if not each.marks]
    return always, [each.values for each in parameters if each.marks]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_pair_and_every_value_is_covered(count: int) -> None:
    axes = dict(list(AXES.items())[:count])
    names, parameters = covering(**axes).args
    always, nightly = marked(parameters)
    assert names == tuple(axes)
    assert sorted(map(str, always + nightly)) == sorted(map(str, product(*axes.values())))
    strength = 1 if count == 2 else 2
    for chosen in combinations(range(count), strength):
        seen = {tuple(values[axis] for axis in chosen) for values in always}
        assert seen == set(product(*(list(axes.values())[axis] for axis in chosen)))
    assert len(always) < len(parameters)


def test_cover_of_two_axes_has_as_many_cases_as_the_longer_one() -> None:
    assert len(cover(list(product(range(9), range(4))), 1)) == 9


def test_nightly_but_refuses_an_unknown_value() -> None:
    first, second = nightly_but(["a", "b"], "a")
    assert first == "a"
    assert (second.values, [mark.name for mark in second.marks]) == (("b",), ["nightly"])
    with pytest.raises(AssertionError):
        nightly_but(["a", "b"], "c")
