"""Serves the page at `/`, and its files under `/page/`.

The files are an explicit list, read from the package when the server starts: no path of a request
ever reaches the file system. They are the same for everyone and reveal nothing, so they need no
API key; what the page asks the API for does. The content security policy and other headers forbid
the page what it does not need: other hosts, inline code, being framed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from qwen2vl.server.routing import CountedRoute

__all__ = ["PAGE_FILES", "PAGE_HEADERS", "PAGE_PATHS", "PageFile", "load_page_files", "page_routes"]

INDEX = "index.html"
PREFIX = "/page/"
# Files besides index.html, relative to this folder.
PAGE_FILES = (
    "style.css",
    "icon.svg",
    *(
        f"js/{name}.js"
        for name in (
            *("main", "dom", "notice", "settings_dialog", "theme", "viewer"),
            *("client/answering", "client/api", "client/conversation", "client/database"),
            *("client/explain", "client/models", "client/request", "client/saving"),
            *("client/session", "client/settings", "client/store", "client/tabs"),
            *("compose/attachments", "compose/camera", "compose/composer", "compose/drafts"),
            *("compose/drop", "compose/frames", "compose/limits", "compose/media"),
            *("compose/resize",),
            *("list/conversation_menu", "list/export", "list/library", "list/sidebar"),
            *("answers/answer", "answers/boxes", "answers/markdown", "answers/messages"),
            *("answers/phrases", "answers/plain_text", "answers/question"),
            *("answers/request_code",),
        )
    ),
    *(f"vendor/{name}" for name in ("marked.esm.js", "purify.es.mjs", "eventsource-parser.js")),
    *(f"examples/{name}.png" for name in ("text", "shapes", "boxes")),
)
PAGE_PATHS = frozenset({"/", *(PREFIX + name for name in PAGE_FILES)})

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Strings become markup only by way of DOMPurify.
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=(), display-capture=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asks again by ETag, so that a new version is seen at once
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


def load_page_files() -> dict[str, PageFile]:
    """Read all files of the page; the key is the path of its URL."""
    folder = files("qwen2vl.server.page")
    names = {"/": INDEX, **{PREFIX + name: name for name in PAGE_FILES}}
    loaded: dict[str, PageFile] = {}
    for path, name in names.items():
        body = folder.joinpath(name).read_bytes()
        media_type = MEDIA_TYPES[name.rpartition(".")[2]]
        loaded[path] = PageFile(body, media_type, f'"{sha256(body).hexdigest()[:32]}"')
    return loaded


def page_routes() -> list[CountedRoute]:
    """Return the routes of the page; all its files count as one route in the metrics."""
    loaded = load_page_files()

    async def page_file(request: Request) -> Response:
        return _file_response(request, loaded)

    return [CountedRoute("/", page_file), CountedRoute(PREFIX + "{file:path}", page_file)]


def _file_response(request: Request, loaded: Mapping[str, PageFile]) -> Response:
    file = loaded.get(request.scope["path"])
    if file is None:
        raise HTTPException(404)
    headers = {**PAGE_HEADERS, "ETag": file.etag}
    known = request.headers.get("if-none-match", "")
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
