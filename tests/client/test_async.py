"""Behaviour of the asyncio client only: cancelled tasks, event loops, concurrent calls. The other modules test both clients,
through blocking.py."""

import asyncio
import inspect
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from fake_image_service import PATIENCE, FakeServer, FakeService, image_bytes
from fake_statuses import queue_full, rich_status
from google.rpc import code_pb2  # type: ignore[import-untyped, unused-ignore]
from img2img_client import (
    AsyncClient,
    AsyncTransformStream,
    Cancelled,
    Client,
    Completed,
    DeadlineExceeded,
    Queued,
    RetryPolicy,
    TransformStream,
)
from PIL import Image


@pytest.fixture
async def own(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout=120, retries=None) as made:
        yield made


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, PATIENCE)


async def unary(client: AsyncClient) -> object:
    return await client.transform(b"file")


async def stream(client: AsyncClient) -> object:
    return [event async for event in client.transform_stream(b"file")]


async def upload(client: AsyncClient) -> object:
    return await client.upload(b"file")


@pytest.mark.parametrize("work", [unary, stream])
async def test_cancelling_the_task_cancels_the_call_at_the_server(
    own: AsyncClient, service: FakeService, work: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    service.hold = True
    task = asyncio.ensure_future(work(own))
    await until(service.holding)
    assert not service.released.is_set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(service.released)
    service.hold = False
    assert await own.transform(b"file"), "the client goes on"


@pytest.mark.parametrize("work", [unary, stream])
async def test_asyncio_timeout_cancels_the_call(
    own: AsyncClient, service: FakeService, work: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    service.hold = True
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await work(own)
    await until(service.released)


@pytest.mark.parametrize("work", [unary, stream, upload])
async def test_cancelling_ends_the_wait_between_attempts(
    server: FakeServer, work: Callable[[AsyncClient], Awaitable[object]]
) -> None:
    server.service.failure = server.assets.failure = queue_full(50)
    server.service.fail_before = 0
    waiting = asyncio.Event()
    policy = RetryPolicy(on_retry=lambda *_: waiting.set())
    async with AsyncClient(server.target, retries=policy) as client:
        task = asyncio.ensure_future(work(client))
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE)


async def test_closing_the_client_cancels_calls_but_not_tasks(server: FakeServer) -> None:
    """The task gets the call's error. The task itself is not cancelled, and may clean up."""
    server.service.hold = True
    client = AsyncClient(server.target)
    tasks = [asyncio.ensure_future(work(client)) for work in (unary, stream)]
    await until(server.service.holding)
    await client.close()
    endings = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE)
    assert [type(ending) for ending in endings] == [Cancelled, Cancelled]


async def test_closed_client_raises_an_error(server: FakeServer, tmp_path: Path) -> None:
    used, unused = AsyncClient(server.target), AsyncClient(server.target)
    await used.models()
    for client in (used, unused):
        await client.close()
        await client.close()
        with pytest.raises(ValueError, match="client is closed"):
            await client.transform(b"file")
        with pytest.raises(ValueError, match="client is closed"):
            client.transform_stream(b"file")
        with pytest.raises(ValueError, match="client is closed"):
            await client.wait_until_ready()
    blocking = Client(server.target)
    blocking.close()
    for call in (blocking.models, blocking.wait_until_ready, lambda: blocking.transform_stream(b"file")):
        with pytest.raises(ValueError, match="client is closed"):
            call()


async def test_closing_a_stream_from_another_task_ends_it(own: AsyncClient, service: FakeService) -> None:
    service.hold, service.fail_before = True, 1
    events = own.transform_stream(b"file")
    assert isinstance(await anext(events), Queued)
    task = asyncio.ensure_future(anext(events, None))
    await until(service.holding)
    await events.close()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(task, PATIENCE)
    await until(service.released)
    assert [event async for event in events] == []


async def test_dropping_a_stream_cancels_the_call(own: AsyncClient, service: FakeService) -> None:
    service.hold, service.fail_before = True, 1
    async for event in own.transform_stream(b"file"):
        assert isinstance(event, Queued)
        await until(service.holding)
        assert not service.released.is_set()
        break
    await until(service.released)


