"""The ASGI application: each request becomes a Call, is admitted, observed and answered as a gRPC call is."""

from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router

from img2img_server.access.access import Access
from img2img_server.api.grpc_extensions import starting
from img2img_server.api.health import HealthServicer
from img2img_server.api.http import openapi
from img2img_server.api.http.errors import MethodNotAllowed, PathNotFound
from img2img_server.api.http.exchange import ClientLeft, Exchange, Receive, Send
from img2img_server.api.http.images import Images
from img2img_server.api.http.models import ModelList
from img2img_server.api.interceptors import call_of, cancelled_status, failed
from img2img_server.api.transport import Readers
from img2img_server.errors import DeadlineExpired, ServerError
from img2img_server.support.call import Call, answering
from img2img_server.support.cancellation import time_limit
from img2img_server.telemetry.telemetry import Outcome, Telemetry

Handler = Callable[[Exchange, Call], Awaitable[None]]
PAGES = {"GET /openapi.json": "openapi.json", "GET /docs": "docs"}
_OPEN = ("GET /health", "GET /ready", *PAGES)
"""Methods that need no token, like gRPC's health checks: they reveal nothing about models and clients."""


class App:
    """Answers every path of this API. `serve` sets the services; until then requests are refused with ServerStarting."""

    def __init__(self, access: Access, telemetry: Telemetry, readers: Readers, health: HealthServicer) -> None:
        self._access, self._telemetry, self._readers, self._health = access, telemetry, readers, health
        self._images: Images | None = None
        self._models: ModelList | None = None
        self._handlers: dict[str, Handler] = {
            "POST /v1/images/edits": lambda exchange, call: self._ready(self._images).edit(exchange, call, variation=False),
            "POST /v1/images/variations": lambda exchange, call: self._ready(self._images).edit(exchange, call, variation=True),
            "GET /v1/assets/{id}": lambda exchange, call: self._ready(self._images).asset(exchange),
            "GET /v1/models": lambda exchange, call: self._ready(self._models).list(exchange),
            "GET /v1/models/{id:path}": lambda exchange, call: self._ready(self._models).get(exchange),
            "GET /health": self._is_live,
            "GET /ready": self._is_ready,
            **dict.fromkeys(PAGES, openapi.answer),
        }
        self._router = Router([self._route(*method.split(" ")) for method in self._handlers], redirect_slashes=False)
        telemetry.names({method: method for method in self._handlers})

    def serve(self, images: Images, models: ModelList) -> None:
        """Sets the services that answer requests."""
        self._images, self._models = images, models

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        scope["app"] = self  # the router then raises errors instead of answering in its own form
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            allowed = (error.headers or {}).get("Allow")
            found = PathNotFound("there is no such path: /docs lists them") if allowed is None else MethodNotAllowed(allowed)
            await Exchange(scope, receive, send, self._readers).fail(found)

    def _route(self, verb: str, path: str) -> Route:
        return Route(path, _Endpoint(self, f"{verb} {path}"), methods=[verb])

    async def answer(self, method: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers a request by the handler of `method`, such as "GET /v1/models"."""
        exchange = Exchange(scope, receive, send, self._readers)
        call = call_of(method, exchange.metadata, exchange.peer)
        exchange.request_id, exchange.client = call.request_id, call.client
        with self._telemetry.call(call) as outcome:
            try:
                async with self._answering(exchange, call, outcome) as admitted:
                    await self._handlers[method](exchange, admitted)
            except ClientLeft:
                outcome.status = cancelled_status(exchange.time_remaining())
            except CancelledError:
                outcome.status = "CANCELLED"  # the server ends: the connection has been closed
            except Exception as caught:  # noqa: BLE001 - outermost handler
                await self._fail(exchange, call, caught, outcome)

    @asynccontextmanager
    async def _answering(self, exchange: Exchange, call: Call, outcome: Outcome) -> AsyncIterator[Call]:
        """Admits the request, and applies the timeout that its client sent."""
        if call.method in _OPEN:
            yield call
            return
        with self._access.admitted(call, exchange.metadata) as admitted, answering(admitted):
            outcome.client = exchange.client = admitted.client
            self._readers.check(admitted.client)
            seconds = exchange.read_timeout()
            async with time_limit(
                seconds, lambda: DeadlineExpired(f"the request did not finish within its timeout of {seconds or 0:g} s")
            ):
                yield admitted

    async def _fail(self, exchange: Exchange, call: Call, caught: Exception, outcome: Outcome) -> None:
        try:
            await exchange.fail(failed(caught, call, outcome))
        except ServerError:  # the client does not read the error either
            await exchange.abort()

    async def _is_live(self, exchange: Exchange, call: Call) -> None:
        await exchange.answer(200, b'{"status":"ok"}', {})

    async def _is_ready(self, exchange: Exchange, call: Call) -> None:
        ready = self._health.is_serving()
        await exchange.answer(200 if ready else 503, b'{"status":"%s"}' % (b"ready" if ready else b"not ready"), {})

    def _ready(self, service: Any) -> Any:
        if service is None:
            raise starting()
        return service


class _Endpoint:
    """The router's endpoint of one method."""

    def __init__(self, app: App, method: str) -> None:
        self._app, self._method = app, method

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._app.answer(self._method, scope, receive, send)
