"""Addresses to listen on: their format, and errors that explain why binding fails."""

import errno
import socket
from typing import Any


def check_port(setting: str, host: str, port: int) -> None:
    """Raises OSError, naming the `setting` and the cause, if no socket can be bound to `port` of `host`. gRPC's error has no
    cause."""
    try:
        found = socket.getaddrinfo(
            host.removeprefix("[").removesuffix("]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise OSError(f"{setting}: cannot listen on {address_of(host, port)}: {error.strerror}") from None
    errors = [
        problem for family, kind, protocol, _, address in found if (problem := _bind_error(family, kind, protocol, address))
    ]
    in_use = [problem for problem in errors if problem.errno == errno.EADDRINUSE]
    if in_use:
        line = (
            f"{setting}: {address_of(host, port)} is in use by another process: stop it, or choose another port (0: a free one)"
        )
        raise OSError(line)
    if len(errors) == len(found):
        raise OSError(f"{setting}: cannot listen on {address_of(host, port)}: {errors[0].strerror}")


def _bind_error(family: int, kind: int, protocol: int, address: Any) -> OSError | None:
    """The error of binding a socket of this kind, None on success."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC and Python's HTTP server do
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def address_of(host: str, port: int) -> str:
    """The address in gRPC's format: an IPv6 host in brackets, a Unix socket without a port."""
    if host.startswith("unix:"):
        return host
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{bracketed}:{port}"
