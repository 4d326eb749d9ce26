"""A fake server for each test, and a client of it."""

from collections.abc import Iterator

import pytest
from fake_image_service import FakeServer, FakeService
from img2img_client import Client


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
    with Client(server.target, timeout=20) as made:
        yield made
