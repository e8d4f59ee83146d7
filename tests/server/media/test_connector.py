"""The media of a request: counts, sizes, sources that are allowed, and their bytes."""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.processor.content import MediaPart
from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.config import ServerConfig
from qwen2vl.server.errors import APIError
from qwen2vl.server.media import MediaConnector
from tests.server.media.evil_server import EvilServer

DATA = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def evil() -> Iterator[EvilServer]:
    with EvilServer({"/a.png": b"picture", "/b.png": b"other", "/big": bytes(3000)}) as server:
        yield server


def image(source: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source}}


def video(source: Any) -> dict[str, Any]:
    return {"type": "video", "video": source}


def resolve(items: Sequence[Any], **options: Any) -> list[Any]:
    """Return the sources of all media of one message after the connector has read them."""

    async def run() -> list[Any]:
        connector = MediaConnector(ServerConfig(**options))
        try:
            messages = await connector.resolve(parse_messages([{"role": "user", "content": items}]))
        finally:
            await connector.close()
        return [p.source for m in messages for p in m.parts if isinstance(p, MediaPart)]

    return asyncio.run(run())


def refusal(items: Sequence[Any], **options: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        resolve(items, **options)
    error = caught.value
    assert error.param is not None and error.message.startswith(f"{error.param}: ")
    return error


def test_data_urls_and_text_stay_as_they_are() -> None:
    text = {"type": "text", "text": "![x](http://127.0.0.1:9/x.png) file:///etc/passwd"}
    assert resolve([text, image(DATA), video([DATA, DATA])]) == [DATA, [DATA, DATA]]
    assert resolve([text]) == []


def test_remote_media_are_off_by_default(evil: EvilServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: lookups.append(args))
    before = evil.connections
    for url in (evil.url("/a.png"), evil.url("/a.png", "localhost"), "HTTPS://example.com/a.png"):
        error = refusal([image(DATA), image(url)])
        assert (error.status, error.code) == (400, "media_not_allowed")
        assert error.param == "messages[0].content[1]"
        assert "--allowed-media-domains" in error.message
    assert evil.connections == before and not lookups


def test_httpx_is_not_imported_without_remote_media() -> None:
    code = (
        "import sys; from qwen2vl.server.config import ServerConfig;"
        "from qwen2vl.server.media import MediaConnector; MediaConnector(ServerConfig());"
        "sys.exit('httpx2' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_allowed_media_are_fetched(evil: EvilServer) -> None:
    items = [
        image(evil.url("/a.png")),
        image(DATA),
        video([evil.url("/b.png"), DATA, evil.url("/a.png")]),
        image(evil.url("/a.png")),
    ]
    before = len(evil.hits)
    sources = resolve(items, allowed_media_domains=(f"127.0.0.1:{evil.port}",))
    assert sources == [b"picture", DATA, [b"other", DATA, b"picture"], b"picture"]
    # The same URL is fetched once.
    assert sorted(hit.target for hit in evil.hits[before:]) == ["/a.png", "/b.png"]


def test_failed_fetch_names_its_item(evil: EvilServer) -> None:
    allowed = (f"127.0.0.1:{evil.port}",)
    error = refusal([image(DATA), image(evil.url("/404"))], allowed_media_domains=allowed)
    assert (error.status, error.param) == (422, "messages[0].content[1]")
    error = refusal([video([DATA, evil.url("/500")])], allowed_media_domains=allowed)
    assert (error.status, error.param) == (502, "messages[0].content[0].frames[1]")


def test_first_failure_cancels_the_other_fetches(evil: EvilServer) -> None:
    items = [image(evil.url("/hang")), image(evil.url("/404"))]
    error = refusal(items, allowed_media_domains=(f"127.0.0.1:{evil.port}",))
    assert error.status == 422


def test_slow_fetch_ends_at_the_timeout(evil: EvilServer) -> None:
    error = refusal(
        [image(evil.url("/drip"))],
        allowed_media_domains=(f"127.0.0.1:{evil.port}",),
        media_fetch_timeout=0.2,
    )
    assert error.status == 408


def test_cancelled_request_closes_its_connections(evil: EvilServer) -> None:
    async def run() -> None:
        connector = MediaConnector(ServerConfig(allowed_media_domains=(f"127.0.0.1:{evil.port}",)))
        items = [image(evil.url("/hang")), image(evil.url("/drip"))]
        messages = parse_messages([{"role": "user", "content": items}])
        before = evil.connections
        task = asyncio.create_task(connector.resolve(messages))
        while evil.connections < before + 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while evil.open_connections:
            await asyncio.sleep(0.01)
        await connector.close()

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254"])
def test_private_addresses_are_not_contacted(evil: EvilServer, host: str) -> None:
    before = evil.connections
    allowed = ("example.com", f"localhost:{evil.port}")
    error = refusal([image(evil.url("/a.png", host))], allowed_media_domains=allowed)
    assert (error.status, error.code) == (400, "media_not_allowed")
    assert evil.connections == before


@pytest.mark.parametrize(
    "source",
    ["a.png", "/etc/passwd", "~/a.png", "iVBORw0KGgo=", "gopher://example.com/", "ftp://x/a.png"]
    + ["blob:https://example.com/1", "javascript:alert(1)", "file:/etc/passwd", "file:etc", ""]
    + [" http://example.com/", "//example.com/a.png", "s3://bucket/a.png", "C:\\a.png", "\0"],
)
def test_other_sources_are_refused(source: str) -> None:
    for item, path in (
        (image(source), "messages[0].content[0]"),
        ({"type": "image", "image": source}, "messages[0].content[0]"),
        (video([source]), "messages[0].content[0].frames[0]"),
    ):
        error = refusal([item], allowed_media_domains=("example.com",))
        assert (error.status, error.param, error.code) == (400, path, "invalid_url")
        assert "etc" not in error.message


@pytest.mark.parametrize("source", [1, 1.5, True, [], [[DATA]], [1], [None], ["a", {}]])
def test_sources_of_other_types_are_refused(source: Any) -> None:
    if source == []:
        assert resolve([video(source)]) == [[]]  # the processor names it
        return
    for make in (image, video):
        error = refusal([make(source)])
        assert error.status == 400


def test_base64_key_is_a_data_url() -> None:
    item = {"type": "image", "base64": "AAAA"}
    assert resolve([item]) == ["data:;base64,AAAA"]


def test_files_are_off_by_default_and_read_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"picture")
    url = f"file://{tmp_path}/a%20b.png"
    error = refusal([image(url)])
    assert error.code == "media_not_allowed" and "--allowed-local-media-path" in error.message
    assert resolve([image(url)], allowed_local_media_path=tmp_path) == [b"picture"]
    error = refusal([image("file:///etc/passwd")], allowed_local_media_path=tmp_path)
    assert error.code == "media_not_allowed" and str(tmp_path) not in error.message


FORMS = "give data:image/png;base64,..."


@pytest.mark.parametrize(
    ("url", "closed", "with_files"),
    [
        ("/data/x 1.png", f"is not a URL; {FORMS}", "write 'file:///data/x%201.png'"),
        ("x.png", f"is not a URL; {FORMS}", f"{FORMS} or file:///PATH in the allowed folder"),
        ("", f"the URL is empty; {FORMS}", f"the URL is empty; {FORMS} or file:///PATH"),
        ("ftp://h/x", f"'ftp' URLs are not read; {FORMS}", f"{FORMS} or file:///PATH"),
        ("file:/x.png", "fewer than three slashes", "fewer than three slashes"),
        ("/9j/4AAQ" + "A" * 99, "base64 without a head; write", "base64 without a head; write"),
        ("iVBORw0K\n" * 9, "base64 without a head; write", "base64 without a head; write"),
        ("/" + "x" * 70 + ".png", f"is not a URL; {FORMS}", "write 'file:///xxx"),
        ("/\udc80", f"is not a URL; {FORMS}", "write 'file:///"),
    ],
)
def test_what_is_no_url_has_a_remedy(
    tmp_path: Path, url: str, closed: str, with_files: str
) -> None:
    for text, options in ((closed, {}), (with_files, {"allowed_local_media_path": tmp_path})):
        for items in ([image(url)], [video([url])]):
            error = refusal(items, **options)
            assert (error.status, error.code) == (400, "invalid_url")
            assert text in error.message


def test_remote_urls_are_named_where_they_are_allowed() -> None:
    error = refusal([image("x.png")], allowed_media_domains=("example.com",))
    assert error.message.endswith(f"{FORMS} or an http(s) URL of an allowed host")


def test_counts_of_images_and_videos() -> None:
    limits = {"image": 2, "video": 0}
    assert len(resolve([image(DATA)] * 2, limit_mm_per_prompt=limits)) == 2
    error = refusal([image(DATA)] * 4, limit_mm_per_prompt=limits)
    assert error.param == "messages[0].content[2]"
    assert "has 4 images, at most 2" in error.message and error.code == "too_many_media"
    error = refusal([video([DATA])], limit_mm_per_prompt=limits)
    assert "at most 0" in error.message and error.param == "messages[0].content[0]"


def test_count_spans_all_messages() -> None:
    messages = parse_messages([{"role": "user", "content": [image(DATA)]}] * 3)
    connector = MediaConnector(ServerConfig(limit_mm_per_prompt={"image": 2}))
    with pytest.raises(APIError) as caught:
        asyncio.run(connector.resolve(messages))
    assert caught.value.param == "messages[2].content[0]"


def test_number_of_frames() -> None:
    assert len(resolve([video([DATA] * 5)], max_video_frames=5)[0]) == 5
    error = refusal([video([DATA] * 6)], max_video_frames=5)
    assert "6 frames, the limit is 5" in error.message
    joined = "data:video/jpeg;base64,AAAA" + ",AAAA" * 5
    assert refusal([video(joined)], max_video_frames=5).message == error.message
    assert resolve([video(joined)], max_video_frames=6) == [joined]


def data_url(size: int) -> str:
    return "data:image/png;base64," + base64.b64encode(bytes(size)).decode()


def test_data_url_length_is_checked_before_decoding() -> None:
    for size in (1000, 1001, 1002):
        assert resolve([image(data_url(size))], max_image_bytes=size)
        assert resolve([video(data_url(size))], max_image_bytes=1, max_video_bytes=size)
        error = refusal([image(data_url(size + 5))], max_image_bytes=size)
        assert (error.status, error.code) == (413, "media_too_large")
        assert "base64" not in error.message and "AAAA" not in error.message
    error = refusal([video([data_url(9), data_url(1005)])], max_image_bytes=1000)
    assert (error.status, error.param) == (413, "messages[0].content[0].frames[1]")


@pytest.mark.parametrize(
    "head",
    [
        "",
        ";base64",
        "image/png;base64",
        "image/png;charset=utf-8;base64",
        "video/mp4;a=b;c=d;base64",
    ]
    + ["image/svg+xml;base64", "application/vnd.x-y.z;base64"],
)
def test_well_formed_data_urls(head: str) -> None:
    url = f"data:{head},AAAA"
    if "base64" in head:
        assert resolve([image(url)]) == [url]
    else:
        assert refusal([image(url)]).code == "invalid_url"


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png;base64", "data:image/png,AAAA", "data:image/png;BASE64,AAAA"]
    + ["data:image/png; base64,AAAA", "data:image/png;base64 ,AAAA", "DATA:image/png;base64,AAAA"]
    + ["data://image/png;base64,AAAA", "data:image/png;base64;x,AAAA", "data:image;base64,AAAA"]
    + ["data:" + "a" * 300 + "/png;base64,AAAA", "data:image/png;base64\n,AAAA"],
)
def test_malformed_data_urls(url: str) -> None:
    error = refusal([image(url)])
    assert (error.status, error.code) == (400, "invalid_url")
    assert "AAAA" not in error.message


def test_bytes_of_all_media_together(evil: EvilServer, tmp_path: Path) -> None:
    allowed: dict[str, Any] = {
        "allowed_media_domains": (f"127.0.0.1:{evil.port}",),
        "allowed_local_media_path": tmp_path,
    }
    (tmp_path / "a.png").write_bytes(bytes(3000))
    file = f"file://{tmp_path}/a.png"
    assert resolve([image(evil.url("/big"))], max_media_bytes=3000, **allowed)
    error = refusal([image(data_url(9)), image(data_url(3000))], max_media_bytes=3000)
    assert (error.status, error.param) == (413, "messages[0].content[1]")
    for source in (evil.url("/big"), file):
        error = refusal([image(data_url(9)), image(source)], max_media_bytes=3000, **allowed)
        assert (error.status, error.code) == (400, "media_too_large")
        assert error.param == "messages[0].content[1]"


def test_malformed_options_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--allowed-media-domains"):
        MediaConnector(ServerConfig(allowed_media_domains=("*",)))
    with pytest.raises(ConfigError, match=r"allowed.local.media.path"):
        MediaConnector(ServerConfig(allowed_local_media_path=tmp_path / "missing"))
