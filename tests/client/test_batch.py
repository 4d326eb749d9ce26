"""Client.transform_batch against a real server with a fake model."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_image_service import image_bytes
from fakes import FakePipeline
from img2img_client import AsyncClient, BatchResult, Client, InvalidRequest, ModelNotFound, RetryPolicy, Unavailable
from img2img_client.batch import BatchItem
from img2img_server.engine.scheduler import QueueLimits
from running import RunningServer, running, store


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def server(pipeline: FakePipeline) -> Iterator[RunningServer]:
    with running(lambda: store(m=pipeline), limits=QueueLimits(max_active=2, max_waiting=2)) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", timeout=60) as client:
        yield client


def items(count: int, **options: Any) -> Iterator[BatchItem]:
    for seed in range(count):
        yield image_bytes(size=(16, 16)), {"seed": seed, "num_inference_steps": 2, **options}  # type: ignore[typeddict-item]


def test_every_item_has_its_result(client: Client) -> None:
    found = {outcome.index: outcome for outcome in client.transform_batch(items(30))}
    assert sorted(found) == list(range(30))
    assert all(outcome.result and outcome.result.images[0].seed == index for index, outcome in found.items())


def test_failures_belong_to_their_items_whatever_the_cause(client: Client, tmp_path: Path) -> None:
    batch: list[Any] = [
        (tmp_path / "missing.png", {}),
        (image_bytes(size=(16, 16)), {"num_inference_steps": 2}),
        (image_bytes(size=(16, 16)), {"model": "none"}),
        (image_bytes(size=(16, 16)), {"seed": "x"}),
        (b"no image", {}),
    ]
    found = {outcome.index: outcome for outcome in client.transform_batch(batch)}
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert isinstance(found[0].error, FileNotFoundError)
    assert found[1].result is not None
    assert isinstance(found[2].error, ModelNotFound)
    assert isinstance(found[3].error, TypeError | ValueError)
    assert isinstance(found[4].error, InvalidRequest)
    assert found[4].error.fields[0][0] == "image.data"


def test_empty_batch_has_no_results(client: Client) -> None:
    assert list(client.transform_batch([])) == []


def test_an_error_of_the_iterable_is_raised_after_the_results_before_it(client: Client) -> None:
    def broken() -> Iterator[BatchItem]:
        yield from items(2)
        raise ZeroDivisionError("mine")

    found: list[BatchResult] = []
    with pytest.raises(ZeroDivisionError, match="mine"):
        found.extend(client.transform_batch(broken()))
    batch = client.transform_batch(broken())
    assert {next(batch).index, next(batch).index} == {0, 1}
    with pytest.raises(ZeroDivisionError):
        next(batch)


def test_closing_the_results_cancels_the_rest(client: Client, pipeline: FakePipeline) -> None:
    batch = client.transform_batch(items(1000, num_inference_steps=100))
    next(batch)
    batch.close()  # type: ignore[attr-defined]
    assert len(pipeline.prepared) < 1000
    assert len(list(client.transform_batch(items(1)))) == 1, "the queue is free again"


def test_items_without_a_result_are_sent_again_when_the_server_ends(pipeline: FakePipeline) -> None:
    """The first server goes away with requests in progress; a second one on the same port does the rest."""
    begun = threading.Semaphore(0)
    pipeline.before_call = begun.release
    found: dict[int, Any] = {}
    retries = RetryPolicy(max_attempts=100, first_backoff=0.1, most_backoff=0.5)

    def collect(port: int) -> None:
        with Client(f"127.0.0.1:{port}", timeout=120, retries=retries) as client:
            for outcome in client.transform_batch(items(100, num_inference_steps=50)):
                assert outcome.index not in found
                found[outcome.index] = outcome

    with running(lambda: store(m=pipeline), limits=QueueLimits(max_active=2), grace=0.0) as server:
        port = server.port
        thread = threading.Thread(target=collect, args=(port,))
        thread.start()
        assert all(begun.acquire(timeout=60) for _ in range(60))
        server.stop().result(60)
    before = len(found)
    with running(lambda: store(m=FakePipeline()), port=port):
        thread.join(120)
    assert not thread.is_alive()
    assert before < 100
    assert sorted(found) == list(range(100))
    assert all(outcome.result is not None for outcome in found.values())


def test_unreachable_server_ends_the_batch_with_unavailable() -> None:
    with Client("127.0.0.1:1", timeout=120, retries=None) as client, pytest.raises(Unavailable):
        list(client.transform_batch(items(3)))


async def test_the_asyncio_client_does_the_same(server: RunningServer, tmp_path: Path) -> None:
    batch: list[Any] = [*items(20), (tmp_path / "missing.png", {}), (image_bytes(size=(16, 16)), {"model": "none"})]
    async with AsyncClient(f"127.0.0.1:{server.port}", timeout=60) as client:
        found = {outcome.index: outcome async for outcome in client.transform_batch(batch)}
        assert sorted(found) == list(range(22))
        assert all(found[index].result is not None for index in range(20))
        assert isinstance(found[20].error, FileNotFoundError)
        assert isinstance(found[21].error, ModelNotFound)
        left = client.transform_batch(items(100, num_inference_steps=100))
        assert (await anext(left)).result is not None
        await left.aclose()  # type: ignore[attr-defined]
        assert [outcome.index async for outcome in client.transform_batch(items(1))] == [0], "the queue is free again"
    async with AsyncClient("127.0.0.1:1", timeout=120, retries=None) as client:
        with pytest.raises(Unavailable):
            await anext(client.transform_batch(items(3)))
