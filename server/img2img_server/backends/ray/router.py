"""A Ray Serve request router: prefers replicas that have the model in memory, then the one with the least work.

Serve's own routers count requests, and delay a request while they query replicas for unknown counts. This router uses the work in
seconds that replicas report once a second (`record_routing_stats`), corrected by the requests sent since. It never queries
replicas, because they refuse excess requests themselves.

Serve sends this module's code with the deployment, so the module has no state.
"""

import asyncio
import itertools
import logging
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from img2img_server.backends.ray.load_balancing import ReplicaState, choose

_log = logging.getLogger("img2img_server.backends.ray.router")
_AGAIN = 1.0
"""Seconds between two probes of an unreachable replica."""


class LeastWorkRouter(RequestRouter):
    """Runs in each front's handle, on the router's event loop.

    An unreachable replica gets no requests until it responds to a probe, and a dead one never again, even if the controller
    still lists it.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Reads `request_router_kwargs`: `spread_after` in seconds."""
        self._spread_after: float = kwargs["spread_after"]
        self._replica_states: dict[ReplicaID, ReplicaState] = {}
        self._away: dict[ReplicaID, asyncio.Task[None]] = {}
        self._dead: set[ReplicaID] = set()
        self._choices = itertools.count(1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for a request; none if none can be reached, and then Serve retries with backoff."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        there = {one.replica_id: one for one in candidate_replicas if one.replica_id not in self._away}
        for replica_id, replica in there.items():
            self._state_of(replica_id).update(replica.routing_stats)
        by_name = {replica_id.unique_id: replica_id for replica_id in there}
        states = {name: self._state_of(replica_id) for name, replica_id in by_name.items()}
        model = _model_of(pending_request)
        name = choose(states, model, self._spread_after)
        if name is None:
            return []
        states[name].coming.add(model)
        states[name].chosen = next(self._choices)
        return [[there[by_name[name]]]]

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """The chosen replica. Serve's own method would query its queue length first."""
        (chosen,) = candidates
        replica: RunningReplica | None = self._replicas.get(chosen.replica_id)
        return replica

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Counts a request sent to the replica."""
        self._state_of(replica_id).sent += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Counts a request's end."""
        state = self._state_of(replica_id)
        state.sent = max(0, state.sent - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Updates the replicas from the controller, which may still list dead ones."""
        present = {replica.replica_id for replica in replicas}
        self._dead &= present
        for replica_id in [known for known in self._replica_states if known not in present]:
            del self._replica_states[replica_id]
        super().update_replicas([replica for replica in replicas if replica.replica_id not in self._dead])

    async def _probe_queue_lens(
        self, replicas: list[RunningReplica], backoff_index: int
    ) -> list[tuple[RunningReplica, int | None]]:
        """Sends no probes: Serve would fill a cache that this router does not use."""
        return [(replica, None) for replica in replicas]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Excludes the replica permanently."""
        self._dead.add(replica_id)
        super().on_replica_actor_died(replica_id)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Excludes the replica, which died or is unreachable, until a probe succeeds."""
        super().on_replica_actor_unavailable(replica_id)
        replica = self._replicas.get(replica_id)
        if replica is not None and replica_id not in self._away:
            self._away[replica_id] = asyncio.get_running_loop().create_task(self._probe(replica))

    async def _probe(self, replica: RunningReplica) -> None:
        """Probes the replica until it responds or is dead."""
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

    def _state_of(self, replica_id: ReplicaID) -> ReplicaState:
        return self._replica_states.setdefault(replica_id, ReplicaState())


def _model_of(pending_request: PendingRequest | None) -> str:
    """The model of a request, which is an attribute of the first argument of replicas' methods; empty if there is none."""
    if pending_request is None or not pending_request.args:
        return ""
    return getattr(pending_request.args[0], "model", "") or ""
