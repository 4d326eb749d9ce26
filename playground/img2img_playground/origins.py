"""Refuses cross-origin requests. Browsers send the page's `Origin` with them, also to open a websocket."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

_STATUS = 403
_CLOSED = 1008
"""WebSocket's "policy violation"."""


class SameOrigin:
    """Responds 403, or closes a websocket, if the host and port of an `Origin` differ from `Host`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards requests of the page itself, and of programs, which send no origin."""
        if scope["type"] in ("http", "websocket") and not _is_same(Headers(scope=scope)):
            refusal = PlainTextResponse("cross-origin request", _STATUS) if scope["type"] == "http" else WebSocketClose(_CLOSED)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_same(headers: Headers) -> bool:
    host = headers.get("host", "")
    return all(bool(host) and urlsplit(origin).netloc.lower() == host.lower() for origin in headers.getlist("origin"))
