"""The HTTP front, given requests that are nearly valid: answers that are documented, and nothing left behind (`scripts/fuzz`)."""

import contextlib
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from fuzz_parts import http_front
from fuzz_parts.rpcs import Finding
from hypothesis import HealthCheck, given, settings

SEEDS: dict[str, Callable[[], list[bytes]]] = {"connection": http_front.requests, "body": http_front.forms}
PIECES = st.sampled_from(
    [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b"--fuzz",
        b"--fuzz--",
        b"\0",
        b"\xff",
        b'"',
        b": ",
        b";",
        b"name=",
        b"1" * 30,
        b"-",
        b"%00",
        b"x" * 900,
    ]
)


@st.composite
def changed(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """A valid input of which some places were replaced."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 40))
        data = data[:start] + draw(PIECES | st.binary(max_size=20)) + data[end:]
    return data + draw(st.sampled_from([b"", data]))


@pytest.mark.parametrize("name", SEEDS)
def test_every_http_request_gets_a_documented_response(name: str) -> None:
    with contextlib.ExitStack() as stack:
        attempt = getattr(http_front, name)(stack)

        @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(changed(SEEDS[name]()))
        def send(data: bytes) -> None:
            attempt(data)

        send()


def test_undocumented_http_response_is_a_finding() -> None:
    for part in (b"500 Internal Server Error\r\n\r\n", b'404 Not Found\r\n\r\n{"a": "/planted-secret-1/models"}'):
        with pytest.raises(Finding):
            http_front._check_answer(part)
