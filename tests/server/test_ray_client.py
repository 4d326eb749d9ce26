"""Calls through a Ray Serve handle: cancelled calls are cancelled at the replica, and errors of lost replicas are unified."""

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from fakes import make_request
from img2img_server.backends.ray.deployment import RayReplicas
from img2img_server.backends.ray.messages import ModelQuery, NoResponse, RemoteRequest, ReplicaLeft, ReplicaLost
from img2img_server.engine.request import Completed, Queued, Started, Timings
from img2img_server.support.call import Call
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, TaskCancelledError, WorkerCrashedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

JOB = RemoteRequest.of(make_request(), 0.0)
DONE = Completed((), Timings(0, 0, 0, 0))


def _grpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, nothing, nothing, "the connection broke")


LOST = [
    ActorDiedError(),
    ActorUnavailableError("not now", b"0" * 16),
    NodeDiedError("the node"),  # type: ignore[no-untyped-call]
    WorkerCrashedError(),
    TaskCancelledError(),
    _grpc_error(grpc.StatusCode.UNAVAILABLE),
    _grpc_error(grpc.StatusCode.CANCELLED),
]
FAULTS = [RuntimeError("a bug"), _grpc_error(grpc.StatusCode.INTERNAL)]


class Response:
    """The result of a handle's call: its responses one by one, or the last one if awaited. None stands for a response that never
    arrives."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers, self.cancelled = answers, False

    def __await__(self) -> Generator[Any, None, Any]:
        return self._last().__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for answer in self.answers:
            if answer is None:
                await asyncio.Event().wait()
            if isinstance(answer, Exception):
                raise answer
            yield answer

    async def _fetch_replica_results_async(self) -> list["Response"]:
        """The response of each replica to a broadcast."""
        return [Response([answer]) for answer in self.answers]

    async def get_async(self) -> Any:
        return await self

    def cancel(self) -> None:
        self.cancelled = True

    async def _last(self) -> Any:
        return [answer async for answer in self][-1]


class Handle:
    """A handle whose next call returns this response."""

    def __init__(self, *answers: Any) -> None:
        self.response, self.called = Response(list(answers)), asyncio.Event()

    def options(self, **options: Any) -> "Handle":
        return self

    def __getattr__(self, method: str) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> Response:
        self.called.set()
        return self.response

    def broadcast(self, method: str, *arguments: Any) -> Response:
        return self.response


def replicas(handle: Handle) -> RayReplicas:
    anything: Any = handle
    return RayReplicas(anything)


async def test_responses_pass_through_unchanged_without_cancellation() -> None:
    handle = Handle(DONE)
    assert await replicas(handle).transform(JOB) == DONE
    assert not handle.response.cancelled
    handle = Handle(Queued(0, None), Started(2), DONE)
    assert [told async for told in replicas(handle).stream(JOB)] == handle.response.answers
    assert not handle.response.cancelled


async def test_cancelled_unary_call_is_cancelled_at_the_replica() -> None:
    handle = Handle(None)
    call = asyncio.create_task(replicas(handle).transform(JOB))
    await handle.called.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert handle.response.cancelled


async def test_abandoned_stream_is_cancelled_at_the_replica() -> None:
    handle = Handle(Queued(0, None), None)
    async with aclosing(replicas(handle).stream(JOB)) as events:
        async for _ in events:
            break
    assert handle.response.cancelled
    handle = Handle(Queued(0, None), None)
    heard = asyncio.Event()

    async def follow() -> None:
        async with aclosing(replicas(handle).stream(JOB)) as events:
            async for _ in events:
                heard.set()

    call = asyncio.create_task(follow())
    await heard.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert handle.response.cancelled


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_every_ray_error_of_a_dead_replica_is_replica_lost(error: Exception) -> None:
    with pytest.raises(ReplicaLost):
        await replicas(Handle(error)).transform(JOB)
    with pytest.raises(ReplicaLost):
        await replicas(Handle(error)).ask("bring", ModelQuery(Call("", "")))
    with pytest.raises(ReplicaLost):
        assert [told async for told in replicas(Handle(Queued(0, None), error)).stream(JOB)]
    assert await replicas(Handle("a", error, "b")).everywhere("look") == ["a", "b"]


@pytest.mark.parametrize("error", [DeploymentUnavailableError(DeploymentID("e")), ReplicaUnavailableError("none")])
async def test_call_that_reached_no_replica_is_replica_left(error: Exception) -> None:
    with pytest.raises(ReplicaLeft):
        await replicas(Handle(error)).transform(JOB)


async def test_hanging_replica_does_not_hide_other_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.backends.ray.deployment._POLL_TIMEOUT", 1.0)
    assert await replicas(Handle("a", None, "b")).everywhere("look") == ["a", NoResponse(), "b"]


async def test_completed_stream_is_not_cancelled() -> None:
    handle = Handle(Queued(0, None), DONE, None)
    async with aclosing(replicas(handle).stream(JOB)) as events:
        async for told in events:
            if told == DONE:
                break
    assert not handle.response.cancelled


@pytest.mark.parametrize("error", FAULTS, ids=["python", "grpc"])
async def test_error_of_the_replicas_code_is_not_replica_lost(error: Exception) -> None:
    with pytest.raises(type(error)):
        await replicas(Handle(error)).transform(JOB)
    with pytest.raises(type(error)):
        await replicas(Handle("a", error)).everywhere("look")
