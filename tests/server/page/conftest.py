"""A real Chromium for the page: one browser a module, a fresh profile a test.

A test fails if the page logs an error or violates its content security policy, unless it expects
that: `page.problems` has what was logged. Playwright's browser is Debian's, at its own path.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from PIL import Image

from tests.server.conftest import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
EXAMPLES = Path(__file__).parents[3] / "qwen2vl" / "server" / "page" / "examples"
TIMEOUT = 15_000  # milliseconds
CHAT = "**/v1/chat/completions"
MODELS = "**/v1/models"
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


def choose(page: Page, title: str, choice: str) -> None:
    """Choose from the menu of a conversation in the list."""
    page.get_by_label(f"Options of the conversation {title}").click()
    page.locator("#conversation-menu").get_by_text(choice).click()


def edit(page: Page, number: int = 0) -> None:
    """Begin to edit a question."""
    page.locator(".question").nth(number).hover()
    page.get_by_label("Edit the question").nth(number).click()
    page.locator("#editing").wait_for()


def set_limits(page: Page, **limits: int) -> None:
    """Let the page, which is loaded again, hear of other limits of the server."""
    models = page.request.get(f"{page.url}v1/models").json()
    models["data"][0]["limits"].update(limits)
    page.route(MODELS, lambda r: r.fulfill(json=models))
    page.reload()
    page.locator("#model-name", has_text="nano").wait_for()


def refuse(page: Page, status: int, message: str, **details: str) -> None:
    """Let the server refuse questions, with an error of OpenAI's form."""
    error = {"message": message, "type": "t", "param": None, "code": "c", **details}
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=status, json={"error": error}))


def hold(page: Page, path: str) -> list[Route]:
    """Keep requests waiting, and return their list."""
    held: list[Route] = []
    page.route(path, lambda route: held.append(route))
    return held


def first_held(page: Page, held: list[Route]) -> Route:
    """Wait until a request is held: the page may still be reading the files of its question."""
    deadline = time.monotonic() + TIMEOUT / 1000
    while not held:
        assert time.monotonic() < deadline, "no request was sent"
        page.wait_for_timeout(10)  # the browser's events arrive meanwhile
    return held[0]


def finish(route: Route) -> None:
    """Answer a question with "ok"."""
    route.fulfill(status=200, content_type="text/event-stream", body=DONE)


def send(page: Page, question: str) -> None:
    """Ask a question, and do not wait for the answer."""
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()


def requests_of(page: Page) -> list[Any]:
    """Return the list of bodies that the page sends from now on."""
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    return bodies


def last_answer(page: Page) -> Any:
    """Find the last answer."""
    return page.locator(".answer").last


def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    """Return one event of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


DONE = event({"content": "ok"}) + event({}, "stop") + "data: [DONE]\n\n"


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
