"""Which destinations an allow-list names, and which addresses a name may lead to."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import psutil

from upspiral.errors import ConfigError
from upspiral.sandbox.base import Allow

Address = IPv4Address | IPv6Address
USUAL_PORTS = (80, 443)
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
_NAT64 = IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = IPv6Network("::/96")
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "168.63.129.16/32", "64:ff9b:1::/48")))
"""What Python, or an older one, takes for addresses of the internet: of protocols, and of clouds' own services."""


def clean_host(text: str) -> str:
    """A name or an address in the one spelling that is compared. Raises ValueError for anything else.

    Spellings of addresses that only old resolvers know, such as `127.1` or `0x7f000001`, are none.
    """
    host = text.lower().removesuffix(".")
    if "%" in host:  # an address's zone may be any text, also one that ends as a name of the list does
        raise ValueError(f"{text!r} has a zone")
    if host.startswith("[") and host.endswith("]"):
        return str(IPv6Address(host[1:-1]))
    if not host.isascii():
        host = host.encode("idna").decode()
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return str(IPv4Address(host))
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is no host name")
    return host


def split_port(text: str) -> tuple[str, int | None]:
    """`host`, `host:port`, `[address]` or `[address]:port`. Raises ValueError for a port that is none."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        return text, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is no port")
    return host, int(port)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of an allow-list."""

    host: str
    below: bool
    """And every name below it."""
    ports: Sequence[int]

    def names(self, host: str, port: int) -> bool:
        return port in self.ports and (host == self.host or (self.below and host.endswith(f".{self.host}")))


def parse_rule(text: str) -> Rule:
    """Raises ConfigError that says what an entry may look like."""
    try:
        host, port = split_port(text)
        return Rule(clean_host(host.removeprefix(".")), host.startswith("."), USUAL_PORTS if port is None else (port,))
    except ValueError as error:
        raise ConfigError(
            f"allowed host {text!r}: {error}; give a name such as pypi.org, .example.org for a domain and all below "
            "it, an address, or one of them with a port as in pypi.org:443"
        ) from None


class Policy:
    """Decides by name and port first, and by address once a name was resolved."""

    def __init__(self, allow: Allow) -> None:
        self._rules = [parse_rule(each) for each in allow.hosts]
        try:
            self._networks = [ip_network(each) for each in allow.networks]
        except ValueError as error:
            raise ConfigError(f"allowed network: {error}; give one such as 10.0.0.0/8") from None

    def names(self, host: str, port: int) -> bool:
        """Whether the list has this destination. `host` as `clean_host` gives it."""
        return any(rule.names(host, port) for rule in self._rules)

    def permits(self, address: Address, host: str) -> bool:
        """Whether a connection for `host` may go to this address: it is public, in a network that was allowed, or is
        itself what the list names."""
        if str(address) == host or any(address in network for network in self._networks):
            return True
        meant = (_embedded(address) if isinstance(address, IPv6Address) else None) or address
        return is_public(meant) and meant not in own_addresses()


def is_public(address: Address) -> bool:
    """Whether it is an address of the internet and not of this machine, its networks or its cloud's metadata service.

    An IPv6 address that stands for an IPv4 address is what that is.
    """
    if isinstance(address, IPv6Address):
        if (inner := _embedded(address)) is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def own_addresses() -> Collection[Address]:
    """Of this machine. They may be public, and what listens there need not be meant for the internet."""
    found = (each for addresses in psutil.net_if_addrs().values() for each in addresses)
    return {parse_address(each.address) for each in found if each.family in (socket.AF_INET, socket.AF_INET6)}


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64 or address in _IPV4_COMPATIBLE:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def parse_address(text: str) -> Address:
    """As a resolver gives it, without the zone of a link-local one."""
    return ip_address(text.partition("%")[0])
