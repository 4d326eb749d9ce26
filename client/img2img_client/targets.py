"""Parses the servers' addresses into gRPC targets."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNSPLIT = ("ipv4:", "ipv6:", "unix:", "unix-abstract:")
"""Prefixes of targets whose commas belong to gRPC's syntax or to a path."""
_PREFIX = re.compile(r"^(dns:///|dns:|ipv4:|ipv6:)")
_ADDRESS = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+))(:\w+)?")


@dataclass(frozen=True, slots=True)
class Target:
    """One server or several.

    `shown` is for messages and logs, `name` is gRPC's target. `secure`: TLS, by "https://". `several`: calls are balanced over
    all addresses of the name. `listed`: the addresses were given individually.
    """

    shown: str
    name: str
    secure: bool
    several: bool
    listed: bool


def parse_target(target: str | Sequence[str], balance: bool | None = None) -> Target:
    """Parses a target.

    One server is "host:port", optionally with "https://" or "http://", or a name that gRPC resolves. Several servers are a list
    of addresses, addresses separated by commas, "ipv4:" with several addresses, or "dns:///name:port" for all addresses of a
    name. `balance` overrides whether there are several. Raises ValueError for a list that gRPC cannot balance.
    """
    parts = _split(target)
    schemes = {part.partition("://")[0] if part.startswith(("http://", "https://")) else "" for part in parts}
    if len(schemes) != 1:
        raise ValueError(f"target {','.join(parts)}: use the same scheme for all addresses, or none")
    (scheme,) = schemes
    hosts = [part.partition("://")[2].rstrip("/") if scheme else part for part in parts]
    listed = len(hosts) > 1 or (hosts[0].startswith(("ipv4:", "ipv6:")) and "," in hosts[0])
    several = listed or hosts[0].startswith("dns:") if balance is None else balance
    name = hosts[0] if len(hosts) == 1 else _join(hosts)
    return Target(",".join(parts), name, scheme == "https", several, listed)


def is_loopback(target: str) -> bool:
    """Whether the target is this machine: plaintext is safe, and no proxy is used (gRPC would use $http_proxy)."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = _PREFIX.sub("", target).split(",")  # "ipv4:" and "ipv6:" may have several addresses
    return all(_is_loopback_address(address) for address in addresses)


def _split(target: str | Sequence[str]) -> list[str]:
    """The individual targets."""
    if isinstance(target, str):
        return [target] if target.startswith(_UNSPLIT) else target.split(",")
    if not target:
        raise ValueError("target is an empty list: pass the address of a server")
    return list(target)


def _join(hosts: Sequence[str]) -> str:
    """One gRPC target for several addresses: all IPv4 or all IPv6, no names (gRPC resolves only one)."""
    kinds = set()
    addresses = []
    for host in hosts:
        address = host.replace("localhost", "127.0.0.1", 1) if re.match(r"localhost(:|$)", host) else host
        kinds.add(_kind(address, host))
        addresses.append(address)
    if len(kinds) != 1:
        raise ValueError(f"target {','.join(hosts)}: IPv4 and IPv6 addresses cannot be mixed")
    (kind,) = kinds
    return f"{kind}:{','.join(addresses)}"


def _kind(address: str, given: str) -> str:
    found = _ADDRESS.fullmatch(address)
    try:
        version = ipaddress.ip_address("" if found is None else found["v6"] or found["host"]).version
    except ValueError:
        raise ValueError(
            f"target has {given!r} in a list, but a list must have IP addresses such as 10.0.0.1:50051: to use names, register"
            " all servers under one name and pass dns:///name:port"
        ) from None
    return f"ipv{version}"


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
