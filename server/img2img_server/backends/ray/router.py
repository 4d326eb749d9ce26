"""Ray Serve's router of a front's requests: to where the model is in memory, then to the replica with the least work.

Serve's own routers count requests, and ask replicas for their count where they do not know it, which the request waits for. This
one goes by the seconds that replicas tell once a second (`record_routing_stats`), corrected by what was sent since. It asks
nobody, as a replica refuses what is too much for it by itself.

Serve sends this module's code with the deployment, so it keeps no state of its own.
"""

import asyncio
import itertools
import logging
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from img2img_server.backends.ray.load_balancing import Standing, choose

_log = logging.getLogger("img2img_server.backends.ray.router")
_AGAIN = 1.0
"""Seconds between two questions to a replica that could not be reached, whether it lives."""


class LeastWorkRouter(RequestRouter):
    """Runs in each front, inside of its handle, on the router's event loop.

    A replica that could not be reached gets nothing until it has answered, and one that died never again, whatever the
    controller says of it meanwhile.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Takes `request_router_kwargs`: `spread_after`, in seconds."""
        self._spread_after: float = kwargs["spread_after"]
        self._standings: dict[ReplicaID, Standing] = {}
        self._away: dict[ReplicaID, asyncio.Task[None]] = {}
        self._dead: set[ReplicaID] = set()
        self._choices = itertools.count(1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one that the request goes to, none where none can be reached: Serve then asks again, a little later each time."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        there = {one.replica_id: one for one in candidate_replicas if one.replica_id not in self._away}
        for replica_id, replica in there.items():
            self._standing(replica_id).tell(replica.routing_stats)
        by_name = {replica_id.unique_id: replica_id for replica_id in there}
        standings = {name: self._standing(replica_id) for name, replica_id in by_name.items()}
        model = _model_of(pending_request)
        name = choose(standings, model, self._spread_after)
        if name is None:
            return []
        standings[name].coming.add(model)
        standings[name].chosen = next(self._choices)
        return [[there[by_name[name]]]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """The chosen one. Serve's own would ask it for the length of its queue first."""
        (chosen,) = candidates
        replica: RunningReplica | None = self._replicas.get(chosen.replica_id)
        return replica

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """One more of ours is there."""
        self._standing(replica_id).sent += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """One of ours has ended, however it did."""
        standing = self._standing(replica_id)
        standing.sent = max(0, standing.sent - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller tells which replicas there are; it may not know yet what we have seen."""
        present = {replica.replica_id for replica in replicas}
        self._dead &= present
        for replica_id in [known for known in self._standings if known not in present]:
            del self._standings[replica_id]
        super().update_replicas([replica for replica in replicas if replica.replica_id not in self._dead])

    async def _probe_queue_lens(
        self, replicas: list[RunningReplica], backoff_index: int
    ) -> list[tuple[RunningReplica, int | None]]:
        """Asks nobody: Serve would fill a table by it that this router does not read."""
        return [(replica, None) for replica in replicas]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """It gets nothing any more."""
        self._dead.add(replica_id)
        super().on_replica_actor_died(replica_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """A call of it failed: it died, or its machine cannot be reached for now."""
        super().on_replica_actor_unavailable(replica_id)
        replica = self._replicas.get(replica_id)
        if replica is not None and replica_id not in self._away:
            self._away[replica_id] = asyncio.get_running_loop().create_task(self._ask(replica))

    async def _ask(self, replica: RunningReplica) -> None:
        """Asks until it answers, or is known to have died."""
        replica_id = replica.replica_id
        _log.warning("replica %s cannot be reached", replica_id.unique_id)
        try:
            while replica_id in self._replicas:
                try:
                    await asyncio.wait_for(replica.get_queue_len(deadline_s=_AGAIN), _AGAIN)
                    return
                except ActorDiedError:
                    self.on_replica_actor_died(replica_id)
                except (RayActorError, TimeoutError):
                    await asyncio.sleep(_AGAIN)
        finally:
            del self._away[replica_id]

    def _standing(self, replica_id: ReplicaID) -> Standing:
        return self._standings.setdefault(replica_id, Standing())


def _model_of(pending_request: PendingRequest | None) -> str:
    """The model that a request needs, empty where it does not say. It is in the first argument of replicas' methods."""
    if pending_request is None or not pending_request.args:
        return ""
    return getattr(pending_request.args[0], "model", "") or ""
