"""A fake server for each test, and a client without retries, which test_retry.py tests."""

from collections.abc import Iterator
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import FakeServer, FakeService
from img2img_client import Client, RetryPolicy


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the commands from the user's server."""
    for name in ("TARGET", "TOKEN", "CA", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        monkeypatch.delenv(f"IMG2IMG_{name}", raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def service(server: FakeServer) -> FakeService:
    return server.service


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout=120, retries=None) as made:
        yield made


@pytest.fixture
def retry_log() -> list[tuple[int, str, float]]:
    return []


@pytest.fixture(params=[Client, Blocking])
def patient(request: pytest.FixtureRequest, server: FakeServer, retry_log: list[tuple[int, str, float]]) -> Any:
    policy = RetryPolicy(4, 0.001, 0.002, on_retry=lambda attempt, error, wait: retry_log.append((attempt, error.status, wait)))
    server.service.fail_before = 1
    with request.param(server.target, timeout=120, retries=policy) as client:
        yield client
