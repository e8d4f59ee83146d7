"""A real Chromium for the page: one browser a module, a fresh profile a test.

A test fails if the page logs an error or violates its content security policy, unless it expects
that: `page.problems` has what was logged. Playwright's browser is Debian's, at its own path.

The page answers an action later: files are opened, answers arrive, conversations are stored, other
tabs are told. So tests do not read its state at once, but wait until it is what they expect, by
`expect` and `expect_value`; before they say that something has not happened, `wait_for_pending`.
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
    from playwright.sync_api import Browser, Locator, LocatorAssertions, Page, Route

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
OPTIONS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
EXAMPLES = Path(__file__).parents[3] / "qwen2vl" / "server" / "page" / "examples"
TIMEOUT = 60_000  # milliseconds, of all that is waited for: other programs may use the processors
CHAT = "**/v1/chat/completions"
MODELS = "**/v1/models"
LOCATE = "Show me where the blue cross is."

PageOpener = Callable[..., "Page"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test of this folder the time for several long waits, which say what is missing."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(10 * TIMEOUT / 1000))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a headless Chromium. A session's would keep asyncio from running in other tests."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=TIMEOUT)
    path = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, live_server: LiveServer) -> Iterator[PageOpener]:
    """Give a function: `open_page(**context)` opens the page in a fresh profile.

    The models of the live server are known then. `open_page(url)` opens that of another server.
    """
    opened: list[tuple[Any, list[str]]] = []

    def open_page(url: str | None = None, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console", lambda line: problems.append(line.text) if line.type == "error" else None
        )
        opened.append((context, problems))
        page.problems = problems  # type: ignore[attr-defined]
        page.goto(url or live_server.base_url)
        page.wait_for_selector("body.ready")
        if url is None:
            expect(page.locator("#model-name")).to_have_text("nano")
        return page

    yield open_page
    for context, _ in opened:
        context.close()
    assert [one for _, problems in opened for one in problems] == []


@pytest.fixture
def page(open_page: PageOpener) -> Page:
    """Give the page of the live server, 1280 x 800."""
    return open_page()


def expect(found: Locator) -> LocatorAssertions:
    """Return assertions about elements, which wait until they hold."""
    from playwright.sync_api import expect

    return expect(found)


def expect_value(page: Page, script: str, value: Any = True) -> None:
    """Wait until an expression of JavaScript, or what it promises, has a value of JSON."""
    from playwright.sync_api import TimeoutError

    same = f"async (value) => JSON.stringify((await ({script})) ?? null) === JSON.stringify(value)"
    try:
        page.wait_for_function(same, arg=value)
    except TimeoutError:
        assert page.evaluate(script) == value  # says what it is instead
        raise


# Ends after the requests that were sent, and the pictures that failed, before it began.
PENDING = """async () => {
    await new Promise((resolve) => {
        const image = new Image();
        image.onerror = resolve;
        image.src = "data:image/png,none";
    });
    await fetch("page/icon.svg?pending");
}"""


def wait_for_pending(page: Page) -> None:
    """Wait until what the page has begun, such as a request, would have been seen."""
    page.evaluate(PENDING)


def problems_of(page: Any) -> list[str]:
    """Return what the page has logged as errors, and forget it."""
    wait_for_pending(page)
    found = list(page.problems)
    page.problems.clear()
    return found


def attach(page: Page, *files: Path) -> None:
    """Choose files for the next question."""
    before = page.locator("#attachments li").count()
    page.set_input_files("#file", list(files))
    expect(page.locator("#attachments li")).to_have_count(before + len(files))


# Whether the questions that are shown, and the end of the last answer, are stored.
IS_STORED = """async () => {
    const id = sessionStorage.getItem("qwen2vl.conversation");
    const stored = await new Promise((resolve) => {
        indexedDB.open("qwen2vl").onsuccess = ({ target: { result } }) => {
            const transaction = result.transaction(["conversations"]);
            const request = transaction.objectStore("conversations").get(id);
            transaction.oncomplete = () => {
                result.close();
                resolve(request.result);
            };
        };
    });
    const shown = [...document.querySelectorAll("#messages .question .line .text")];
    const asked = stored?.messages.filter((one) => one.role === "user").map((one) => one.text);
    const isSame = JSON.stringify(shown.map((one) => one.textContent)) === JSON.stringify(asked);
    return isSame && !["waiting", "running", undefined].includes(stored.messages.at(-1).state);
}"""


def wait_until_stored(page: Page) -> None:
    """Wait until the browser has stored the questions that are shown, and the last answer."""
    expect_value(page, f"({IS_STORED})()")


def ask(page: Page, question: str, *files: Path) -> str:
    """Ask a question and return the text of the finished answer, which is stored then."""
    text = ask_unstored(page, question, *files)
    wait_until_stored(page)
    return text


def ask_unstored(page: Page, question: str, *files: Path) -> str:
    """Ask a question and return the text of the finished answer, which may not be stored yet."""
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


# Numbers of stored conversations, and of stored pictures and videos.
COUNT = """() => new Promise((resolve) => {
    indexedDB.open("qwen2vl").onsuccess = ({ target: { result } }) => {
        const names = ["conversations", "media"];
        const transaction = result.transaction(names);
        const counts = names.map((name) => transaction.objectStore(name).count());
        transaction.oncomplete = () => {
            result.close();
            resolve(counts.map((one) => one.result));
        };
    };
})"""


def expect_stored(page: Page, conversations: int, media: int) -> None:
    """Wait until as many conversations, and as many pictures and videos, are stored."""
    expect_value(page, f"({COUNT})()", [conversations, media])


def stop_clock(page: Page) -> None:
    """Let the time of the page stand still until `page.clock.run_for`."""
    page.clock.install(time=0)
    page.clock.pause_at(1000)


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
    expect(page.locator("#model-name")).to_have_text("nano")


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
    return httpx2.post(url, json=body, timeout=TIMEOUT / 1000).json()["choices"][0]["message"]


def encode(file: Path) -> str:
    """Return the content of a file as base64."""
    return base64.b64encode(file.read_bytes()).decode()
