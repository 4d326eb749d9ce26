"""The playground's web application: the page, the image routes, and access control."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException, Request, Response
from nicegui import Client, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_playground.images import MAX_BYTES
from img2img_playground.origins import SameOrigin
from img2img_playground.page import Page
from img2img_playground.presets import STORAGE_KEY
from img2img_playground.session import Session
from img2img_playground.sessions import Sessions, TooManyTabs
from img2img_playground.snippet import Connection
from img2img_playground.watch import ServerWatch

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.retry import OnRetry

OpenClient = Callable[["OnRetry | None"], "AsyncClient"]
"""Creates a client of the server that reports retries to the given function; None: a client that does not retry."""

_TITLE = "img2img playground"
_ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#3b6fd4"/>
<path d="M16 5h5a6 6 0 0 1 6 6v10a6 6 0 0 1-6 6h-5z" fill="#fff" opacity=".85"/></svg>"""
_SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
_SECONDS_TO_CONNECT = 60.0
_RECONNECT_SECONDS = 3.0
"""Time for a tab to reconnect after a broken connection or a reload. Then its run is cancelled."""

_HEADERS = {
    # Loads from this server only, so that the page works offline, and forbids framing. Vue compiles templates in the page.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def make_app(connection: Connection, open_client: OpenClient, hosts: tuple[str, ...]) -> FastAPI:
    """Creates the application, once per process (a limit of NiceGUI). It serves only requests to `hosts`, which prevents DNS
    rebinding, and refuses requests from pages of other origins."""
    sessions = Sessions(lambda: _make_session(open_client, connection.target))
    watches: list[ServerWatch] = []  # One entry while the application runs, since it needs the event loop.

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watches.append(ServerWatch(open_client(None), connection.target))
        yield
        await sessions.close()
        await watches.pop().close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_image_routes(app, sessions)
    _add_page(sessions, watches, connection)
    ui.run_with(
        app,
        title=_TITLE,
        favicon=_ICON,
        dark=None,
        tailwind=False,
        reconnect_timeout=_RECONNECT_SECONDS,
        show_welcome_message=False,
    )
    app.add_middleware(SecureHeaders)
    app.add_middleware(SameOrigin)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def _make_session(open_client: OpenClient, target: str) -> Session:
    return Session(open_client, target)


def _add_image_routes(app: FastAPI, sessions: Sessions) -> None:
    """Adds the image routes. Their addresses contain the session's key, which only its page knows."""

    def find(key: str) -> Session:
        session = sessions.find(key)
        if session is None:
            raise HTTPException(404)
        return session

    @app.put("/tabs/{key}/source", status_code=204)
    async def upload(key: str, request: Request) -> None:
        session = find(key)
        await session.upload(await _body(request), _file_name(request))

    @app.put("/tabs/{key}/mask")
    async def set_mask(key: str, request: Request) -> Response:
        session = find(key)
        session.set_mask(await _body(request))
        mask = session.extras.mask
        return Response("" if mask is None else mask.id, media_type="text/plain")

    @app.get("/tabs/{key}/results.zip")
    async def archive(key: str) -> Response:
        data = await asyncio.to_thread(find(key).history.archive)
        return Response(data, media_type="application/zip", headers={"cache-control": "no-store"})

    @app.get("/tabs/{key}/images/{image_id}")
    async def show(key: str, image_id: str) -> Response:
        image = find(key).image(image_id)
        if image is None:
            raise HTTPException(404)
        return Response(image.data, media_type=image.media_type, headers={"cache-control": "private, max-age=86400"})

    _add_list_routes(app, find)


def _add_list_routes(app: FastAPI, find: Callable[[str], Session]) -> None:
    """Adds the routes of images of which a request has several."""

    @app.put("/tabs/{key}/references", status_code=204)
    async def add_reference(key: str, request: Request) -> None:
        session = find(key)
        session.add_reference(await _body(request), _file_name(request))

    @app.put("/tabs/{key}/controls", status_code=204)
    async def add_control(key: str, request: Request) -> None:
        session = find(key)
        session.add_control(await _body(request), _file_name(request))

    @app.put("/tabs/{key}/prompts/{prompt_id}", status_code=204)
    async def add_prompt_image(key: str, prompt_id: str, request: Request) -> None:
        session = find(key)
        session.add_prompt_image(await _body(request), _file_name(request), prompt_id)


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BYTES:
            raise HTTPException(413)
    return bytes(data)


def _file_name(request: Request) -> str:
    from urllib.parse import unquote

    return unquote(request.headers.get("x-file-name", ""), errors="replace")


def _add_page(sessions: Sessions, watches: list[ServerWatch], connection: Connection) -> None:
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

    @ui.page("/", title=_TITLE)
    async def index(client: Client) -> None:
        ui.add_head_html(f"<style>{style}</style><script>{_SCRIPT}</script>")
        await client.connected(_SECONDS_TO_CONNECT)
        tab = client.tab_id
        if tab is None:  # The tab has closed already.
            return
        try:
            session = sessions.enter(tab)
        except TooManyTabs as error:
            ui.label(f"Cannot open another page: {error}.").classes("page")
            return
        page = Page(session, watches[0], connection)

        async def on_delete() -> None:
            page.close()
            sessions.leave(tab)

        client.on_delete(on_delete)
        with contextlib.suppress(TimeoutError):  # The tab has closed already.
            stored = await ui.run_javascript(f"localStorage.getItem({json.dumps(STORAGE_KEY)})", timeout=_SECONDS_TO_CONNECT)
            page.load_presets(stored)


class SecureHeaders:
    """Adds security headers to responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application and adds the headers."""

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self._app(scope, receive, send_more if scope["type"] == "http" else send)
