"""Binds the port with TLS, reloading renewed certificates. Non-loopback addresses without TLS are refused by default."""

import ipaddress
import logging
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path

import grpc

from img2img_server.config import ServerConfig, TlsSettings
from img2img_server.support.file_reloader import Contents, FileReloader
from img2img_server.support.listen_addresses import address_of, check_port

_log = logging.getLogger(__name__)

_MAX_PORT = 65535
_OPEN_TO_OTHERS = stat.S_IROTH | stat.S_IWOTH


def bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Binds the port of `config`, with TLS if it has a certificate, and returns the port.

    Raises ValueError for a non-loopback address without TLS unless `allow_insecure` is set, and OSError if the port is in use or
    a file cannot be read.
    """
    check(config)
    _warn(config)
    address = address_of(config.host, config.port)
    if not config.host.startswith("unix:"):
        check_port("port", config.host, config.port)
    try:
        if config.tls.certificate is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, Certificates(config.tls).credentials()))
    except RuntimeError:
        raise OSError(f"port: cannot listen on {address}") from None


def check(config: ServerConfig) -> None:
    """Checks settings and files as `bind` does, without binding a port. Raises ValueError or OSError."""
    if not config.host:
        raise ValueError("host is empty: use 127.0.0.1 for this machine only, 0.0.0.0 or :: for all interfaces")
    if config.port > _MAX_PORT:  # gRPC would use it modulo 65536
        raise ValueError(f"port is {config.port}, the maximum is {_MAX_PORT}")
    if config.tls.certificate is not None:
        _check_files(*_paths(config.tls))
    elif not is_local(config.host) and not config.allow_insecure:
        raise ValueError(
            f"host is {config.host}, not a loopback address, and TLS is not configured: set tls_certificate and tls_key, or "
            "set allow_insecure if TLS is terminated upstream"
        )


def _warn(config: ServerConfig) -> None:
    if config.tls.certificate is not None or is_local(config.host):
        return
    if config.tokens is not None:
        _log.warning("tokens are sent to %s without encryption: anyone on the network path can read and use them", config.host)
    else:
        _log.warning(
            "listening on %s without TLS and without tokens: anyone who can reach the port can use the server", config.host
        )


def is_local(host: str) -> bool:
    """Whether `host` is only reachable from this machine: a loopback address, "localhost" or a Unix socket, but no other name."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Certificates:
    """The certificate, its key and the client CA. Each handshake checks for renewed files.

    They are replaced together: if the key does not match the certificate, or a file is incomplete, the previous ones stay in use.
    Existing connections are not affected. Raises OSError if a file cannot be read and ValueError if it is invalid.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._paths = _paths(settings)
        self._watched = FileReloader("TLS certificates", self._read, self._make)

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of a gRPC port. gRPC checks for renewal on its own threads before each handshake."""
        return grpc.dynamic_ssl_server_credentials(
            self._watched.value,
            self._watched.look,  # type: ignore[arg-type] # None means unchanged, which the stubs omit
            require_client_authentication=len(self._paths) > 2,
        )

    def _read(self) -> Contents:
        return tuple(map(_read_file, self._paths))

    def _make(self, contents: Contents) -> grpc.ServerCertificateConfiguration:
        _check_files(*self._paths)
        if self._read() != contents:
            # OpenSSL only checks files, so their contents must be the same before and after the check.
            raise ValueError(f"{self._paths[0]} or a related file is incomplete")
        certificate, key, *client_ca = contents
        if self._paths[1].stat().st_mode & _OPEN_TO_OTHERS:
            _log.warning("%s is readable or writable by other users of this machine: run chmod 600 on it", self._paths[1])
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)


def server_context(settings: TlsSettings, protocols: Sequence[str]) -> ssl.SSLContext:
    """TLS of a port that Python's ssl serves, with `protocols` for ALPN. Renewed files are used from the next handshake on."""

    def make(contents: Contents) -> ssl.SSLContext:
        certificate, key, *client_ca = _paths(settings)
        _check_files(certificate, key, *client_ca)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca[0] if client_ca else None)
        context.verify_mode = ssl.CERT_REQUIRED if client_ca else ssl.CERT_NONE
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(list(protocols))
        return context

    paths = _paths(settings)
    watched = FileReloader("TLS certificates of HTTP", lambda: tuple(map(_read_file, paths)), make)

    def take_newest(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        watched.look()
        connection.context = watched.value

    watched.value.sni_callback = take_newest
    return watched.value


def _paths(settings: TlsSettings) -> tuple[Path, ...]:
    """The paths of the certificate, its key and the client CA, if set."""
    return tuple(path for path in (settings.certificate, settings.key, settings.client_ca) if path is not None)


def _check_files(certificate: Path, key: Path, client_ca: Path | None = None) -> None:
    """Raises OSError if a file cannot be read, and ValueError if key and certificate do not match or the CA is invalid."""

    def password() -> bytes:
        raise ValueError(f"tls_key: {key} is encrypted: give an unencrypted private key")

    for path in (certificate, key) if client_ca is None else (certificate, key, client_ca):
        _read_file(path)  # OpenSSL's error would not name the file
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        why = error.reason.lower().replace("_", " ") if error.reason else "not PEM"
        raise ValueError(f"tls_certificate {certificate} and tls_key {key} do not match, or are not PEM: {why}") from None
    if client_ca is None:
        return
    try:
        context.load_verify_locations(client_ca)
    except ssl.SSLError:
        raise ValueError(f"tls_client_ca {client_ca} contains no PEM certificate") from None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from None
