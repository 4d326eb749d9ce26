"""Monitors the server from outside: health, memory, descriptors, threads, and whether it becomes idle."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from soak_parts.access import SMALL, Access
from soak_parts.ledger import Ledger
from soak_parts.process import ServingProcess, Vitals

_HEALTH_EVERY = 0.25
_HEALTH_SECONDS = 30.0
_SAMPLE_EVERY = 2.0
_REST_SECONDS = 60.0
"""Seconds within which a server without calls must become idle."""
_SETTLE_SECONDS = 2.0
_QUEUE = ("img2img_engine_waiting_requests", "img2img_engine_active_requests")
_CALLS = "img2img_calls_in_progress"
_OWN = ("img2img", "inference")
"""Services whose calls end by themselves, unlike health watches."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of the idle server, `at` seconds after the load began."""

    at: float
    vitals: Vitals


@dataclass(slots=True)
class Watch:
    """The observations so far. `under_load` has (seconds, resident bytes)."""

    server: ServingProcess
    metrics_port: int
    ledger: Ledger
    access: Access = field(default_factory=Access)
    unread: Counter[str] = field(default_factory=Counter)
    """Calls of each method that hostile clients may have open while the server is idle."""
    health_seconds: list[float] = field(default_factory=list)
    under_load: list[tuple[float, int]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    async def health(self) -> None:
        """Checks health periodically, like a load balancer, until cancelled."""
        async with self.access.channel(self.server.target, SMALL) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs have no methods
            while True:
                asked = time.monotonic()
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
                    if answer.status != health_pb2.HealthCheckResponse.SERVING:
                        self.ledger.violate(f"health is {answer.status}")
                except grpc.aio.AioRpcError as error:
                    self.ledger.violate(f"health did not answer: {error.code().name} {error.details()}")
                self.health_seconds.append(time.monotonic() - asked)
                await asyncio.sleep(_HEALTH_EVERY)

    async def sample(self) -> None:
        """Records the memory periodically until cancelled."""
        while True:
            try:
                self.under_load.append((time.monotonic() - self.begun, self.server.vitals().rss))
            except psutil.Error:
                self.ledger.violate("the server's process is gone")
                return
            await asyncio.sleep(_SAMPLE_EVERY)

    async def rest(self) -> None:
        """Waits until the engine is idle and only hostile clients have open calls, and records the server's state."""
        end = time.monotonic() + _REST_SECONDS
        while left := await self._busy():
            if time.monotonic() > end:
                self.ledger.violate(f"the server is still busy {_REST_SECONDS:g} s after the last call: {left}")
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(_SETTLE_SECONDS)
        vitals = self.server.vitals()
        self.checkpoints.append(Checkpoint(time.monotonic() - self.begun, vitals))

    async def _busy(self) -> dict[str, float]:
        """Waiting and active requests and unanswered calls, by the server's metrics."""
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            text = await answer.text()
        samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
        found = {each.name: each.value for each in samples if each.name in _QUEUE}
        if len(found) < len(_QUEUE):
            raise ValueError(f"the server's metrics lack one of {', '.join(_QUEUE)}")
        for each in samples:
            if each.name == _CALLS and any(own in each.labels["method"] for own in _OWN):
                method = each.labels["method"]
                found[method] = max(0.0, each.value - self.unread[f"/{method.strip('/')}"])
        return {name: value for name, value in found.items() if value}


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the least-squares line through `points`; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    seconds, values = np.array(points).T
    return float(np.polyfit(seconds, values, 1)[0])
