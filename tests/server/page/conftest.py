"""A real Chromium for the page: one browser a module, a fresh profile a test.

A test fails if the page logs an error or violates its content security policy, unless it expects
that: `page.problems` has what was logged. Playwright's browser is Debian's, at its own path.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from PIL import Image

from tests.server.conftest import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
EXAMPLES = Path(__file__).parents[3] / "qwen2vl" / "server" / "page" / "examples"
TIMEOUT = 15_000  # milliseconds
CHAT = "**/v1/chat/completions"
LOCATE = "Show me where the blue cross is."

PageOpener = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a headless Chromium. A session's would keep asyncio from running in other tests."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, live_server: LiveServer) -> Iterator[PageOpener]:
    """Give a function: `open_page(**context)` opens the page in a fresh profile."""
    opened: list[tuple[Any, list[str]]] = []

    def open_page(url: str | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda line: problems.append(line.text) if line.type == "error" else None
        )
        opened.append((context, problems))
        page.problems = problems  # type: ignore[attr-defined]
        page.goto(url or live_server.base_url)
        page.wait_for_selector("body.ready")
        return page

    yield open_page
    for context, _ in opened:
        context.close()
    assert [one for _, problems in opened for one in problems] == []


@pytest.fixture
def page(open_page: PageOpener) -> Page:
    """Give the page of the live server, 1280 x 800."""
    return open_page()


def problems_of(page: Any) -> list[str]:
    """Return what the page has logged as errors, and forget it."""
    found = list(page.problems)
    page.problems.clear()
    return found


def attach(page: Page, *files: Path) -> None:
    """Choose files for the next question."""
    before = page.locator("#attachments li").count()
    page.set_input_files("#file", list(files))
    page.locator("#attachments li").nth(before + len(files) - 1).wait_for()


def ask(page: Page, question: str, *files: Path) -> str:
    """Ask a question and return the text of the finished answer."""
    if files:
        attach(page, *files)
    count = page.locator(".answer").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    answer = page.locator(".answer").nth(count)
    answer.locator(".actions").wait_for()
    return answer.locator(".text").inner_text().strip()


def write_picture(path: Path, size: tuple[int, int], color: str = "white") -> Path:
    """Write a picture of one color."""
    Image.new("RGB", size, color).save(path)
    return path


def last_answer(page: Page) -> Any:
    """Find the last answer."""
    return page.locator(".answer").last


def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    """Return one event of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def ask_api(server: LiveServer, question: str, *files: Path) -> dict[str, Any]:
    """Return the server's answer to the request that the page should send."""
    images = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode(file)}"}}
        for file in files
    ]
    content = [*images, {"type": "text", "text": question}]
    body = {"messages": [{"role": "user", "content": content}], "return_grounding": True}
    url = f"{server.base_url}/v1/chat/completions"
    return httpx2.post(url, json=body, timeout=30).json()["choices"][0]["message"]


def encode(file: Path) -> str:
    """Return the content of a file as base64."""
    return base64.b64encode(file.read_bytes()).decode()
