"""Answers, file names and titles are not trusted: nothing of them runs, loads or is sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    PENDING,
    PageOpener,
    ask,
    expect,
    expect_value,
    problems_of,
    wait_for_pending,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

SCRIPT = "globalThis.hacked = true"
HOSTILE = [
    f"<script>{SCRIPT}</script>",
    f"<img src=x onerror='{SCRIPT}'>",
    f"<svg onload='{SCRIPT}'><script>{SCRIPT}</script></svg>",
    f"<iframe srcdoc='<script>parent.{SCRIPT}</script>'></iframe>",
    f"<a href='javascript:{SCRIPT}'>a</a>",
    f"[a](javascript:{SCRIPT})",
    f"[a](JaVaScRiPt:{SCRIPT})",
    f"[a](data:text/html,<script>{SCRIPT}</script>)",
    f"[a](vbscript:{SCRIPT})",
    f"<javascript:{SCRIPT}>",
    f"![a](javascript:{SCRIPT})",
    f'![a](x "onerror={SCRIPT}")',
    f'![x" onerror="{SCRIPT}](https://example.com/a.png)',
    "![a](https://example.com/a.png)",
    "<style>body { display: none }</style>",
    "<form action='https://example.com'><input name=key><button>Send</button></form>",
    "<meta http-equiv=refresh content='0; url=https://example.com'>",
    "<base href='https://example.com'>",
    "<link rel=stylesheet href='https://example.com/a.css'>",
    "<video src='https://example.com/a.mp4' autoplay></video>",
    "<p style='position: fixed; inset: 0' id=question class=failure>a</p>",
    f"<math><mtext><table><mglyph><style><img src=x onerror='{SCRIPT}'>",
    f"```html\n<script>{SCRIPT}</script>\n```",
    f"| <img src=x onerror='{SCRIPT}'> |\n|---|\n| <b onclick='{SCRIPT}'>a</b> |",
    "[a]: javascript:alert(1)\n\n[a]",
]
ALLOWED = {
    *("P", "BR", "HR", "H1", "H2", "H3", "H4", "H5", "H6", "BLOCKQUOTE", "UL", "OL", "LI"),
    *("STRONG", "EM", "DEL", "CODE", "PRE", "A", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
}


def answer_with(page: Page, text: str, **delta: object) -> None:
    """Let the server answer with a text."""

    def chunk(delta: object, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    body = chunk({"content": text}) + chunk(delta, "stop") + "data: [DONE]\n\n"
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))


def test_hostile_answers_are_text(open_page: PageOpener) -> None:
    page = open_page()
    outside: list[str] = []
    origin = page.url
    page.on("request", lambda r: outside.append(r.url) if is_outside(r.url, origin) else None)
    answer_with(page, "placeholder")
    ask(page, "Hi")
    shown = page.evaluate(SHOW_AND_LIST, HOSTILE)
    wait_for_pending(page)
    for text, nodes in zip(HOSTILE, shown, strict=True):
        for tag, href, *attributes in nodes:
            assert tag in ALLOWED, text
            assert set(attributes) <= {"href", "target", "rel", "align", "start"}, text
            assert href is None or href.startswith(("https://", "http://", "mailto:")), text
    assert sum(map(len, shown)) > len(HOSTILE)
    page.click("#new")
    answer_with(page, "\n\n".join(HOSTILE))
    ask(page, "Hi")
    wait_for_pending(page)
    assert page.evaluate("globalThis.hacked") is None
    page.reload()
    page.locator(".answer .actions").wait_for()
    wait_for_pending(page)
    assert page.evaluate("globalThis.hacked") is None
    assert page.evaluate("document.baseURI") == origin
    expect(page.locator("#question")).to_have_count(1)
    assert outside == []


# Shows each text in an answer for as long as its pictures need to fail, and lists the elements that
# this makes.
SHOW_AND_LIST = f"""async (texts) => {{
    const pending = {PENDING};
    const module = new URL("page/js/answers/markdown.js", document.baseURI);
    const {{ renderMarkdown }} = await import(module);
    const target = document.querySelector(".answer .text");
    const listed = [];
    for (const text of texts) {{
        target.replaceChildren(renderMarkdown(text));
        await pending();
        listed.push([...target.querySelectorAll("*")].map((node) =>
            [node.tagName, node.getAttribute("href"), ...node.getAttributeNames()]));
    }}
    return listed;
}}"""


def is_outside(url: str, origin: str) -> bool:
    return not url.startswith((origin, "data:", "blob:"))


def test_links_open_elsewhere_without_a_referrer(page: Page) -> None:
    answer_with(
        page, "[a](https://example.com/b) https://example.com/c ![d](https://example.com/e)"
    )
    ask(page, "Hi")
    links = page.locator(".answer .text a")
    expect(links).to_have_count(3)
    for index in range(3):
        expect(links.nth(index)).to_have_attribute("target", "_blank")
        expect(links.nth(index)).to_have_attribute("rel", re.compile("noreferrer"))


def test_hostile_phrases_and_coordinates(page: Page) -> None:
    label = f"<img src=x onerror='{SCRIPT}'>"
    shape = {
        "type": "box",
        "label": label,
        "normalized": [100, 100, 900, 900],
        "pixels": [{"param": "messages[0].content[0]", "coordinates": [1, 2, 3, 4]}],
    }
    answer_with(page, f"{label}(100,100),(900,900) end", grounding=[shape])
    ask(page, "Where?", EXAMPLES / "text.png")
    expect(page.locator(".phrase")).to_have_text(label)
    expect(page.locator(".rows .label")).to_have_text(label)
    expect(page.locator(".answer .text")).to_have_text(f"{label} end")
    wait_for_pending(page)
    assert page.evaluate("globalThis.hacked") is None


def test_hostile_names_and_questions(page: Page, tmp_path: Path) -> None:
    name = f"<img src=x onerror={SCRIPT.replace('/', '')}>.png"
    (tmp_path / name).write_bytes((EXAMPLES / "text.png").read_bytes())
    question = f"<img src=x onerror='{SCRIPT}'>"
    answer_with(page, "ok")
    ask(page, question, tmp_path / name)
    expect(page.locator(".question .line .text")).to_have_text(question)
    page.locator(".conversation", has_text="<img").wait_for()
    page.get_by_label(f"Enlarge {name}").click()
    expect(page.locator("#viewer-title")).to_contain_text(name)
    page.keyboard.press("Escape")
    page.get_by_label("Show the request").click()
    expect(page.locator("#code-text")).to_contain_text(name)
    wait_for_pending(page)
    assert page.evaluate("globalThis.hacked") is None


@pytest.mark.parametrize(
    "script",
    [
        "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
        "document.createElement('script').text = 'globalThis.hacked = true'",
        "document.createElement('iframe').srcdoc = '<b>x</b>'",
    ],
)
def test_strings_do_not_become_markup(page: Page, script: str) -> None:
    message = page.evaluate(f"() => {{ try {{ {script} }} catch (e) {{ return e.message }} }}")
    assert "TrustedHTML" in message or "TrustedScript" in message
    problems_of(page)


def test_nothing_else_can_be_loaded_or_reached(page: Page) -> None:
    page.evaluate(
        """async () => {
        const found = [];
        const note = (event) => found.push(event.effectiveDirective);
        document.addEventListener("securitypolicyviolation", note);
        await fetch("https://example.com").catch(() => {});
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.head.append(style);
        const image = new Image();
        image.src = "https://example.com/a.png";
        await image.decode().catch(() => {});
        const frame = document.createElement("iframe");
        frame.src = "https://example.com";
        document.body.append(frame);
        window.found = found;
        }"""
    )
    expected = ["connect-src", "frame-src", "img-src", "style-src-elem"]
    expect_value(page, "[...new Set(window.found)].sort()", expected)
    problems_of(page)
