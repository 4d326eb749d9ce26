"""Which addresses of the internet may be connected to for a caller: those that reach nothing which is not everybody's."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

# Beside what Python counts as not global (IANA's special-purpose registries): anycast relays and sinks, which lead to who knows
# where, and the one address of a cloud's metadata that looks public.
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
    """Whether an IPv4 or IPv6 address, in the spelling that a socket has it in, is a public unicast one.

    An IPv4 address inside of an IPv6 one (mapped, or behind NAT64) is judged as what it is. Text that is no address is not
    public, nor is one with a zone.
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
