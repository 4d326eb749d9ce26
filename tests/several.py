"""Several fake servers, and the number of calls that each received."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fake_image_service import PATIENCE, FakeServer
from img2img_client import Client


@contextmanager
def started(*servers: FakeServer) -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.stop)
        yield list(servers)


def counts(servers: Sequence[FakeServer]) -> list[int]:
    return [len(server.service.metadata) + len(server.assets.metadata) for server in servers]


def forget(servers: Sequence[FakeServer]) -> None:
    for server in servers:
        server.service.metadata.clear()
        server.assets.metadata.clear()


def use(client: Client, servers: Sequence[FakeServer]) -> None:
    """Calls until all of these have been called: connections come up one after the other."""
    forget(servers)
    deadline = time.monotonic() + PATIENCE
    while not all(counts(servers)):
        assert time.monotonic() < deadline, counts(servers)
        client.models()
    forget(servers)
