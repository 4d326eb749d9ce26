"""Load balancing over several servers: healthy servers are used, unhealthy ones are not, and failed calls are retried on another
within the retry limit."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blocking import Blocking
from fake_image_service import PATIENCE, FakeServer
from fake_statuses import queue_full, unavailable
from img2img_client import Client, Overloaded, RetryPolicy, Unavailable
from several import counts, forget, started, use

BOTH = pytest.mark.parametrize("kind", [Client, Blocking])
RetryLog = list[tuple[int, str, float]]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with started(FakeServer(), FakeServer(), FakeServer()) as three:
        yield three


def policy(retry_log: RetryLog, attempts: int = 5) -> RetryPolicy:
    return RetryPolicy(attempts, 0.001, 0.002, on_retry=lambda *what: retry_log.append((what[0], what[1].status, what[2])))


def leave(client: Client, server: FakeServer) -> None:
    """Calls until a server is not called any more: that it is not well has to get about."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline
        forget([server])
        for _ in range(10):
            client.models()
        if counts([server]) == [0]:
            return


@BOTH
@pytest.mark.parametrize("given", ["list", "commas", "ipv4"])
def test_calls_are_spread_evenly(kind: Any, servers: list[FakeServer], given: str) -> None:
    addresses = [server.target for server in servers]
    targets: dict[str, Any] = {"list": addresses, "commas": ",".join(addresses), "ipv4": f"ipv4:{','.join(addresses)}"}
    with kind(targets[given], timeout=120) as client:
        use(client, servers)
        for _ in range(10):
            client.transform(b"file")
            list(client.transform_stream(b"file"))
            client.models()
        assert counts(servers) == [10, 10, 10]


@BOTH
def test_unhealthy_server_gets_no_calls_until_it_recovers(kind: Any, servers: list[FakeServer], retry_log: RetryLog) -> None:
    with kind([server.target for server in servers], timeout=120, retries=policy(retry_log)) as client:
        use(client, servers)
        servers[1].set_serving(False)
        leave(client, servers[1])
        forget(servers)
        for _ in range(20):
            client.models()
        assert counts(servers) == [10, 0, 10]
        servers[1].set_serving(True)
        use(client, servers)
    assert retry_log == []


@BOTH
def test_unreachable_server_causes_no_errors_and_is_used_again_after_recovery(kind: Any, servers: list[FakeServer]) -> None:
    with kind([server.target for server in servers], timeout=120) as client:
        use(client, servers)
        servers[0].stop()
        forget(servers)
        for _ in range(20):
            client.transform(b"file")
        assert sum(counts(servers[1:])) == 20
        with started(FakeServer(servers[0].port)) as after:
            use(client, [*after, *servers[1:]])


