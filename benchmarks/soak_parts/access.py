"""Connections to the server under test: TLS with a new certificate authority, and a token for each tenant."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import trustme
from img2img_server.access import tokens

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # one connection per channel
    ("grpc.enable_http_proxy", 0),
)
LOAD, SMALL, STRANGER = "load", "small", "stranger"
"""The tenants: the callers of the load, a caller that sends one request at a time, and the hostile clients."""


@dataclass(frozen=True, slots=True)
class Access:
    """`authority` is the PEM certificate to trust, empty without TLS; `secrets` has the token of each tenant, if any."""

    authority: bytes = b""
    secrets: Mapping[str, str] = field(default_factory=dict)

    def channel(self, target: str, tenant: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """An asynchronous channel of a tenant, with its own connection."""
        return grpc.aio.secure_channel(target, self._credentials(tenant), (*OPTIONS, *options)) if self._secure else (
            grpc.aio.insecure_channel(target, (*OPTIONS, *options))
        )  # fmt: skip

    def blocking_channel(self, target: str, tenant: str) -> grpc.Channel:
        """A blocking channel of a tenant, with its own connection."""
        if self._secure:
            return grpc.secure_channel(target, self._credentials(tenant), OPTIONS)
        return grpc.insecure_channel(target, OPTIONS)

    def context(self) -> ssl.SSLContext | None:
        """The TLS context for HTTP/2; None without TLS."""
        if not self.authority:
            return None
        context = ssl.create_default_context(cadata=self.authority.decode())
        context.set_alpn_protocols(["h2"])
        return context

    @property
    def _secure(self) -> bool:
        return bool(self.authority or self.secrets)

    def _credentials(self, tenant: str) -> grpc.ChannelCredentials:
        plain = grpc.local_channel_credentials()  # tokens may be sent: the connection is local
        channel = grpc.ssl_channel_credentials(self.authority) if self.authority else plain
        if not self.secrets:
            return channel
        return grpc.composite_channel_credentials(channel, grpc.access_token_call_credentials(self.secrets[tenant]))


def issue(folder: Path, tls: bool, with_tokens: bool) -> tuple[Access, list[str]]:
    """Writes a certificate and a tokens file to `folder`. Returns the access and the flags of the server."""
    flags: list[str] = []
    authority, secrets = b"", {}
    if tls:
        made = trustme.CA()
        issued = made.issue_cert("localhost", "127.0.0.1")
        certificate, key = folder / "server.pem", folder / "server.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(issued.private_key_pem.bytes())
        authority = made.cert_pem.bytes()
        flags += ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    if with_tokens:
        path = folder / "tokens.toml"
        secrets = {tenant: tokens.make_secret() for tenant in (LOAD, SMALL, STRANGER)}
        with tokens.editing(path) as known:
            for tenant, secret in secrets.items():
                known[tenant] = tokens.Token(tenant, tokens.digest(secret), admin=tenant == LOAD)
        flags += ["--tokens", str(path)]
    return Access(authority, secrets), flags