async def test_interrupted_upload_is_retried(server: FakeServer) -> None:
    """grpc.aio reports INTERNAL if the server ends the call during a transfer; our server's status has the reason."""
    server.assets.failures = [rich_status(code_pb2.INTERNAL, "cut off")]
    async with AsyncClient(server.target, timeout=120, retries=RetryPolicy(first_backoff=0.001)) as client:
        assert await client.download(await client.upload(b"file")) == b"file"


async def test_many_calls_share_a_client(own: AsyncClient, service: FakeService) -> None:
    results = await asyncio.gather(*(own.transform(b"file", seed=number) for number in range(20)))
    assert len(results) == 20
    assert sorted(request.seed for request in service.requests) == list(range(20))


async def test_client_can_be_created_without_an_event_loop(server: FakeServer) -> None:
    made: list[AsyncClient] = []
    thread = threading.Thread(target=lambda: made.append(AsyncClient(server.target, timeout=120)))
    thread.start()
    thread.join(PATIENCE)
    async with made[0] as client:
        assert (await client.transform(b"file")).images
    async with AsyncClient(server.target):
        pass  # never used, never opened


def test_client_is_bound_to_one_event_loop(server: FakeServer) -> None:
    client = AsyncClient(server.target, timeout=120)

    async def use() -> None:
        await client.models()

    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(use())
        with pytest.raises(RuntimeError, match="another event loop"):
            second.run(use())
        first.run(client.close())


async def test_paths_bytes_and_pillow_images_are_accepted_as_sources(
    own: AsyncClient, service: FakeService, tmp_path: Path
) -> None:
    file = image_bytes("green", (6, 3))
    (tmp_path / "photo.png").write_bytes(file)
    with Image.open(io.BytesIO(file)) as image:
        for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), file, image):
            result = await own.transform(source)
            assert isinstance(result.image, Image.Image)
            assert result.image.size == (4, 2)
    for request in service.requests:
        with Image.open(io.BytesIO(request.image.data)) as sent:
            assert (sent.size, sent.convert("RGB").getpixel((0, 0))) == ((6, 3), (0, 128, 0))


async def test_invalid_values_raise_and_are_not_sent(own: AsyncClient, service: FakeService, tmp_path: Path) -> None:
    missing = tmp_path / "missing.png"
    with pytest.raises(FileNotFoundError):
        await own.transform(missing)
    events = own.transform_stream(missing)
    with pytest.raises(FileNotFoundError):
        await anext(events)
    assert [event async for event in events] == []
    with pytest.raises(TypeError, match="unknown option"):
        await own.transform(b"file", colour="red")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="request_id"):
        own.transform_stream(b"file", request_id="a b")
    assert service.metadata == []


async def test_completed_stream_has_result_and_request_id_and_then_ends(own: AsyncClient) -> None:
    async with own.transform_stream(b"file", request_id="mine") as events:
        *_, last = [event async for event in events]
    assert isinstance(last, Completed)
    assert last.result.request_id == events.request_id == "mine"
    assert await anext(events, None) is None


async def test_waiting_for_a_server_is_bounded_and_can_be_cancelled(server: FakeServer, own: AsyncClient) -> None:
    await own.wait_until_ready(PATIENCE)
    server.set_serving(False)
    with pytest.raises(DeadlineExceeded, match="was not ready in time"):
        await own.wait_until_ready(0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(own.wait_until_ready(), 0.2)


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    for kind, other in ((Client, AsyncClient), (TransformStream, AsyncTransformStream)):
        names = {name for name in vars(kind) if not name.startswith("_")}
        assert names == {name for name in vars(other) if not name.startswith("_")}
        for name in names | ({"__init__"} if kind is Client else set()):
            of, against = (inspect.signature(getattr(which, name)) for which in (kind, other))
            assert list(of.parameters.values()) == list(against.parameters.values()), name
