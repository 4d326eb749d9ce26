"""What every command that talks to a server asks for: where the server is, and what it lets in."""

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
    """Declares them. `patience` are the words for what the command does without a time-out."""
    parser.allow_abbrev = False  # Else --token SECRET would mean --token-file, and the secret would be told as a missing file.
    group = parser.add_argument_group("the server (a flag comes before its variable)")
    group.add_argument(
        "--target",
        "--server",
        dest="target",
        metavar="TARGET",
        help=f"host:port, or https://host:port for TLS, or several with commas; $IMG2IMG_TARGET; default: {DEFAULT_TARGET}",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the file of the token that the server wants; $IMG2IMG_TOKEN is the token"
    )
    group.add_argument(
        "--allow-insecure-token", action="store_true", help="send the token without TLS, where something else encrypts it"
    )
    group.add_argument("--ca", type=Path, metavar="FILE", help="who signed the server's certificate (PEM); $IMG2IMG_CA")
    group.add_argument(
        "--client-certificate", type=Path, metavar="FILE", help="the certificate to show (PEM); $IMG2IMG_CLIENT_CERTIFICATE"
    )
    group.add_argument("--client-key", type=Path, metavar="FILE", help="its private key (PEM); $IMG2IMG_CLIENT_KEY")
    group.add_argument(
        "--server-name", metavar="NAME", help="whom the server's certificate is for, where that is not its address"
    )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help=f"give up after this long; default: {patience}")
    group.add_argument(
        "--retries",
        type=int,
        metavar="N",
        default=_RETRIES,
        help="how often to try again where a server is busy or away; default: %(default)s",
    )


def target_of(arguments: argparse.Namespace) -> str:
    """Where the server is."""
    return str(arguments.target or os.environ.get("IMG2IMG_TARGET") or DEFAULT_TARGET)


def connect(arguments: argparse.Namespace, on_retry: "OnRetry | None" = None) -> "Client":
    """A client of the server that flags and variables name. OSError where a file cannot be read, ValueError where they clash."""
    from img2img_client.client import Client

    return Client(target_of(arguments), **_means(arguments, on_retry))


def connect_async(arguments: argparse.Namespace, on_retry: "OnRetry | None" = None) -> "AsyncClient":
    """The same for asyncio. Raises what `connect` does."""
    from img2img_client.async_client import AsyncClient

    return AsyncClient(target_of(arguments), **_means(arguments, on_retry))


class _Means(TypedDict):
    """What both clients are made with."""

    timeout: float | None
    token: str | None
    ca: Path | None
    certificate: Path | None
    key: Path | None
    server_name: str | None
    allow_insecure_token: bool
    retries: "RetryPolicy | None"


def _means(arguments: argparse.Namespace, on_retry: "OnRetry | None") -> _Means:
    from img2img_client.retry import RetryPolicy

    if arguments.retries < 0:
        raise ValueError(f"--retries {arguments.retries}: the least is 0")
    return _Means(
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
