"""Retries in simulated time: within the timeout, within bounds, and only for safe calls."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_client import Img2ImgError, RetryPolicy
from img2img_client.retry import Attempts

few_seconds = st.floats(0, 4)
SAFE = ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
UNSAFE = ["INTERNAL", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "CANCELLED", "UNKNOWN", "ABORTED"]
failures = st.builds(
    lambda status, retry_after: Img2ImgError("failed", status=status, retry_after=retry_after),
    st.sampled_from(SAFE * 8 + UNSAFE),
    st.none() | few_seconds | st.floats(0, 20),
)


@dataclass
class Life:
    """A call in simulated time: attempts that take `durations` and fail as `errors` say, waits that oversleep by `late`."""

    policy: RetryPolicy | None
    timeout: float | None
    errors: list[Img2ImgError]
    durations: list[float]
    draw: float
    late: float
    tries: int = 1
    several: bool = False
    now: float = 1000.0
    starts: list[float] = field(default_factory=list)
    draws: list[tuple[float, float]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    bounds: list[float | None] = field(default_factory=list)

    def made(self, failures: int) -> int:
        """The tries that so many failures were."""
        return sum(self.tries if error.status == "UNAVAILABLE" else 1 for error in self.errors[:failures])

    def asked(self, failures: int) -> float:
        """The seconds to wait that the last of so many failures asked for, and another server does not: the first one's are its
        own."""
        before = [error for error in self.errors[: failures - 1] if error.retry_after is not None]
        return 0.0 if self.several and not before else self.errors[failures - 1].retry_after or 0.0

    def run(self) -> None:
        attempts = Attempts(
            self.policy, self.timeout, tries=self.tries, several=self.several, clock=lambda: self.now, uniform=self._uniform
        )
        for error, duration in zip(self.errors, self.durations, strict=True):
            self.starts.append(self.now)
            self.bounds.append(attempts.seconds_left())
            self.now += duration
            wait = attempts.failed(error)
            if wait is None:
                return
            self.waits.append(wait)
            self.now += wait + self.late
            if not attempts.is_in_time():
                return

    def _uniform(self, least: float, most: float) -> float:
        self.draws.append((least, most))
        return least + self.draw * (most - least)


policies = st.builds(RetryPolicy, st.integers(1, 6), few_seconds, few_seconds, st.sampled_from([0.0, 4.0, 20.0]))
lives = st.integers(1, 9).flatmap(
    lambda count: st.builds(
        Life,
        policies | policies | policies | st.none(),
        st.none() | st.floats(0, 60) | st.floats(20, 60),
        st.lists(failures, min_size=count, max_size=count),
        st.lists(few_seconds, min_size=count, max_size=count),
        st.floats(0, 1),
        st.sampled_from([0.0, 0.5, 60.0]),
        st.sampled_from([1, 1, 2]),
        st.booleans(),
    )
)


@settings(max_examples=500)
@given(lives)
def test_only_transient_errors_are_retried_within_the_limits(life: Life) -> None:
    life.run()
    retried = life.errors[: len(life.starts) - 1]
    for error in retried:
        assert error.status == "UNAVAILABLE" or (error.status == "RESOURCE_EXHAUSTED" and error.retry_after is not None)
    if life.policy is None:
        assert len(life.starts) == 1
    else:
        assert len(life.starts) == 1 or life.made(len(retried)) + life.tries <= life.policy.max_attempts
        assert all(life.asked(number) <= life.policy.longest_wait for number in range(1, len(retried) + 1))
    if life.timeout is not None:
        deadline = 1000.0 + life.timeout
        assert all(start < deadline for start in life.starts[1:])
        assert life.bounds == [pytest.approx(deadline - start) for start in life.starts]


@settings(max_examples=500)
@given(lives)
def test_backoff_is_randomized_between_server_and_policy_bounds(life: Life) -> None:
    life.run()
    policy = life.policy or RetryPolicy()
    assert len(life.waits) <= len(life.draws)
    for failures, (wait, drawn) in enumerate(zip(life.waits, life.draws, strict=False), start=1):
        number = life.made(failures)
        assert drawn == (0.0, policy.backoff(number))
        assert wait == pytest.approx(life.asked(failures) + life.draw * policy.backoff(number))
        assert policy.backoff(number) == pytest.approx(min(policy.most_backoff, policy.first_backoff * 2 ** (number - 1)))
    if life.timeout is not None and not life.late:
        assert life.now <= 1000.0 + life.timeout or life.now == pytest.approx(
            life.starts[-1] + life.durations[len(life.starts) - 1]
        )


@settings(max_examples=500)
@given(lives)
def test_no_call_fails_that_could_still_be_retried(life: Life) -> None:
    life.run()
    last = life.errors[len(life.starts) - 1]
    policy = life.policy
    failures = len(life.starts)
    if policy is None or failures == len(life.errors) or life.made(failures) + life.tries > policy.max_attempts:
        return
    transient = last.status == "UNAVAILABLE" or (last.status == "RESOURCE_EXHAUSTED" and last.retry_after is not None)
    if transient and life.asked(failures) <= policy.longest_wait:
        assert life.timeout is not None
        wait = life.asked(failures) + life.draw * policy.backoff(life.made(failures))
        ended = life.starts[-1] + life.durations[len(life.starts) - 1]
        assert ended + wait + life.late >= 1000.0 + life.timeout - 1e-6


def test_back_offs_never_overflow() -> None:
    policy = RetryPolicy(max_attempts=10**6, first_backoff=1e300, most_backoff=1e301)
    assert policy.backoff(10**6) == 1e301


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"first_backoff": -1}, {"most_backoff": float("nan")}, {"longest_wait": float("inf")}]
)
def test_invalid_retry_policy_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        RetryPolicy(**wrong)
