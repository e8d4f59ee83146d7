"""Find what pages of the built site load from other hosts: python -m dev.external_resources site.

Scripts, styles, fonts, images and frames count, in HTML and in style sheets; links that a reader
follows do not. Prints each one with its file and exits with 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["external_resources", "main"]

# Attributes of elements that a browser fetches by itself.
LOADED = {
    ("audio", "src"),
    ("embed", "src"),
    ("iframe", "src"),
    ("image", "href"),
    ("img", "src"),
    ("img", "srcset"),
    ("input", "src"),
    ("link", "href"),
    ("object", "data"),
    ("script", "src"),
    ("source", "src"),
    ("source", "srcset"),
    ("track", "src"),
    ("use", "href"),
    ("video", "poster"),
    ("video", "src"),
}
NOT_LOADED_LINKS = {"alternate", "author", "canonical", "license", "next", "prev", "search"}
HOST = re.compile(r"(?:^|[\s,])((?:https?:)?//[^\s,]+)")
CSS_HOST = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\s\"')]+)")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_style = tag == "style"
        given = {name: value or "" for name, value in attrs}
        self.found += CSS_HOST.findall(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").split()) <= NOT_LOADED_LINKS:
            return
        for name, value in given.items():
            if (tag, name.removeprefix("xlink:")) in LOADED:
                self.found += HOST.findall(value)

    def handle_data(self, data: str) -> None:
        if self.is_style:
            self.found += CSS_HOST.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self.is_style = False


def external_resources(site: Path) -> Iterator[tuple[Path, str]]:
    """Yield file and address of what pages and style sheets load from other hosts."""
    for path in sorted(site.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        yield from ((path, address) for address in page.found)
    for path in sorted(site.rglob("*.css")):
        found = CSS_HOST.findall(path.read_text(encoding="utf-8"))
        yield from ((path, address) for address in found)


def main(site: str) -> int:
    """Print what is loaded from other hosts; return 1 if there is any, or no page at all."""
    pages = list(Path(site).rglob("*.html"))
    found = list(external_resources(Path(site)))
    for path, address in found:
        print(f"{path}: loads {address}; a page must load from its own host only")
    if not pages:
        print(f"{site}: holds no page; build the site first: make docs")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
