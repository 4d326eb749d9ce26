"""How servers are reached: the channel, with or without TLS, and the token that goes with every call."""

import re
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc import aio

from img2img_client import balancing
from img2img_client.options import MAX_MESSAGE_BYTES
from img2img_client.retry import RetryPolicy
from img2img_client.targets import Target, is_loopback

_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What the server made is taken whatever its size: it was asked for, and its making is paid.
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_TOKEN_FORM = re.compile(r"[\x21-\x7e]+")
"""What a header can hold of a token."""


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """What opens a server that does not let everybody in; every part is optional. Never printed.

    `token` is sent with every call. `ca`, `certificate` and `key` are PEM files: who signed the server's certificate (the
    system's roots, where None), and what the client shows of itself. `credentials` are gRPC's own, in place of those files.
    `server_name` is whom the server's certificate is for, where that is not the target's own name.
    """

    token: str | None = None
    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    credentials: grpc.ChannelCredentials | None = None
    allow_insecure_token: bool = False
    server_name: str | None = None

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

    def open(self, secure: bool) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None for plain text. OSError where a file cannot be read."""
        if self.credentials is None and (secure or self.ca is not None or self.certificate is not None):
            return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))
        return self.credentials


class Line:
    """A channel to be: all that can be wrong with it is found here, and it is opened when it is needed.

    OSError where a file of `access` cannot be read. ValueError where a token would go over a network in plain text and nobody
    said that this is meant, or where nobody could say whom the certificates of several addresses are for. `dns_config` lets a
    service config that DNS gives take the place of ours.
    """

    def __init__(self, target: Target, access: Access, policy: RetryPolicy | None, *, dns_config: bool = False) -> None:
        self._name = target.name
        self._credentials = access.open(target.secure)
        self._options = _options(target, access, policy, dns_config)
        local = is_loopback(target.name)
        if self._credentials is not None:
            if target.listed and access.server_name is None:
                raise ValueError("server_name is missing: say whom the certificate of these addresses is for")
        elif access.token is not None and not access.allow_insecure_token and not local:
            raise ValueError(
                f"a token for {target.name} would go over the network in plain text: use https://, or allow_insecure_token where"
                " something else encrypts it"
            )

    def open(self) -> grpc.Channel:
        """A channel that connects at its first call."""
        if self._credentials is not None:
            return grpc.secure_channel(self._name, self._credentials, self._options, grpc.Compression.NoCompression)
        return grpc.insecure_channel(self._name, self._options, grpc.Compression.NoCompression)

    def open_async(self) -> aio.Channel:
        """The same for the event loop that runs now."""
        if self._credentials is not None:
            return aio.secure_channel(self._name, self._credentials, self._options, grpc.Compression.NoCompression)
        return aio.insecure_channel(self._name, self._options, grpc.Compression.NoCompression)


def _options(target: Target, access: Access, policy: RetryPolicy | None, dns_config: bool) -> tuple[tuple[str, int | str], ...]:
    """gRPC's channel arguments. One server is reached as gRPC does it by itself."""
    proxied = not (target.several or is_loopback(target.name))
    options: list[tuple[str, int | str]] = [
        *_OPTIONS,
        ("grpc.enable_http_proxy", int(proxied)),
        ("grpc.service_config_disable_resolution", int(not dns_config)),
    ]
    if target.several:
        # Where DNS may say how, nobody knows what gRPC would try again, and nothing counts it: so ours says nothing of it.
        options += [*balancing.OPTIONS, ("grpc.service_config", balancing.service_config(None if dns_config else policy))]
    if access.server_name is not None:
        options.append(("grpc.default_authority", access.server_name))
    return tuple(options)


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
