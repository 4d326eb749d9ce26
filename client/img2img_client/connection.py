"""The connection flags of commands that call a server: its address and credentials."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from img2img_client.values import DEFAULT_TARGET

if TYPE_CHECKING:
    from img2img_client.async_client import AsyncClient
    from img2img_client.client import Client
    from img2img_client.retry import OnRetry, RetryPolicy

_RETRIES = 4


def add_connection_flags(parser: argparse.ArgumentParser, *, patience: str = "never") -> None:
    """Adds the connection flags. `patience` is the help text for the default timeout."""
    parser.allow_abbrev = (
        False  # Else --token SECRET would mean --token-file, and the error would print the secret as a missing file.
    )
    group = parser.add_argument_group("connection (a flag overrides its environment variable)")
    group.add_argument(
        "--target",
        "--server",
        dest="target",
        metavar="TARGET",
        help=f"host:port, or https://host:port for TLS; several separated by commas; $IMG2IMG_TARGET; default: {DEFAULT_TARGET}",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the access token; $IMG2IMG_TOKEN is the token itself"
    )
    group.add_argument(
        "--allow-insecure-token",
        action="store_true",
        help="send the token without TLS (if the connection is encrypted otherwise)",
    )
    group.add_argument("--ca", type=Path, metavar="FILE", help="CA certificate of the server (PEM); $IMG2IMG_CA")
    group.add_argument(
        "--client-certificate", type=Path, metavar="FILE", help="the client's certificate (PEM); $IMG2IMG_CLIENT_CERTIFICATE"
    )
    group.add_argument("--client-key", type=Path, metavar="FILE", help="the client's private key (PEM); $IMG2IMG_CLIENT_KEY")
    group.add_argument("--server-name", metavar="NAME", help="name in the server's certificate, if it differs from the address")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help=f"timeout; default: {patience}")
    group.add_argument(
        "--retries",
        type=int,
        metavar="N",
        default=_RETRIES,
        help="maximum retries if a server is busy or unreachable; default: %(default)s",
    )


def target_of(arguments: argparse.Namespace) -> str:
    """The server's address."""
    return str(arguments.target or os.environ.get("IMG2IMG_TARGET") or DEFAULT_TARGET)


def connect(arguments: argparse.Namespace, on_retry: "OnRetry | None" = None) -> "Client":
    """A client for the flags and variables. Raises OSError if a file cannot be read, ValueError if they contradict each other."""
    from img2img_client.client import Client

    return Client(target_of(arguments), **_client_arguments(arguments, on_retry))


def connect_async(arguments: argparse.Namespace, on_retry: "OnRetry | None" = None) -> "AsyncClient":
    """An AsyncClient for the flags and variables. Raises like `connect`."""
    from img2img_client.async_client import AsyncClient

    return AsyncClient(target_of(arguments), **_client_arguments(arguments, on_retry))


class _ClientArguments(TypedDict):
    """The arguments of both client classes."""

    timeout: float | None
    token: str | None
    ca: Path | None
    certificate: Path | None
    key: Path | None
    server_name: str | None
    allow_insecure_token: bool
    retries: "RetryPolicy | None"


def _client_arguments(arguments: argparse.Namespace, on_retry: "OnRetry | None") -> _ClientArguments:
    from img2img_client.retry import RetryPolicy

    if arguments.retries < 0:
        raise ValueError(f"--retries must be at least 0, not {arguments.retries}")
    return _ClientArguments(
        timeout=arguments.timeout,
        token=_token(arguments.token_file),
        ca=_file(arguments.ca, "IMG2IMG_CA"),
        certificate=_file(arguments.client_certificate, "IMG2IMG_CLIENT_CERTIFICATE"),
        key=_file(arguments.client_key, "IMG2IMG_CLIENT_KEY"),
        server_name=arguments.server_name,
        allow_insecure_token=arguments.allow_insecure_token,
        retries=RetryPolicy(max_attempts=arguments.retries + 1, on_retry=on_retry) if arguments.retries else None,
    )


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("IMG2IMG_TOKEN") or None
    return path.read_text(encoding="utf-8").strip()


def _file(path: Path | None, variable: str) -> Path | None:
    if path is None and os.environ.get(variable):
        return Path(os.environ[variable])
    return path
