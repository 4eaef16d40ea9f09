"""Which IP addresses may be connected to on behalf of a URL found on the web."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")


def is_allowed(address: str, allow_private: bool) -> bool:
    """Whether a resolved IP address may be connected to.

    Only public unicast addresses may; with `allow_private` also loopback and private ones. Link-local ones, where
    clouds keep their metadata services, and multicast never. IPv6 forms that stand for an IPv4 address (mapped, NAT64)
    count as that address; the deprecated tunnels (6to4, Teredo) are refused.
    """
    ip = _plain(ip_address(address.partition("%")[0]))
    if ip.is_link_local or ip.is_multicast:
        return False
    if isinstance(ip, IPv6Address) and (ip.sixtofour is not None or ip.teredo is not None):
        return False
    if allow_private and ip.is_private:
        return True
    return ip.is_global and (isinstance(ip, IPv4Address) or ip in _UNICAST)


def _plain(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for, or the address itself."""
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip
