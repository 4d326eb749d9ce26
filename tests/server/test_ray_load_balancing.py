"""Choice of a replica: one that has the model, then the least work, from reports and from requests sent since."""

import math

from hypothesis import given
from hypothesis import strategies as st
from img2img_server.backends.ray.load_balancing import ReplicaState, choose, stats_of

SPREAD = 30.0


def _state_of(seconds: float | None, requests: int = 0, resident: tuple[str, ...] = ("m",)) -> ReplicaState:
    state = ReplicaState()
    state.update(stats_of(seconds, requests, resident))
    return state


def test_request_goes_to_the_replica_with_the_least_work() -> None:
    states = {"a": _state_of(4.0, 8), "b": _state_of(3.0, 1), "c": _state_of(9.0, 2)}
    assert choose(states, "m", SPREAD) == "b"


def test_requests_prefer_replicas_that_have_the_model_unless_much_busier() -> None:
    states = {"has it": _state_of(29.0, 5), "has it not": _state_of(0.0, 0, ())}
    assert choose(states, "m", SPREAD) == "has it"
    states["has it"].update(stats_of(31.0, 6, ["m"]))
    assert choose(states, "m", SPREAD) == "has it not"


def test_least_busy_replica_loads_a_model_that_no_replica_has() -> None:
    assert choose({"a": _state_of(2.0, 1, ()), "b": _state_of(1.0, 1, ())}, "m", SPREAD) == "b"


def test_a_request_without_a_model_goes_to_the_least_busy_one() -> None:
    assert choose({"a": _state_of(2.0, 1), "b": _state_of(1.0, 1, ())}, "", SPREAD) == "b"


def test_load_balancing_works_without_replicas() -> None:
    assert choose({}, "m", SPREAD) is None


def test_work_sent_since_the_last_report_counts_until_the_next_one() -> None:
    """Otherwise all requests of a second would go to the replica that was least busy at its beginning."""
    state = _state_of(4.0, 2)  # two seconds each
    state.sent += 3
    assert state.queued_seconds == 10.0
    state.update(stats_of(9.5, 5, ["m"]))
    assert state.queued_seconds == 9.5
    state.sent -= 3
    assert state.queued_seconds == 9.5 - 3 * 1.9


def test_repeated_report_does_not_reset_sent_work() -> None:
    """Ray repeats the last report to the router with each change of any replica."""
    state = _state_of(4.0, 2)
    state.sent += 1
    state.update(stats_of(4.0, 2, ["m"]))
    assert state.queued_seconds == 6.0


def test_replicas_without_time_estimates_are_compared_by_request_count() -> None:
    assert choose({"a": _state_of(None, 3), "b": _state_of(None, 2)}, "m", SPREAD) == "b"


def test_stuck_replica_is_avoided_until_it_recovers() -> None:
    stuck = _state_of(math.inf, 3)
    stuck.sent += 2
    states = {"stuck": stuck, "busy": _state_of(1e6, 10)}
    assert choose(states, "m", SPREAD) == "busy"
    stuck.update(stats_of(1.0, 1, ["m"]))
    assert choose(states, "m", SPREAD) == "stuck"


@given(st.integers(1, 6), st.integers(0, 60))
def test_requests_to_idle_replicas_are_shared_out_evenly(replicas: int, requests: int) -> None:
    states = {str(number): _state_of(0.0) for number in range(replicas)}
    for number in range(1, requests + 1):
        name = choose(states, "m", SPREAD)
        assert name is not None
        states[name].chosen = number
        states[name].sent += 1
    counts = [state.sent for state in states.values()]
    assert sum(counts) == requests
    assert max(counts) - min(counts) <= 1


def test_idle_replicas_are_chosen_in_turn() -> None:
    """Even if the previous request has ended, so that caches and warm models of all replicas are used."""
    states = {"a": _state_of(0.0), "b": _state_of(0.0)}
    chosen = []
    for number in range(1, 5):
        name = choose(states, "m", SPREAD)
        assert name is not None
        states[name].chosen = number
        chosen.append(name)
    assert chosen in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 50), st.booleans(), st.integers(0, 50)), min_size=1))
def test_replicas_with_less_work_and_the_model_are_preferred(loads: list[tuple[float, int, bool, int]]) -> None:
    states = {}
    for number, (seconds, requests, has, sent) in enumerate(loads):
        states[str(number)] = _state_of(seconds, requests, ("m",) if has else ())
        states[str(number)].sent = sent
    name = choose(states, "m", SPREAD)
    assert name is not None
    chosen = states[name]
    for other in states.values():
        if "m" in other.resident:
            assert chosen.queued_seconds <= other.queued_seconds
