"""`img2img playground`: serves a local web page for trying a server."""

import argparse
import ipaddress
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from img2img_client.connection import add_connection_flags, target_of
from img2img_client.reporting import attempt, print_error

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.retry import OnRetry

    from img2img_playground.snippet import Connection

PROGRAM = "img2img playground"

_EPILOG = """\
examples:
  img2img playground
  img2img playground --target https://gpu-box:50051 --token-file ~/.img2img-token
  img2img playground --port 0 --no-open

By default only this machine can open the page. With another --host, everyone who can reach that address can use the server
with your token.
"""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")
_SECONDS_TO_CLOSE = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags to `parser`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen address; default: %(default)s")
    page.add_argument("--port", type=int, default=7860, metavar="N", help="listen port; 0: any free port; default: %(default)s")
    page.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="open the page in a browser; default: if there is a desktop and a terminal",
    )
    add_connection_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until stopped. Returns 0, 1 if it cannot listen, or 2 for invalid arguments."""
    if not 0 <= arguments.port <= 65535:
        return print_error(PROGRAM, f"--port must be 0 to 65535, not {arguments.port}", 2)
    return attempt(PROGRAM, target_of(arguments), lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> None:
    import uvicorn
    from img2img_client.connection import connect_async

    from img2img_playground.app import make_app

    connection = connection_of(arguments)
    connect_async(arguments)  # Reports invalid flags now, not when the first page opens.
    listening = _listen(arguments.host, arguments.port)
    port = int(listening.getsockname()[1])
    local = _is_loopback(arguments.host)
    host = _bracketed(arguments.host)
    app = make_app(connection, partial(_open_client, arguments), (*_LOOPBACK_NAMES, host) if local else ("*",))
    address = f"http://{'localhost' if host in _LOOPBACK_NAMES else host}:{port}"
    print(f"Playground for {connection.target}: {address} (Ctrl-C to stop)", flush=True)
    if not local:
        print_error(PROGRAM, f"warning: everyone who can reach {arguments.host} can use this page, and through it the server", 0)
    if _wants_browser(arguments.open):
        threading.Thread(target=_open, args=(address,), daemon=True).start()
    # uvicorn closes the page first, then calls the previous signal handler.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(app, log_level="warning", loop="asyncio", timeout_graceful_shutdown=_SECONDS_TO_CLOSE)
    uvicorn.Server(config).run(sockets=[listening])


def _open_client(arguments: argparse.Namespace, on_retry: "OnRetry | None") -> "AsyncClient":
    from img2img_client.connection import connect_async

    if on_retry is None:
        arguments = argparse.Namespace(**{**vars(arguments), "retries": 0, "timeout": None})
    return connect_async(arguments, on_retry)


def connection_of(arguments: argparse.Namespace) -> "Connection":
    """The connection settings for the copied program, from this command's flags and variables."""
    from img2img_playground.snippet import Connection

    def file(path: Path | None, variable: str) -> Path | None:
        named = path or (Path(os.environ[variable]) if os.environ.get(variable) else None)
        return None if named is None else named.absolute()

    return Connection(
        target=target_of(arguments),
        token_file=None if arguments.token_file is None else arguments.token_file.absolute(),
        token_variable="IMG2IMG_TOKEN" if os.environ.get("IMG2IMG_TOKEN") else None,
        ca=file(arguments.ca, "IMG2IMG_CA"),
        certificate=file(arguments.client_certificate, "IMG2IMG_CLIENT_CERTIFICATE"),
        key=file(arguments.client_key, "IMG2IMG_CLIENT_KEY"),
        server_name=arguments.server_name,
        allow_insecure_token=arguments.allow_insecure_token,
        timeout=arguments.timeout,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {_bracketed(host)}:{port}: {os.strerror(error.errno or 0)}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _wants_browser(choice: bool | None) -> bool:
    if choice is not None:
        return choice
    desktop = sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return desktop and sys.stdout.isatty()


def _open(address: str) -> None:
    import webbrowser

    webbrowser.open(address)
