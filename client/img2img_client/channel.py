"""How a server is reached: the channel, with or without TLS, and the token that goes with every call."""

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from img2img_client.options import MAX_MESSAGE_BYTES

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What the server made is taken whatever its size: it was asked for, and its making is paid.
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_TOKEN_FORM = re.compile(r"[\x21-\x7e]+")
"""What a header can hold of a token."""

_SCHEME = re.compile(r"^(dns:///|dns:|ipv4:|ipv6:)")
_ADDRESS = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+))(:\w+)?")


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """What opens a server that does not let everybody in; every part is optional. Never printed.

    `token` is sent with every call. `ca`, `certificate` and `key` are PEM files: who signed the server's certificate (the
    system's roots, where None), and what the client shows of itself. `credentials` are gRPC's own, in place of those files.
    """

    token: str | None = None
    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    credentials: grpc.ChannelCredentials | None = None
    allow_insecure_token: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or none")
        if self.credentials is not None and (self.ca or self.certificate):
            raise ValueError("credentials take the place of ca, certificate and key: give one or the other")
        if self.token is not None and not _TOKEN_FORM.fullmatch(self.token):
            raise ValueError("token is empty, or has a space, a line break or what is not ASCII in it")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def open_channel(target: str, access: Access) -> grpc.Channel:
    """A channel that connects at its first call. OSError where a file of `access` cannot be read.

    ValueError where a token would go over a network in plain text, and nobody said that this is meant.
    """
    secure, plain = target.startswith("https://"), target.startswith("http://")
    host = target.partition("://")[2].rstrip("/") if secure or plain else target
    credentials = access.credentials
    if credentials is None and (secure or access.ca is not None or access.certificate is not None):
        credentials = grpc.ssl_channel_credentials(_read(access.ca), _read(access.key), _read(access.certificate))
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0 if is_loopback(host) else 1))
    if credentials is not None:
        return grpc.secure_channel(host, credentials, options, grpc.Compression.NoCompression)
    if access.token is not None and not access.allow_insecure_token and not is_loopback(host):
        raise ValueError(
            f"a token for {host} would go over the network in plain text: use https://{host}, or allow_insecure_token where"
            " something else encrypts it"
        )
    return grpc.insecure_channel(host, options, grpc.Compression.NoCompression)


def is_loopback(target: str) -> bool:
    """Whether the target is this machine: no proxy can reach it (gRPC would ask $http_proxy all the same), and nobody listens
    in between."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = _SCHEME.sub("", target).split(",")  # "ipv4:" and "ipv6:" may have several
    return all(_is_loopback_address(address) for address in addresses)


def _is_loopback_address(address: str) -> bool:
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return False
    host = found["v6"] or found["host"]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
