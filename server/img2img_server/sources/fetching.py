"""Fetches an image from a caller's URL without giving access to the server's private network (SSRF protection).

The check applies to the address that the socket is about to connect to, after the only name resolution. This covers DNS
rebinding, unusual spellings of addresses, and redirects.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from img2img_server.errors import InvalidField
from img2img_server.support.call import current
from img2img_server.support.fair_queue import FairSlots, FairThreads

# In addition to addresses that Python counts as not global (IANA's special-purpose registries): anycast relays and sinks, whose
# destination is unknown, and a cloud's metadata address that looks public.
_REFUSED_V4 = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata is 100.100.100.200
        "168.63.129.16/32",  # Azure's wire server
        "192.0.0.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "224.0.0.0/3",
    )
)
_GLOBAL_V6 = ip_network("2000::/3")
_REFUSED_V6 = tuple(
    ip_network(network)
    for network in (
        "2001::/23",  # IETF protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4, which ends at any IPv4 address
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
_NAT64 = ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, in a socket's spelling, is a public unicast address.

    An IPv4 address embedded in IPv6 (mapped or NAT64) is checked as IPv4. Malformed addresses, and those with a zone, are not
    public.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return _is_public_v4(parsed) if isinstance(parsed, IPv4Address) else _is_public_v6(parsed)


def _is_public_v4(address: IPv4Address) -> bool:
    return address.is_global and not address.is_multicast and not any(address in network for network in _REFUSED_V4)


def _is_public_v6(address: IPv6Address) -> bool:
    if address.scope_id is not None:
        return False
    inside = address.ipv4_mapped or (IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None)
    if inside is not None:
        return _is_public_v4(inside)
    return address in _GLOBAL_V6 and address.is_global and not any(address in network for network in _REFUSED_V6)


_log = logging.getLogger(__name__)

_FIELD = "image.uri"
_MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_CHARACTERS = 4096
_AT_ONCE = 16
"""Maximum downloads in progress, shared fairly among clients. Waiting counts towards a download's time limit."""
_UNREACHABLE = "the image cannot be fetched from this address"
"""The same error for refused and for unreachable addresses: otherwise callers could scan the server's network."""


class Resolver(AbstractResolver):
    """The system's resolver on its own threads: slow resolution of one client's names does not delay other clients."""

    def __init__(self) -> None:
        self._threads = FairThreads(_AT_ONCE, "img2img-resolver")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The addresses of a name. Raises OSError if there are none."""
        found = await self._threads.run(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM)
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=socket.AI_NUMERICHOST
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Stops the threads without waiting for them."""
        self._threads.close()


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Makes errors about the source image's address in the block errors about `field`."""
    try:
        yield
    except InvalidField as error:
        raise InvalidField(field, error.description) from None


class Fetcher:
    """Downloads over http and https within `seconds` and `most` bytes.

    `allowed` decides whether an address, as text, may be connected to; `ports` are the allowed ports. Only tests change these,
    `resolver` and `tls`.
    """

    def __init__(
        self,
        seconds: float,
        most: int,
        allowed: Callable[[str], bool] = is_public,
        ports: Collection[int] = (80, 443),
        resolver: AbstractResolver | None = None,
        tls: ssl.SSLContext | bool = True,
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._allowed = allowed
        self._ports = ports
        self._resolver = resolver
        self._tls = tls
        self._slots = FairSlots(_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the session and the resolver."""
        if self._session is not None:
            await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()

    def check(self, address: str, field: str = _FIELD) -> URL:
        """The parsed address. Raises InvalidField, naming `field`, if it must not be fetched."""
        with _named(field):
            return self._parsed(address)

    def _parsed(self, address: str) -> URL:
        if len(address) > _MOST_CHARACTERS:
            raise InvalidField(_FIELD, f"the address has {len(address)} characters, the maximum is {_MOST_CHARACTERS}")
        try:
            url = URL(address)
        except (ValueError, IndexError):  # yarl's own of "http://[:]:2@"
            raise InvalidField(_FIELD, "the address is malformed") from None
        return self._checked(url)

    async def fetch(self, address: str, field: str = _FIELD) -> bytes:
        """The bytes there. Raises InvalidField, naming `field`, if they cannot be fetched, for whichever reason."""
        with _named(field):
            url = self._parsed(address)
            try:
                async with asyncio.timeout(self._seconds), self._slots.slot(current().client):
                    return await self._follow(url)
            except TimeoutError:
                raise InvalidField(_FIELD, f"fetching the image took longer than {self._seconds:g} seconds") from None

    def _shared(self) -> aiohttp.ClientSession:
        """The session of all downloads, created on first use. It keeps no connections, cookies or credentials."""
        if self._session is not None:
            return self._session
        self._resolver = self._resolver or Resolver()
        connector = aiohttp.TCPConnector(
            socket_factory=self._socket, resolver=self._resolver, ssl=self._tls, use_dns_cache=False, force_close=True, limit=0
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "img2img", "Accept": "image/*", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),  # fetch() limits the whole download
            auto_decompress=False,
            trust_env=False,
        )
        return self._session

    async def _follow(self, url: URL) -> bytes:
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                answer = await self._get(url)
            # ValueError: such as UnicodeError for a malformed name.
            except (aiohttp.ClientError, OSError, ValueError) as error:
                _log.info("not fetched: %r", error)
                raise InvalidField(_FIELD, _UNREACHABLE) from None
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise InvalidField(_FIELD, f"the address redirects more than {_MOST_REDIRECTS} times")

    async def _get(self, url: URL) -> bytes | URL:
        """The response's bytes, or the address that it redirects to."""
        async with self._shared().get(url, allow_redirects=False) as response:
            if response.status in _REDIRECTS:
                return self._redirected(url, response.headers.get("Location", ""))
            if response.status != 200:
                raise InvalidField(_FIELD, f"the address responded with status {response.status}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise InvalidField(_FIELD, "the address responded with a compressed file, which is not supported")
            return await self._body(response)

    def _redirected(self, url: URL, location: str) -> URL:
        try:
            target = url.join(URL(location))
        except (ValueError, IndexError):
            raise InvalidField(_FIELD, "the address redirects to a malformed address") from None
        if url.scheme == "https" and target.scheme == "http":
            raise InvalidField(_FIELD, "the address redirects from https to http")
        return self._checked(target)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        too_large = InvalidField(_FIELD, f"the file has more than {self._most} bytes, the maximum")
        if response.content_length is not None and response.content_length > self._most:
            raise too_large
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > self._most:
                raise too_large
        return bytes(data)

    def _checked(self, url: URL) -> URL:
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidField(_FIELD, "only http and https addresses with a host can be fetched")
        if url.user is not None or url.password is not None:
            raise InvalidField(_FIELD, "the address contains a user or password: remove it")
        if "%" in url.host:
            raise InvalidField(_FIELD, "the address contains an IPv6 zone, which is not supported")
        if url.port not in self._ports:
            raise InvalidField(_FIELD, f"the address has port {url.port}; allowed ports are {', '.join(map(str, self._ports))}")
        return url

    def _socket(self, address: Any) -> socket.socket:
        """Creates the socket of a connection. `address` is a tuple of getaddrinfo. Raises OSError if it is not allowed."""
        family, kind, protocol, _, (host, port, *_) = address
        if family not in (socket.AF_INET, socket.AF_INET6) or not self._allowed(host):
            raise OSError(f"connections to {host} port {port} are not allowed")
        return socket.socket(family, kind, protocol)
