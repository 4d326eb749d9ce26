"""Calls of replicas through Ray Serve's handles, never through its proxies: those lose deadlines, cancellation and errors."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import grpc
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from img2img_server.backends.ray.messages import (
    Card,
    Ended,
    Everywhere,
    ModelAnswer,
    RemoteCompleted,
    RemoteRequest,
    ReplicaLeft,
    ReplicaLost,
    Told,
)
from img2img_server.engine.request import Failed

_LOST = (
    RayActorError,  # died, or cannot be reached
    NodeDiedError,
    WorkerCrashedError,
    ObjectLostError,  # its answer was on a node that died
    RaySystemError,
    TaskCancelledError,  # by Ray, as the replica stops: where we cancel, nobody is left to see it
)
_NOBODY = (DeploymentUnavailableError, ReplicaUnavailableError)
"""No replica was there to be asked."""
_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""How Ray's own gRPC, which carries the calls, says that a replica's process is gone, or about to go."""
_LOOKING = 5.0
"""Seconds that a replica gets to answer a look: one that takes longer is about to be given up by Ray, and is left out."""


class RayReplicas:
    """The replicas behind a handle of a deployment of Replica."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def transform(self, job: RemoteRequest) -> Ended:
        """Has one of them run a request."""
        ended: Ended = await self._one("transform", job)
        return ended

    async def stream(self, job: RemoteRequest) -> AsyncGenerator[Told, None]:
        """Has one of them run a request and tell of it."""
        response: Any = self._streaming.stream.remote(job)
        over = False
        try:
            with _lost():
                async for told in response:
                    over = isinstance(told, RemoteCompleted | Failed)  # whoever hears of the end asks for no more
                    yield told
        finally:
            if not over:
                response.cancel()

    async def ask(self, method: Literal["bring", "load"], asked: ModelAnswer) -> Card | Failed:
        """Has one of them do something about a model."""
        answer: Card | Failed = await self._one(method, asked)
        return answer

    async def everywhere(self, method: Everywhere, *arguments: Any) -> Sequence[Any]:
        """The answers of all that answer. Whoever takes too long for a look is left out."""
        seconds = _LOOKING if method == "look" else None
        # Not results_async, whose time-out is of all together: one that hangs would hide what the others say.
        sending = self._handle.broadcast(method, *arguments)._fetch_replica_results_async()
        try:
            with _lost():
                sent = await asyncio.wait_for(sending, seconds)
        except TimeoutError as error:
            raise ReplicaLost("nobody can be asked") from error
        answers = await asyncio.gather(*(_answer(result, seconds) for result in sent))
        return [answer for answer in answers if answer is not None]

    async def _one(self, method: str, argument: object) -> Any:
        response = getattr(self._handle, method).remote(argument)
        try:
            with _lost():
                return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


async def _answer(result: Any, seconds: float | None) -> Any:
    """What one of them answers, None where it is lost or takes longer."""
    try:
        with _lost():
            return await asyncio.wait_for(result.get_async(), seconds)
    except (ReplicaLost, TimeoutError):
        return None


@contextmanager
def _lost() -> Iterator[None]:
    """Says of Ray's errors what they mean here."""
    try:
        yield
    except _NOBODY as error:
        raise ReplicaLeft(f"{type(error).__name__}: {error}") from error
    except (*_LOST, grpc.aio.AioRpcError) as error:
        if isinstance(error, grpc.aio.AioRpcError) and error.code() not in _UNREACHABLE:
            raise
        raise ReplicaLost(f"{type(error).__name__}: {error}") from error
