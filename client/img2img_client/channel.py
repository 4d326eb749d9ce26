"""The gRPC channel to a server, with or without TLS, and the token sent with every call."""

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
    # Results have no size limit.
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_TOKEN_FORM = re.compile(r"[\x21-\x7e]+")
"""The characters of a token that a header can hold."""


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """Credentials for a server; every part is optional. Has no repr, so that secrets are not printed.

    `token` is sent with every call. `ca`, `certificate` and `key` are PEM files: the CA of the server's certificate (None: the
    system's roots), and the client's certificate and private key. `credentials` (gRPC's) replace these files. `server_name` is
    the name in the server's certificate, if it differs from the target's name.
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
            raise ValueError("certificate and key must be given together")
        if self.credentials is not None and (self.ca or self.certificate):
            raise ValueError("credentials cannot be combined with ca, certificate and key")
        if self.token is not None and not _TOKEN_FORM.fullmatch(self.token):
            raise ValueError(
                "token must consist of printable ASCII characters without spaces or line breaks, and must not be empty"
            )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata sent with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def open(self, secure: bool) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None for plaintext. Raises OSError if a file cannot be read."""
        if self.credentials is None and (secure or self.ca is not None or self.certificate is not None):
            return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))
        return self.credentials


class ChannelFactory:
    """Validates the settings of a channel; `open` creates it.

    Raises OSError if a file of `access` cannot be read; ValueError if a token would be sent over a network in plaintext without
    `allow_insecure_token`, or if several addresses use TLS without a `server_name`. `dns_config`: a service config from DNS
    replaces ours.
    """

    def __init__(self, target: Target, access: Access, policy: RetryPolicy | None, *, dns_config: bool = False) -> None:
        self._name = target.name
        self._credentials = access.open(target.secure)
        self._options = _options(target, access, policy, dns_config)
        local = is_loopback(target.name)
        if self._credentials is not None:
            if target.listed and access.server_name is None:
                raise ValueError("server_name is missing: give the name in the certificate of these addresses")
        elif access.token is not None and not access.allow_insecure_token and not local:
            raise ValueError(
                f"the token for {target.name} would be sent over the network in plaintext: use https://, or set"
                " allow_insecure_token if the connection is encrypted otherwise"
            )

    def open(self) -> grpc.Channel:
        """Creates a channel, which connects at its first call."""
        if self._credentials is not None:
            return grpc.secure_channel(self._name, self._credentials, self._options, grpc.Compression.NoCompression)
        return grpc.insecure_channel(self._name, self._options, grpc.Compression.NoCompression)

    def open_async(self) -> aio.Channel:
        """Creates a channel for the running event loop."""
        if self._credentials is not None:
            return aio.secure_channel(self._name, self._credentials, self._options, grpc.Compression.NoCompression)
        return aio.insecure_channel(self._name, self._options, grpc.Compression.NoCompression)


def _options(target: Target, access: Access, policy: RetryPolicy | None, dns_config: bool) -> tuple[tuple[str, int | str], ...]:
    """gRPC's channel arguments. A single server has gRPC's defaults for balancing and retries."""
    proxied = not (target.several or is_loopback(target.name))
    options: list[tuple[str, int | str]] = [
        *_OPTIONS,
        ("grpc.enable_http_proxy", int(proxied)),
        ("grpc.service_config_disable_resolution", int(not dns_config)),
    ]
    if target.several:
        # A service config from DNS may have its own retries, which cannot be counted, so ours then has none.
        options += [*balancing.OPTIONS, ("grpc.service_config", balancing.service_config(None if dns_config else policy))]
    if access.server_name is not None:
        options.append(("grpc.default_authority", access.server_name))
    return tuple(options)


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
