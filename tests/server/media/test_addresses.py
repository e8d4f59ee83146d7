"""Hosts and addresses of remote media: allow-list entries, URL forms, public addresses."""

from __future__ import annotations

import contextlib
import ipaddress

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import ConfigError
from qwen2vl.server.errors import APIError
from qwen2vl.server.media.addresses import AllowedHosts, is_public, parse_media_url

NAME = "messages[0].content[1]"


def allows(entry: str, url: str) -> bool:
    hosts, parsed = AllowedHosts([entry]), parse_media_url(url, NAME)
    try:
        hosts.check_host(parsed, NAME)
    except APIError:
        return False
    return True


def test_refused_host_names_the_option_and_the_item() -> None:
    with pytest.raises(APIError, match="not in --allowed-media-domains") as caught:
        AllowedHosts([]).check_host(parse_media_url("https://example.com/", NAME), NAME)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, NAME, "media_not_allowed")


@pytest.mark.parametrize(
    ("entry", "url", "expected"),
    [
        ("example.com", "https://example.com/a.png", True),
        ("example.com", "http://example.com/a.png", True),
        ("example.com", "https://EXAMPLE.com:443/a.png", True),
        ("Example.COM", "https://example.com/", True),
        ("example.com", "https://example.com:8443/", False),
        ("example.com", "https://www.example.com/", False),
        ("example.com", "https://notexample.com/", False),
        ("example.com", "https://example.com.evil.test/", False),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com:8443", "https://example.com/", False),
        ("example.com:80", "http://example.com/", True),
        ("example.com:80", "https://example.com/", False),
        ("example.com:443", "https://example.com/", True),
        ("example.com:443", "http://example.com/", False),
        (".example.com", "https://example.com/", True),
        (".example.com", "https://a.b.example.com/", True),
        (".example.com", "https://notexample.com/", False),
        ("bücher.example", "https://xn--bcher-kva.example/", True),
        ("xn--bcher-kva.example", "https://BÜCHER.example/", True),
        ("127.0.0.1:8080", "http://127.0.0.1:8080/", True),
        ("127.0.0.1:8080", "http://127.0.0.1/", False),
        ("127.0.0.1:8080", "http://localhost:8080/", False),
        ("[::1]:8080", "http://[::1]:8080/", True),
        ("my_minio:9000=10.0.0.0/8", "http://my_minio:9000/", True),
    ],
)
def test_entry_allows_exact_hosts_and_ports(entry: str, url: str, expected: bool) -> None:
    assert allows(entry, url) is expected


def test_network_belongs_to_its_entry() -> None:
    hosts = AllowedHosts(["minio.internal:9000=10.0.0.0/8", "10.1.2.3", "example.com"])

    def networks(url: str) -> list[str]:
        return [str(n) for n in hosts.check_host(httpx2.URL(url), NAME)]

    assert networks("http://minio.internal:9000/") == ["10.0.0.0/8"]
    assert networks("http://10.1.2.3/") == ["10.1.2.3/32"]
    assert networks("http://example.com/") == []


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.example.com",
        "https://example.com",
        "example.com/path",
        "user@example.com",
        "exa mple.com",
        "example.com:0",
        "example.com:99999",
        "example.com:port",
        "example.com=",
        "example.com=10.0.0.1/8",
        "example.com=everything",
        ".127.0.0.1",
        "2130706433",
        "0x7f.1",
        "127.1",
        "exa\\mple.com",
    ],
)
def test_malformed_entry_is_refused_at_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-media-domains"):
        AllowedHosts([entry])


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1\\@example.com/",
        "http://example.com\\.evil.test/",
        "http://user@example.com/",
        "http://user:password@example.com/",
        "http://@example.com/",
        "http://example.com%2f@evil.test/",
        "http://example.com%00.evil.test/",
        "http://exam%70le.com/",
        "http://example.com\t/",
        "http://example.com/\r\nX-Header: 1",
        "http://example.com/\x00",
        "http://exam ple.com/",
        "http://example.com/a b",
        "http://\uff45xample.com/",  # full width
        "http://example.com\u2028/",
        "http://exam\u200bple.com/",
        "http://example\u3002com/",
        "http://127\uff0e0.0.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http:///path",
        "http://",
        "http:example.com",
        "http://example.com:99999/",
        "http://example.com:-1/",
        "http://example.com:0/",
        "http://example..com/",
        "http://example.com./",
        "http://-example.com/",
        "ftp://example.com/",
        "http://" + "a" * 64 + ".com/",
        "http://example.com/" + "a" * 10_000,
    ],
)
def test_url_that_parsers_read_differently_is_refused(url: str) -> None:
    with pytest.raises(APIError) as caught:
        parse_media_url(url, NAME)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, NAME, "invalid_url")
    assert "example" not in error.message and "127" not in error.message


def test_url_keeps_path_and_query_and_drops_the_fragment() -> None:
    url = parse_media_url("https://Example.com/a%20b/ü.png?X-Sig=a%2Fb&c=[1]#part", NAME)
    assert url.raw_path == b"/a%20b/%C3%BC.png?X-Sig=a%2Fb&c=[1]"


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://example.com{text}"):
        with contextlib.suppress(APIError):
            parsed = parse_media_url(url, NAME)
            assert parsed.raw_host
            assert not parsed.userinfo


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "2606:4700::1111", "::ffff:8.8.8.8"]
    + ["64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_address(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"]
    + ["169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.2.1", "198.18.0.1"]
    + ["192.88.99.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"]
    + ["::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "ff0e::1"]
    + ["2001:db8::1", "3fff::1", "2001::1", "2001:20::1", "100::1", "5f00::1", "::127.0.0.1"]
    + ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1"]
    + ["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1"],
)
def test_address_that_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
