"""Which hosts and addresses remote media may come from: allow-list, URL check, address check.

An entry of --allowed-media-domains is HOST[:PORT][=NETWORK], compared in its IDNA form:

    images.example.com               this host, on ports 80 and 443
    images.example.com:8443          this host, on this port only
    .example.com                     example.com and all its subdomains (as Django's ALLOWED_HOSTS)
    203.0.113.7:8080                 this very address, also where it is private or loopback
    minio.internal:9000=10.0.0.0/8   a host whose addresses may be private, in this network only

URLs are parsed once, by httpx2: the same object is checked and requested (CVE-2026-24779). All
addresses of a host must be public, IPv4 ones inside IPv6 included. (vLLM: allowed_media_domains.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import httpx2

from qwen2vl.errors import ConfigError, abbreviate
from qwen2vl.server.errors import APIError

__all__ = ["AllowedHosts", "IPAddress", "is_public", "parse_media_url", "port_of", "unmap"]

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_URL = 8192  # characters; presigned URLs have up to about 2,000
_DEFAULT_PORTS = {"http": 80, "https": 443}
_USER_INFO = re.compile("[^/?#]*//[^/?#]*@")  # an empty one, too, which the parser drops
# The last three are read as dots by some parsers of host names.
_AMBIGUOUS = re.compile(r"[\\\s\u3002\uff0e\uff61]")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
# A last label that is a number makes resolvers read the whole as an IPv4 address: 127.1, 0x7f000001
_NUMERIC_LABEL = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not routable to a public server either, but is_global of some Python versions says otherwise.
_RESERVED = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20"))
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of --allowed-media-domains, parsed."""

    host: str  # IDNA form, lower case; without the leading dot
    with_subdomains: bool
    port: int | None  # None: 80 and 443
    network: IPNetwork | None  # of addresses that are allowed besides public ones

    def matches(self, host: str, port: int) -> bool:
        is_host = host == self.host or (self.with_subdomains and host.endswith(f".{self.host}"))
        ports = (80, 443) if self.port is None else (self.port,)
        return is_host and port in ports


class AllowedHosts:
    """The hosts from which remote media may be fetched.

    Args:
        entries: HOST[:PORT][=NETWORK] each, see the module.

    Raises:
        ConfigError: an entry is no host name or address, or its port or network is invalid.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = tuple(_parse_entry(entry) for entry in entries)

    def check_host(self, url: httpx2.URL, name: str) -> tuple[IPNetwork, ...]:
        """Return the networks of non-public addresses that the URL's host may have.

        Raises:
            APIError: 400 media_not_allowed: no entry allows this host and port.
        """
        host, port = url.raw_host.decode("ascii"), port_of(url)
        found = [entry for entry in self._entries if entry.matches(host, port)]
        if not found:
            raise APIError(
                400,
                f"{name}: the host and port of the URL are not in --allowed-media-domains; send "
                "the bytes as a data URL, or ask the operator to allow the host",
                param=name,
                code="media_not_allowed",
            )
        return tuple(entry.network for entry in found if entry.network is not None)


def port_of(url: httpx2.URL) -> int:
    """Return the port of an http or https URL."""
    return url.port if url.port is not None else _DEFAULT_PORTS[url.scheme]


def parse_media_url(text: str, name: str) -> httpx2.URL:
    """Parse an http(s) URL; refuse every form that another parser may read differently.

    Raises:
        APIError: 400 invalid_url: a user name, a backslash, white space or a control character, a
            host that is neither a name nor an address in the usual form, or more than 8,192
            characters.
    """
    if len(text) > _MAX_URL:
        raise _invalid_url(name, f"has {len(text):,} characters, the limit is {_MAX_URL:,}")
    if _AMBIGUOUS.search(text) or not text.isprintable():
        raise _invalid_url(name, "holds a backslash, white space or a control character")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, TypeError) as error:
        raise _invalid_url(name, "cannot be parsed") from error
    if url.scheme not in _DEFAULT_PORTS:
        raise _invalid_url(name, "has a scheme other than http and https")
    if url.userinfo or _USER_INFO.match(text):
        raise _invalid_url(name, "holds a user name or password before the host")
    if not _is_host(url.raw_host.decode("ascii")) or not 0 < port_of(url) < 65536:
        raise _invalid_url(name, "has no host in the form of a DNS name or an IP address, or port")
    return url


def is_public(address: IPAddress) -> bool:
    """Return whether an address belongs to the public internet, embedded IPv4 included."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address not in _GLOBAL_UNICAST:
            return False
        if address.sixtofour is not None and not is_public(address.sixtofour):
            return False
    if any(address in network for network in _RESERVED):
        return False
    return address.is_global and not address.is_multicast


def unmap(address: IPAddress) -> IPAddress:
    """Return the IPv4 address inside a mapped one (::ffff:a.b.c.d); others are unchanged."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _invalid_url(name: str, what: str) -> APIError:
    return APIError(
        400, f"{name}: the URL {what}; give a plain URL", param=name, code="invalid_url"
    )


def _is_host(host: str) -> bool:
    if _parse_address(host) is not None:
        return True
    last_label = host.rpartition(".")[2]
    return bool(_HOST_NAME.fullmatch(host)) and not _NUMERIC_LABEL.match(last_label)


def _parse_address(host: str) -> IPAddress | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    has_scope = isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None
    return None if has_scope else address


def _parse_entry(entry: str) -> _Entry:
    where = f"--allowed-media-domains {abbreviate(entry)}"
    authority, equals, network = entry.partition("=")
    with_subdomains = authority.startswith(".")
    authority = authority[1:] if with_subdomains else authority
    if "*" in authority:
        raise ConfigError(f"{where}: there are no wildcards; write .example.com for all subdomains")
    if re.search(r"[/?#@\s]", authority):
        raise ConfigError(f"{where} must be HOST, HOST:PORT or HOST:PORT=NETWORK, not a URL")
    try:
        url = parse_media_url(f"https://{authority}/", "entry")
        # The parser drops a port that is the scheme's default: read it by the other scheme.
        port = url.port or parse_media_url(f"http://{authority}/", "entry").port
    except APIError as error:
        raise ConfigError(f"{where} is not a host name or address with an optional port") from error
    host = url.raw_host.decode("ascii")
    address = _parse_address(host)
    if with_subdomains and address is not None:
        raise ConfigError(f"{where}: an address has no subdomains; remove the dot")
    if equals:
        return _Entry(host, with_subdomains, port, _parse_network(network, where))
    own = None if address is None else ipaddress.ip_network(unmap(address))
    return _Entry(host, with_subdomains, port, own)


def _parse_network(text: str, where: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ConfigError(
            f"{where}: {abbreviate(text)} is not a network; write an address or 10.0.0.0/8"
        ) from error
