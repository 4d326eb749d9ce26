"""Where the servers are: from what a caller gives to what gRPC takes."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

_WHOLE = ("ipv4:", "ipv6:", "unix:", "unix-abstract:")
"""What a target begins with whose commas are gRPC's, or a path's."""
_PREFIX = re.compile(r"^(dns:///|dns:|ipv4:|ipv6:)")
_ADDRESS = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9.-]+))(:\w+)?")


@dataclass(frozen=True, slots=True)
class Target:
    """One server or several.

    `shown` is for people and logs, `name` is what gRPC takes. `secure` where TLS was asked for by "https://". `several` where
    calls are to be balanced over all that the name stands for, `listed` where that are addresses that were given one by one.
    """

    shown: str
    name: str
    secure: bool
    several: bool
    listed: bool


def parse_target(target: str | Sequence[str], balance: bool | None = None) -> Target:
    """The servers that are meant.

    One is "host:port" with "https://" or "http://" before it or not, or a name that gRPC resolves. Several are a list of
    addresses, those with commas between them, "ipv4:" with several, or "dns:///name:port", which stands for all the name's
    addresses. `balance` overrules what that says. ValueError for a list that gRPC cannot balance.
    """
    parts = _split(target)
    schemes = {part.partition("://")[0] if part.startswith(("http://", "https://")) else "" for part in parts}
    if len(schemes) != 1:
        raise ValueError(f"target is {','.join(parts)}: write the same scheme before each address, or before none")
    (scheme,) = schemes
    hosts = [part.partition("://")[2].rstrip("/") if scheme else part for part in parts]
    listed = len(hosts) > 1 or (hosts[0].startswith(("ipv4:", "ipv6:")) and "," in hosts[0])
    several = listed or hosts[0].startswith("dns:") if balance is None else balance
    name = hosts[0] if len(hosts) == 1 else _join(hosts)
    return Target(",".join(parts), name, scheme == "https", several, listed)


def is_loopback(target: str) -> bool:
    """Whether the target is this machine: no proxy can reach it (gRPC would ask $http_proxy all the same), and nobody listens
    in between."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = _PREFIX.sub("", target).split(",")  # "ipv4:" and "ipv6:" may have several
    return all(_is_loopback_address(address) for address in addresses)


def _split(target: str | Sequence[str]) -> list[str]:
    """What was given one by one."""
    if isinstance(target, str):
        return [target] if target.startswith(_WHOLE) else target.split(",")
    if not target:
        raise ValueError("target is an empty list: give the address of a server")
    return list(target)


def _join(hosts: Sequence[str]) -> str:
    """Addresses as gRPC takes several: of one kind, and not names, of which it resolves one at a time."""
    kinds = set()
    addresses = []
    for host in hosts:
        address = host.replace("localhost", "127.0.0.1", 1) if re.match(r"localhost(:|$)", host) else host
        kinds.add(_kind(address, host))
        addresses.append(address)
    if len(kinds) != 1:
        raise ValueError(f"target is {','.join(hosts)}: gRPC takes IPv4 or IPv6 addresses, not both at once")
    (kind,) = kinds
    return f"{kind}:{','.join(addresses)}"


def _kind(address: str, given: str) -> str:
    found = _ADDRESS.fullmatch(address)
    try:
        version = ipaddress.ip_address("" if found is None else found["v6"] or found["host"]).version
    except ValueError:
        raise ValueError(
            f"target has {given!r} in a list, which takes addresses such as 10.0.0.1:50051: for names let one of them stand for"
            " all servers, and give dns:///name:port"
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
