"""What a front asks of the replicas, however they are reached."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol

from img2img_server.backends.ray.messages import Card, Ended, ModelAnswer, RemoteRequest, Told
from img2img_server.engine.request import Failed

Everywhere = Literal["look", "load", "unload"]
"""What all replicas are asked."""


class Replicas(Protocol):
    """The replicas of one application. Each method raises ReplicaLost where the one that was asked is gone, or none is there.

    Cancelling a call, or closing its stream, cancels it at the replica.
    """

    async def transform(self, job: RemoteRequest) -> Ended:
        """Has one of them run a request."""
        ...

    def stream(self, job: RemoteRequest) -> AsyncGenerator[Told, None]:
        """Has one of them run a request and tell of it."""
        ...

    async def ask(self, method: Literal["bring", "load"], asked: ModelAnswer) -> Card | Failed:
        """Has one of them do something about a model."""
        ...

    async def everywhere(self, method: Everywhere, *arguments: Any) -> Sequence[Any]:
        """The answers of all that answer; those that are lost are left out."""
        ...
