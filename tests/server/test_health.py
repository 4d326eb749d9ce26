"""grpc.health.v1: what Check and Watch answer, and that no watcher delays the server or another watcher."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2 as pb
from img2img_server.api.health import HealthServicer
from img2img_server.errors import ClientBusy, Exhausted, InvalidField, ServiceNotFound
from img2img_server.support.call import Call, answering

SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


def watch(health: HealthServicer, service: str = "") -> AsyncGenerator[pb.HealthCheckResponse, None]:
    return health.Watch(pb.HealthCheckRequest(service=service), None)


async def status(watching: AsyncGenerator[pb.HealthCheckResponse, None]) -> int:
    return (await anext(watching)).status


async def check(health: HealthServicer, service: str = "") -> int:
    return (await health.Check(pb.HealthCheckRequest(service=service), None)).status


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def test_health_is_not_serving_until_set() -> None:
    async def test() -> None:
        health = HealthServicer()
        assert await check(health) == NOT_SERVING
        health.set("", True)
        assert await check(health) == SERVING
        assert health.is_serving()

    run(test())


def test_check_of_an_unknown_service_is_not_found_but_watch_waits() -> None:
    async def test() -> None:
        health = HealthServicer()
        with pytest.raises(ServiceNotFound):
            await check(health, "models/new")
        watching = watch(health, "models/new")
        assert await status(watching) == UNKNOWN
        health.set("models/new", True)
        assert await status(watching) == SERVING
        health.set("models/new", False)
        assert await status(watching) == NOT_SERVING
        await watching.aclose()

    run(test())


def test_slow_watcher_gets_only_the_latest_status() -> None:
    async def test() -> None:
        health = HealthServicer()
        watching = watch(health)
        assert await status(watching) == NOT_SERVING
        for serving in (True, False, True, False, True):
            health.set("", serving)
        assert await status(watching) == SERVING
        health.set("", False)
        health.set("", True)  # the client has read SERVING already: there is nothing to send
        health.set("models/m", True)
        asking = asyncio.ensure_future(status(watching))
        health.set("", False)
        assert await asking == NOT_SERVING
        await watching.aclose()

    run(test())


def test_closing_one_watch_does_not_affect_others() -> None:
    async def test() -> None:
        health = HealthServicer()
        stays, leaves, also_stays = watch(health), watch(health), watch(health)
        for watching in (stays, leaves, also_stays):
            assert await status(watching) == NOT_SERVING
        await leaves.aclose()
        health.set("", True)
        assert [await status(watching) for watching in (stays, also_stays)] == [SERVING, SERVING]
        late = watch(health)
        assert await status(late) == SERVING
        health.set("", False)
        assert [await status(watching) for watching in (stays, also_stays, late)] == [NOT_SERVING] * 3
        for watching in (stays, also_stays, late):
            await watching.aclose()

    run(test())


def test_drain_reports_not_serving_and_close_ends_every_watch() -> None:
    async def test() -> None:
        health = HealthServicer()
        health.set("", True)
        health.set("models/m", True)
        watching, of_model, unknown = watch(health), watch(health, "models/m"), watch(health, "models/x")
        assert [await status(each) for each in (watching, of_model, unknown)] == [SERVING, SERVING, UNKNOWN]
        health.drain()
        health.set("models/m", True)  # a load that ends now
        assert not health.is_serving("models/m")
        assert await status(watching) == NOT_SERVING
        health.close()
        assert [each.status async for each in watching] == []
        assert [each.status async for each in of_model] == [NOT_SERVING]
        assert [each.status async for each in unknown] == []

    run(test())


def test_watches_are_limited_per_client_and_in_total() -> None:
    async def test() -> None:
        health = HealthServicer(max_watches=3, max_client_watches=2)

        async def begin(client: str) -> AsyncGenerator[pb.HealthCheckResponse, None]:
            with answering(Call("Watch", "id", client=client)):
                watching = watch(health)
                await status(watching)
                return watching

        held = [await begin("a"), await begin("a")]
        with pytest.raises(ClientBusy):
            await begin("a")
        held.append(await begin("b"))
        with pytest.raises(Exhausted):
            await begin("c")
        await held.pop(0).aclose()
        held.append(await begin("c"))
        for watching in held:
            await watching.aclose()

    run(test())


@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_oversized_service_name_is_refused(method: str) -> None:
    async def test() -> None:
        health, name = HealthServicer(), "x" * 2000
        answer = check(health, name) if method == "Check" else status(watch(health, name))
        with pytest.raises(InvalidField, match="service"):
            await answer

    run(test())
