"""Choice of a replica: one that has the model, then the least work, from reports and from requests sent since."""

import math

from hypothesis import given
from hypothesis import strategies as st
from img2img_server.backends.ray.load_balancing import Standing, choose, stats_of

SPREAD = 30.0


def _standing(seconds: float | None, requests: int = 0, resident: tuple[str, ...] = ("m",)) -> Standing:
    standing = Standing()
    standing.update(stats_of(seconds, requests, resident))
    return standing


def test_request_goes_to_the_replica_with_the_least_work() -> None:
    standings = {"a": _standing(4.0, 8), "b": _standing(3.0, 1), "c": _standing(9.0, 2)}
    assert choose(standings, "m", SPREAD) == "b"


def test_requests_prefer_replicas_that_have_the_model_unless_much_busier() -> None:
    standings = {"has it": _standing(29.0, 5), "has it not": _standing(0.0, 0, ())}
    assert choose(standings, "m", SPREAD) == "has it"
    standings["has it"].update(stats_of(31.0, 6, ["m"]))
    assert choose(standings, "m", SPREAD) == "has it not"


def test_least_busy_replica_loads_a_model_that_no_replica_has() -> None:
    assert choose({"a": _standing(2.0, 1, ()), "b": _standing(1.0, 1, ())}, "m", SPREAD) == "b"


def test_a_request_without_a_model_goes_to_the_least_busy_one() -> None:
    assert choose({"a": _standing(2.0, 1), "b": _standing(1.0, 1, ())}, "", SPREAD) == "b"


def test_load_balancing_works_without_replicas() -> None:
    assert choose({}, "m", SPREAD) is None


def test_work_sent_since_the_last_report_counts_until_the_next_one() -> None:
    """Otherwise all requests of a second would go to the replica that was least busy at its beginning."""
    standing = _standing(4.0, 2)  # two seconds each
    standing.sent += 3
    assert standing.queued_seconds == 10.0
    standing.update(stats_of(9.5, 5, ["m"]))
    assert standing.queued_seconds == 9.5
    standing.sent -= 3
    assert standing.queued_seconds == 9.5 - 3 * 1.9


def test_repeated_report_does_not_reset_sent_work() -> None:
    """Ray repeats the last report to the router with each change of any replica."""
    standing = _standing(4.0, 2)
    standing.sent += 1
    standing.update(stats_of(4.0, 2, ["m"]))
    assert standing.queued_seconds == 6.0


def test_replicas_without_time_estimates_are_compared_by_request_count() -> None:
    assert choose({"a": _standing(None, 3), "b": _standing(None, 2)}, "m", SPREAD) == "b"


def test_stuck_replica_is_avoided_until_it_recovers() -> None:
    stuck = _standing(math.inf, 3)
    stuck.sent += 2
    standings = {"stuck": stuck, "busy": _standing(1e6, 10)}
    assert choose(standings, "m", SPREAD) == "busy"
    stuck.update(stats_of(1.0, 1, ["m"]))
    assert choose(standings, "m", SPREAD) == "stuck"


@given(st.integers(1, 6), st.integers(0, 60))
def test_requests_to_idle_replicas_are_shared_out_evenly(replicas: int, requests: int) -> None:
    standings = {str(number): _standing(0.0) for number in range(replicas)}
    for number in range(1, requests + 1):
        name = choose(standings, "m", SPREAD)
        assert name is not None
        standings[name].chosen = number
        standings[name].sent += 1
    counts = [standing.sent for standing in standings.values()]
    assert sum(counts) == requests
    assert max(counts) - min(counts) <= 1


def test_idle_replicas_are_chosen_in_turn() -> None:
    """Even after the request before has ended: caches and warm models are used on all of them."""
    standings = {"a": _standing(0.0), "b": _standing(0.0)}
    chosen = []
    for number in range(1, 5):
        name = choose(standings, "m", SPREAD)
        assert name is not None
        standings[name].chosen = number
        chosen.append(name)
    assert chosen in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 50), st.booleans(), st.integers(0, 50)), min_size=1))
def test_replicas_with_less_work_and_the_model_are_preferred(states: list[tuple[float, int, bool, int]]) -> None:
    standings = {}
    for number, (seconds, requests, has, sent) in enumerate(states):
        standings[str(number)] = _standing(seconds, requests, ("m",) if has else ())
        standings[str(number)].sent = sent
    name = choose(standings, "m", SPREAD)
    assert name is not None
    chosen = standings[name]
    for other in standings.values():
        if "m" in other.resident:
            assert chosen.queued_seconds <= other.queued_seconds
