"""The router of each front, over fake replicas: which ones get requests, and which never again."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from img2img_server.backends.ray.load_balancing import stats_of
from img2img_server.backends.ray.router import LeastWorkRouter
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest

DEPLOYMENT = DeploymentID("engine", "app")


class FakeReplica:
    """A replica as the router sees it. `answer` is called by its health check."""

    max_ongoing_requests = 100

    def __init__(self, name: str, seconds: float = 0.0, requests: int = 0, resident: Iterable[str] = ("m",)) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.routing_stats = stats_of(seconds, requests, resident)
        self.answer: Callable[[], int] = lambda: 0
        self.asked: asyncio.Queue[None] = asyncio.Queue()

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked.put_nowait(None)
        return self.answer()


def _router(*replicas: FakeReplica, spread_after: float = 30.0) -> LeastWorkRouter:
    router = LeastWorkRouter(DEPLOYMENT, DeploymentHandleSource.UNKNOWN)
    router.initialize_state(spread_after=spread_after)
    _update(router, *replicas)
    return router


def _update(router: LeastWorkRouter, *replicas: FakeReplica) -> None:
    """The controller's updates."""
    there: Any = list(replicas)
    router.update_replicas(there)


_numbers = iter(range(10**6))


async def _send(router: LeastWorkRouter, model: str = "m") -> str:
    """Has Serve's own code choose for one request, as a handle does, and counts it as sent."""
    metadata = RequestMetadata(request_id="r", internal_request_id=str(next(_numbers)))
    request = PendingRequest(args=[SimpleNamespace(model=model)], kwargs={}, metadata=metadata)
    replica = await asyncio.wait_for(router._choose_replica_for_request(request), 120)
    router.on_send_request(replica.replica_id)
    return str(replica.replica_id.unique_id)


async def test_requests_go_to_the_replica_with_the_least_work_without_a_probe() -> None:
    busy, idle = FakeReplica("busy", 5.0, 5), FakeReplica("idle", 1.0, 1)
    router = _router(busy, idle)
    assert [await _send(router) for _ in range(4)] == ["idle"] * 4
    busy.routing_stats = stats_of(0.5, 1, ("m",))
    assert await _send(router) == "busy"
    assert busy.asked.empty()
    assert idle.asked.empty()


async def test_requests_go_to_replicas_that_have_their_model() -> None:
    router = _router(FakeReplica("a", 5.0, 5, ("m", "n")), FakeReplica("b", 1.0, 1, ("o",)))
    assert [await _send(router, "n"), await _send(router, "o"), await _send(router, "")] == ["a", "b", "b"]


async def test_a_model_on_no_replica_is_loaded_once_for_later_requests() -> None:
    """The request that loads it (`bring`) and the next ones go to one replica, even before it reports the model."""
    one, other = FakeReplica("one", resident=()), FakeReplica("other", resident=())
    router = _router(one, other)
    (first, *rest) = [await _send(router, "n") for _ in range(4)]
    assert rest == [first] * 3
    assert await _send(router, "m") != first
    (loads,) = (replica for replica in (one, other) if replica.replica_id.unique_id == first)
    loads.routing_stats = stats_of(9.0, 4, ())  # it did not load it after all
    assert await _send(router, "n") != first


async def test_completed_requests_no_longer_count_as_load() -> None:
    one, other = FakeReplica("one"), FakeReplica("other")
    router = _router(one, other)
    assert Counter([await _send(router) for _ in range(6)]) == {"one": 3, "other": 3}
    for _ in range(3):
        router.on_request_completed(one.replica_id, "")
    assert [await _send(router) for _ in range(3)] == ["one"] * 3


async def test_dead_replica_is_never_chosen_again() -> None:
    dead, alive = FakeReplica("dead"), FakeReplica("alive", 50.0, 5)

    def die() -> int:
        raise ActorDiedError

    dead.answer = die
    router = _router(dead, alive)
    router.on_replica_actor_unavailable(dead.replica_id)
    asking = router._away[dead.replica_id]
    assert await _send(router) == "alive"
    await asyncio.wait_for(asking, 120)
    _update(router, dead, alive)
    assert [await _send(router) for _ in range(4)] == ["alive"] * 4
    assert dead.replica_id not in router.curr_replicas


async def test_unreachable_replica_gets_no_requests_until_it_responds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.backends.ray.router._AGAIN", 0.01)
    away, there = FakeReplica("away"), FakeReplica("there", 50.0, 5)

    def unreachable() -> int:
        raise ActorUnavailableError("gone", b"\0" * 16)

    away.answer = unreachable
    router = _router(away, there)
    router.on_replica_actor_unavailable(away.replica_id)
    for _ in range(3):
        await asyncio.wait_for(away.asked.get(), 120)
        assert await _send(router) == "there"
    away.answer = lambda: 0
    answered = router._away[away.replica_id]
    await asyncio.wait_for(answered, 120)
    assert await _send(router) == "away"


async def test_request_waits_without_replicas_and_goes_to_the_first_new_one() -> None:
    router = _router()
    waiting = asyncio.ensure_future(_send(router))
    await asyncio.sleep(0)
    assert not waiting.done()
    _update(router, FakeReplica("new"))
    assert await waiting == "new"


async def test_state_of_lost_replicas_is_dropped() -> None:
    gone, stays = FakeReplica("gone"), FakeReplica("stays")
    router = _router(gone, stays)
    await _send(router)
    await _send(router)
    router.on_replica_actor_died(gone.replica_id)
    _update(router, stays)
    assert set(router._replica_states) == {stays.replica_id}
    assert not router._dead


def test_serve_accepts_the_router_and_its_settings() -> None:
    from img2img_server.backends.ray.deployment import serve_options
    from img2img_server.backends.ray.resources import ResourceShare
    from img2img_server.config import RaySettings

    found: Any = RequestRouterConfig(
        **serve_options(RaySettings(spread_after=3.0), ResourceShare(1, 0), {})["request_router_config"]
    )
    made = found.get_request_router_class()  # as Serve passes it on
    assert made.__name__ == "LeastWorkRouter"
    assert found.request_router_kwargs == {"spread_after": 3.0}
    may_not_load: Any = serve_options(RaySettings(spread_after=3.0), ResourceShare(1, 0), {}, load_on_request=False)
    found = RequestRouterConfig(**may_not_load["request_router_config"])
    assert found.request_router_kwargs == {"spread_after": math.inf}


async def test_requests_go_only_to_replicas_with_the_model_if_loading_is_disabled() -> None:
    busy, idle = FakeReplica("busy", 1e6, 99), FakeReplica("idle", resident=())
    router = _router(spread_after=math.inf)
    _update(router, busy, idle)
    assert [await _send(router) for _ in range(3)] == ["busy"] * 3
    assert await _send(router, "") == "idle"
    assert await _send(router, "nobody has it") == "idle"
