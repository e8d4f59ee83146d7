"""Media of one request: counted, measured, and read into bytes where a URL names them.

    data:                  stays as it is; its length is checked before anything is decoded
    http://, https://      fetched, if --allowed-media-domains allows the host
    file://                read, if it lies under --allowed-local-media-path
    anything else          refused, plain paths too

What can be refused without reading is refused before the first fetch starts. Errors name the item.
Everything is canceled with the task that runs `MediaConnector.resolve`. (vLLM: MediaConnector.)
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from qwen2vl.errors import abbreviate
from qwen2vl.processor.content import MediaPart
from qwen2vl.processor.messages import Message
from qwen2vl.server.errors import APIError
from qwen2vl.server.media.local_files import LocalFiles

if TYPE_CHECKING:
    from qwen2vl.server.config import ServerConfig
    from qwen2vl.server.media.fetch import MediaFetcher

__all__ = ["MediaConnector"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAX_DATA_HEAD = 256  # characters before the comma of a data URL
_DATA_HEAD = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^,;\s]*)*;base64", re.ASCII)
_MIN_BASE64 = 64  # characters: shorter text of the alphabet may be a path
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+", re.ASCII)
_Kind = Literal["data", "http", "file"]


@dataclass(frozen=True, slots=True)
class _Source:
    """One URL of a media part: the whole part, or one frame of a list."""

    url: str
    kind: _Kind
    name: str  # "messages[0].content[1]", of a frame with ".frames[3]" after it
    max_bytes: int


class MediaConnector:
    """Reads the media that requests name, within the limits of the server.

    Args:
        config: which hosts and which folder are allowed, and the limits of one request.

    Raises:
        ConfigError: an allowed host is malformed, or the allowed folder is none.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._files: LocalFiles | None = None
        self._fetcher: MediaFetcher | None = None
        if config.allowed_local_media_path is not None:
            self._files = LocalFiles(config.allowed_local_media_path)
        if config.allowed_media_domains:
            # Imports httpx2, which a server without remote media does not need to start.
            from qwen2vl.server.media.addresses import AllowedHosts
            from qwen2vl.server.media.fetch import MediaFetcher

            self._fetcher = MediaFetcher(AllowedHosts(config.allowed_media_domains))

    async def resolve(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with the bytes of http(s) and file URLs in place of the URLs.

        A URL that occurs several times is read once.

        Raises:
            APIError: with `param`, the path of the item: too many items, a source that is not
                allowed, not found or too large, or a remote server that fails.
        """
        parts = [p for m in messages for p in m.parts if isinstance(p, MediaPart)]
        if not parts:
            return list(messages)
        self._check_counts(parts)
        sources = [source for part in parts for source in self._list_sources(part)]
        contents = await self._read_all(sources)
        return [_replace_sources(message, contents) for message in messages]

    async def close(self) -> None:
        """Release the threads of the resolver; no `resolve` may be running."""
        if self._fetcher is not None:
            self._fetcher.close()

    def _check_counts(self, parts: Sequence[MediaPart]) -> None:
        for kind, limit in self._config.limit_mm_per_prompt.items():
            found = [part for part in parts if part.kind == kind]
            if len(found) > limit:
                raise APIError(
                    400,
                    f"{found[limit].path}: the request has {len(found)} {kind}s, at most {limit} "
                    "may be given (--limit-mm-per-prompt); send fewer",
                    param=found[limit].path,
                    code="too_many_media",
                )

    def _list_sources(self, part: MediaPart) -> Iterator[_Source]:
        config = self._config
        max_bytes = config.max_image_bytes if part.kind == "image" else config.max_video_bytes
        if not isinstance(part.source, list | tuple):
            yield self._check_source(part.source, part.path, max_bytes)
            return
        if part.kind == "image":
            text = "a list is not an image; give a list of frames as video"
            raise _refusal(part.path, text, "invalid_value")
        self._check_num_frames(len(part.source), part.path)
        for i, frame in enumerate(part.source):
            yield self._check_source(frame, f"{part.path}.frames[{i}]", config.max_image_bytes)

    def _check_num_frames(self, count: int, name: str) -> None:
        limit = self._config.max_video_frames
        if count > limit:
            text = f"the list has {count:,} frames, the limit is {limit:,}; send fewer"
            raise _refusal(name, text, "too_many_media")

    def _check_source(self, url: Any, name: str, max_bytes: int) -> _Source:
        """Refuse what can be refused by looking at the source alone."""
        if not isinstance(url, str):
            text = f"the source must be a URL in a string, got {type(url).__name__}"
            raise _refusal(name, text, "invalid_value")
        match = _SCHEME.match(url)
        scheme = match[1].lower() if match else ""
        if scheme == "data":
            return self._check_data_url(_Source(url, "data", name, max_bytes))
        if scheme in ("http", "https"):
            if self._fetcher is None:
                text = (
                    "http(s) URLs are not fetched unless --allowed-media-domains HOST allows their "
                    "host; or give the bytes as a data URL"
                )
                raise _refusal(name, text, "media_not_allowed")
            return _Source(url, "http", name, max_bytes)
        if url[:7].lower() == "file://":
            if self._files is None:
                text = (
                    "local files are not read unless --allowed-local-media-path DIR allows their "
                    "folder; or give the bytes as a data URL"
                )
                raise _refusal(name, text, "media_not_allowed")
            return _Source(url, "file", name, max_bytes)
        raise _refusal(name, self._describe_other(url, scheme), "invalid_url")

    def _describe_other(self, url: str, scheme: str) -> str:
        """Return what is wrong with a source that is no URL, or one of another scheme."""
        if len(url) > _MIN_BASE64 and _BASE64.fullmatch(url[:_MAX_DATA_HEAD]):
            return "the source is base64 without a head; write data:image/png;base64,... before it"
        if not url:
            what = "the URL is empty"
        elif scheme == "file":
            what = "the file URL has fewer than three slashes"
        elif scheme:
            what = f"{abbreviate(scheme)} URLs are not read"
        elif url.startswith("/") and self._files is not None:
            file_url = f"file://{quote(url[:_MAX_DATA_HEAD], errors='replace')}"
            return f"the source is a path, not a URL; write {abbreviate(file_url, 300)}"
        else:
            what = "the source is not a URL"
        forms = ["data:image/png;base64,..."]
        if self._fetcher is not None:
            forms.append("an http(s) URL of an allowed host")
        if self._files is not None:
            forms.append("file:///PATH in the allowed folder")
        return f"{what}; give {' or '.join(forms)}"

    def _check_data_url(self, source: _Source) -> _Source:
        # Stricter than the processor: what some decoders read and others do not is refused. (vLLM)
        comma = source.url.find(",", 0, _MAX_DATA_HEAD)
        if comma < 0 or not _DATA_HEAD.fullmatch(source.url[:comma]):
            text = "the data URL is malformed; write data:image/png;base64,..."
            raise _refusal(source.name, text, "invalid_url")
        if source.url.startswith("video/jpeg", len("data:")):  # frames with commas between (vLLM)
            self._check_num_frames(source.url.count(","), source.name)
        if _decoded_size(source.url) > source.max_bytes:
            raise APIError(
                413,
                f"{source.name}: the data URL has {len(source.url):,} characters, the limit is "
                f"{source.max_bytes:,} bytes after decoding; send a smaller file",
                param=source.name,
                code="media_too_large",
            )
        return source

    async def _read_all(self, sources: Sequence[_Source]) -> dict[str, bytes]:
        """Return URL -> bytes of all sources that are not data URLs."""
        budget = _Budget(self._config.max_media_bytes)
        for source in sources:
            if source.kind == "data":
                budget.take(_decoded_size(source.url), source.name, 413)
        # The same URL may be given as image and as video: the smaller limit holds for it.
        wanted: dict[str, _Source] = {}
        for source in sorted(sources, key=lambda source: source.max_bytes):
            if source.kind != "data":
                wanted.setdefault(source.url, source)
        if not wanted:
            return {}
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    url: group.create_task(self._read(source, budget))
                    for url, source in wanted.items()
                }
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the others were canceled because of it
        return {url: task.result() for url, task in tasks.items()}

    async def _read(self, source: _Source, budget: _Budget) -> bytes:
        if source.kind == "http":
            assert self._fetcher is not None, "checked in _check_source"
            return await self._fetcher.fetch(
                source.url,
                source.name,
                max_bytes=source.max_bytes,
                on_bytes=lambda count: budget.take(count, source.name, 400),
                timeout=self._config.media_fetch_timeout,
            )
        assert self._files is not None, "checked in _check_source"
        max_bytes = min(source.max_bytes, budget.left)
        content = await asyncio.to_thread(self._files.read, source.url, source.name, max_bytes)
        budget.take(len(content), source.name, 400)
        return content


class _Budget:
    """Bytes that the media of one request may still have, together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def take(self, count: int, name: str, status: int) -> None:
        self.left -= count
        if self.left < 0:
            raise APIError(
                status,
                f"{name}: the media of the request have more than {self.limit:,} bytes together, "
                "which is the limit; send fewer or smaller ones",
                param=name,
                code="media_too_large",
            )


def _decoded_size(url: str) -> int:
    """Return the size of a base64 data URL's content, by its length; up to 2 bytes too small."""
    return max(0, (len(url) - url.find(",", 0, _MAX_DATA_HEAD) - 1) * 3 // 4 - 2)


def _refusal(name: str, text: str, code: str) -> APIError:
    return APIError(400, f"{name}: {text}", param=name, code=code)


def _replace_sources(message: Message, contents: dict[str, bytes]) -> Message:
    parts = tuple(
        replace(part, source=_replace_source(part.source, contents))
        if isinstance(part, MediaPart)
        else part
        for part in message.parts
    )
    return replace(message, parts=parts)


def _replace_source(source: Any, contents: dict[str, bytes]) -> Any:
    if isinstance(source, list | tuple):
        return [contents.get(frame, frame) for frame in source]
    return contents.get(source, source)