def until_unavailable(client: Client) -> None:
    """Calls until no server can be reached."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            client.models()
        except Unavailable:
            return
    raise AssertionError("somebody still answers")


@BOTH
def test_no_healthy_server_raises_unavailable_until_one_recovers(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog
) -> None:
    with kind([server.target for server in servers], timeout=120, retries=policy(retry_log)) as client:
        client.wait_until_ready(PATIENCE)
        for server in servers:
            server.set_serving(False)
        until_unavailable(client)
        servers[2].set_serving(True)
        client.wait_until_ready(PATIENCE)
        use(client, servers[2:])


CALLS: dict[str, Callable[[Any], object]] = {
    "transform": lambda client: client.transform(b"file"),
    "large": lambda client: client.transform(bytes(3_000_000)),
    "transform_stream": lambda client: list(client.transform_stream(b"file")),
    "models": lambda client: client.models(),
}
OTHERS: dict[str, Callable[[Any], object]] = {
    "load_model": lambda client: client.load_model("demo"),
    "upload": lambda client: client.upload(b"file"),
    "download": lambda client: client.download("1f"),
}
ONCE: dict[str, Callable[[Any], object]] = {
    "unload_model": lambda client: client.unload_model("demo"),
    "delete_asset": lambda client: client.delete_asset("1f"),
}


@BOTH
@pytest.mark.parametrize("name", CALLS)
def test_unavailable_server_is_replaced_by_another_at_once(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog, name: str
) -> None:
    """gRPC itself asks the next one: no wait of ours, also for an image larger than what gRPC keeps by default."""
    with kind([server.target for server in servers], timeout=120, retries=policy(retry_log)) as client:
        use(client, servers)
        servers[0].service.failure = unavailable()
        servers[0].service.fail_before = 0
        for _ in range(6):
            assert CALLS[name](client) is not None
    assert retry_log == []
    assert counts(servers)[0] >= 2
    assert sum(counts(servers)) == 6 + counts(servers)[0]


@BOTH
@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", CALLS)
def test_retries_of_grpc_and_client_share_one_limit(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog, name: str, most: int
) -> None:
    for server in servers:
        server.service.failure, server.service.fail_before = unavailable(), 0
    client = kind([server.target for server in servers], timeout=120, retries=policy(retry_log, most))
    with client, pytest.raises(Unavailable, match="shutting down"):
        CALLS[name](client)
    assert sum(counts(servers)) == (1 if most == 1 else most - most % 2)
    assert [attempt for attempt, _, _ in retry_log] == list(range(2, most - 1, 2))


@BOTH
def test_stream_with_a_response_is_retried_only_by_the_client(kind: Any, servers: list[FakeServer], retry_log: RetryLog) -> None:
    for server in servers:
        server.service.failure, server.service.fail_before = unavailable(), 2
    client = kind([server.target for server in servers], timeout=120, retries=policy(retry_log, 4))
    with client, pytest.raises(Unavailable):
        list(client.transform_stream(b"file"))
    assert sum(counts(servers)) == 3, "one, one, and at the third gRPC may make two"
    assert [attempt for attempt, _, _ in retry_log] == [1, 2]


@BOTH
@pytest.mark.parametrize("name", [*OTHERS, *ONCE])
def test_calls_that_grpc_does_not_retry_use_all_client_attempts(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog, name: str
) -> None:
    for server in servers:
        server.service.failure = server.assets.failure = unavailable()
    client = kind([server.target for server in servers], timeout=120, retries=policy(retry_log, 4))
    with client, pytest.raises(Unavailable):
        (OTHERS | ONCE)[name](client)
    assert sum(counts(servers)) == (4 if name in OTHERS else 1)


@BOTH
@pytest.mark.parametrize("name", CALLS)
def test_one_attempt_means_no_retries(kind: Any, servers: list[FakeServer], name: str) -> None:
    for server in servers:
        server.service.failure, server.service.fail_before = unavailable(), 0
    with kind([server.target for server in servers], timeout=120, retries=None) as client, pytest.raises(Unavailable):
        CALLS[name](client)
    assert sum(counts(servers)) == 1


@BOTH
@pytest.mark.parametrize("name", CALLS)
def test_overloaded_server_is_replaced_by_another_without_a_wait(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog, name: str
) -> None:
    with kind([server.target for server in servers], timeout=120, retries=policy(retry_log)) as client:
        use(client, servers)
        servers[0].service.failure, servers[0].service.fail_before = queue_full(3600), 0
        for _ in range(6):
            assert CALLS[name](client) is not None
    assert retry_log
    assert all(status == "RESOURCE_EXHAUSTED" and wait < 0.1 for _, status, wait in retry_log)


@BOTH
def test_if_all_servers_are_overloaded_the_retry_delay_is_observed(
    kind: Any, servers: list[FakeServer], retry_log: RetryLog
) -> None:
    for server in servers:
        server.service.failure = queue_full(0.05)
    with (
        kind([server.target for server in servers], timeout=120, retries=policy(retry_log, 4)) as client,
        pytest.raises(Overloaded),
    ):
        client.transform(b"file")
    assert [wait >= 0.05 for _, _, wait in retry_log] == [False, True]


@BOTH
def test_single_target_is_used_without_balancing_by_default(kind: Any, servers: list[FakeServer], retry_log: RetryLog) -> None:
    """Its health is ignored, and only the client retries, unless balance=True."""
    one = servers[0]
    one.set_serving(False)
    with kind(one.target, timeout=120, retries=policy(retry_log)) as client:
        one.service.failures = [unavailable()]
        assert client.transform(b"file").images
    assert (len(retry_log), len(one.service.metadata)) == (1, 2)
    with kind(one.target, timeout=120, retries=policy(retry_log), balance=True) as client:
        with pytest.raises(Unavailable):
            client.transform(b"file")
        one.set_serving(True)
        client.wait_until_ready(PATIENCE)
        assert client.transform(b"file").images
