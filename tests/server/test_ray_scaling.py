"""The number of replicas follows the reported seconds of queued work."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from img2img_server.backends.ray.load_balancing import QUEUED_SECONDS, QueuedSecondsPolicy, latest, wanted

SECONDS = st.lists(st.floats(0, 1e5), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("queued", "current", "expected"),
    [
        ([10.0], 1, 1),  # just enough
        ([10.1], 1, 2),
        ([45.0, 0.0], 2, 5),
        ([8.0, 8.0], 2, 2),
        ([5.0, 5.1], 2, 2),  # one could hold it in its target, but the next request would bring the other back
        ([2.5, 2.4], 2, 1),
        ([0.0, 0.0, 0.0], 3, 1),
        ([0.0], 1, 1),
    ],
)
def test_replica_count_follows_queued_work(queued: list[float], current: int, expected: int) -> None:
    assert wanted(queued, current, 10.0) == expected


@given(SECONDS, st.integers(1, 20), st.floats(0.1, 1e3))
def test_wanted_replicas_suffice_for_the_work_and_are_stable(queued: list[float], current: int, target: float) -> None:
    number = wanted(queued, current, target)
    assert number >= 1
    assert number * target >= sum(queued) * (1 - 1e-9)
    if number < current:
        assert sum(queued) <= number * target / 2 * (1 + 1e-9)
    # With the same work, asked again from there, it stays.
    assert wanted(queued, number, target) == number


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.integers(1, 20))
def test_more_work_never_means_fewer_replicas(one: float, other: float, current: int) -> None:
    less, more = sorted((one, other))
    assert wanted([less], current, 10.0) <= wanted([more], current, 10.0)


def _context(series: object, target: int) -> SimpleNamespace:
    """The part of Ray's AutoscalingContext that the policy reads."""
    return SimpleNamespace(raw_metrics=series, target_num_replicas=target)


def _points(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(timestamp=float(number), value=value) for number, value in enumerate(values)]


def test_scaling_policy_uses_the_last_report_of_each_replica() -> None:
    policy = QueuedSecondsPolicy(10.0)
    told = {QUEUED_SECONDS: {"a": _points(500.0, 25.0), "b": _points(0.0, 3.0), "c": []}}
    assert policy(_context(told, 2)) == (3, {})
    assert latest(told[QUEUED_SECONDS]) == [25.0, 3.0]


@pytest.mark.parametrize("told", [{}, None, {QUEUED_SECONDS: {}}, {"other": {"a": []}}])
def test_scaling_policy_keeps_the_count_without_reports(told: object) -> None:
    assert QueuedSecondsPolicy(10.0)(_context(told, 4)) == (4, {})
