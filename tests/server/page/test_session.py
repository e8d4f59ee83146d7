"""What runs and what is stored: stop, keys, messages that stay as they are, full storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    PageOpener,
    ask,
    attach,
    event,
    last_answer,
    problems_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page, Route

    from tests.server.conftest import ServerStarter

pytestmark = needs_chromium

MODELS = "**/v1/models"
DONE = event({"content": "ok"}) + event({}, "stop") + "data: [DONE]\n\n"


def finish(route: Route) -> None:
    route.fulfill(status=200, content_type="text/event-stream", body=DONE)


def hold(page: Page, path: str) -> list[Route]:
    """Keep requests waiting, and return their list."""
    held: list[Route] = []
    page.route(path, lambda route: held.append(route))
    return held


def send(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()


# Stop and keys ------------------------------------------------------------------------------------


def test_stop_while_the_models_load(page: Page) -> None:
    held = hold(page, MODELS)
    page.reload()
    page.wait_for_selector("body.ready")
    send(page, "Hi")
    page.click("#stop")
    page.locator(".answer .note", has_text="Stopped.").wait_for()
    assert page.locator("#send").is_visible()
    assert len(held) == 1  # the page and the question wait for the same response
    sent: list[str] = []
    page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
    held[0].continue_()
    page.locator("#model-name", has_text="nano").wait_for()
    page.wait_for_timeout(100)
    assert sent == []


def test_two_refusals_ask_for_the_key_once(
    open_page: PageOpener, start_server: ServerStarter
) -> None:
    server = start_server(api_keys=("right-key",))
    page = open_page(server.base_url)
    page.locator("#key-dialog[open]").wait_for()
    script = """async () => {
        const { askForKey } = await import(new URL("page/js/client/models.js", document.baseURI));
        window.given = Promise.all([askForKey(), askForKey()]);
    }"""
    page.evaluate(script)
    page.fill("#key", "right-key")
    page.keyboard.press("Enter")
    assert page.evaluate("window.given") == [True, True]
    page.locator("#model-name", has_text="nano").wait_for()
    assert page.locator("#key-dialog[open]").count() == 0
    problems_of(page)


def test_models_that_are_not_json_are_said(page: Page) -> None:
    page.route(MODELS, lambda r: r.fulfill(status=200, body="<h1>Sign in"))
    page.reload()
    page.locator("#problem", has_text="is not a list of models").wait_for()


# What stays as it is ------------------------------------------------------------------------------


def test_an_edit_stays_while_an_answer_ends(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    held = hold(page, CHAT)
    send(page, "Really?")
    page.locator(".question").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.locator(".edit textarea").fill("Can you read")
    finish(held[0])
    page.locator(".answer .actions").nth(1).wait_for()
    page.keyboard.type(" this?")  # the focus is still there
    assert page.locator(".edit textarea").input_value() == "Can you read this?"
    send(page, "And now?")
    page.locator(".edit textarea").press("Escape")
    page.locator(".edit").wait_for(state="detached")
    assert page.evaluate("document.activeElement.ariaLabel") == "Edit the question"
    assert page.locator("#stop").is_visible()  # the answer goes on
    page.keyboard.press("Escape")
    page.locator(".answer .note", has_text="Stopped.").wait_for()


def test_a_video_stays_while_an_answer_ends(page: Page, tmp_path: Path) -> None:
    from tests.server.page.test_media import write_clip

    attach(page, write_clip(tmp_path / "clip.webm"))
    held = hold(page, CHAT)
    send(page, "Which one begins to move first?")
    page.evaluate("window.video = document.querySelector('.question video')")
    held[0].continue_()
    page.locator(".answer .actions").wait_for()
    page.locator(".strip").wait_for()
    assert page.evaluate("window.video === document.querySelector('.question video')")


def test_a_question_reads_the_pictures_of_its_own_conversation(page: Page) -> None:
    held = hold(page, MODELS)
    page.reload()
    page.wait_for_selector("body.ready")
    attach(page, EXAMPLES / "text.png")
    send(page, "What does it say?")
    page.click("#new")
    page.route(CHAT, finish)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
    held[0].continue_()
    page.locator("#model-name", has_text="nano").wait_for()
    page.wait_for_timeout(100)
    assert sent == []
    page.locator(".conversation").click()
    page.locator(".answer .note", has_text="Stopped.").wait_for()


# Storage ------------------------------------------------------------------------------------------

FULL = """() => { IDBObjectStore.prototype.put = () => {
    throw new DOMException("full", "QuotaExceededError");
}; }"""
STORED = """() => new Promise((resolve) => {
    indexedDB.open("qwen2vl").onsuccess = ({ target: { result } }) => {
        const count = result.transaction("media").objectStore("media").count();
        count.onsuccess = () => { result.close(); resolve(count.result); };
    };
})"""
LISTS = """() => {
    window.lists = 0;
    const getAll = IDBObjectStore.prototype.getAll;
    IDBObjectStore.prototype.getAll = function () { window.lists += 1; return getAll.call(this); };
}"""


def test_full_storage_is_said_once(page: Page) -> None:
    page.evaluate(FULL)
    ask(page, "Hi")
    page.locator("#composer-problem", has_text="storage for this page is full").wait_for()
    ask(page, "Hi again")
    assert page.locator("#composer-problem").is_hidden()
    assert "storage for this page is full" in (page.locator("#sidebar-note").text_content() or "")


def test_a_closed_database_is_opened_again(page: Page) -> None:
    ask(page, "Hi")
    page.locator(".conversation").wait_for()
    deleted = """() => new Promise((resolve) => {
        indexedDB.deleteDatabase("qwen2vl").onsuccess = () => resolve(true);
    })"""
    assert page.evaluate(deleted)  # the page closes its own connection for this
    page.click("#new")
    ask(page, "What is 2 + 2?")
    page.locator(".conversation", has_text="What is 2 + 2?").wait_for()


def test_pictures_of_dropped_questions_are_deleted(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    ask(page, "And this?", EXAMPLES / "boxes.png")
    assert page.evaluate(STORED) == 2
    page.locator(".question").first.hover()
    page.get_by_label("Edit the question").first.click()
    page.locator(".edit textarea").fill("Can you read this?")
    page.keyboard.press("Enter")
    page.locator(".question .line .text", has_text="Can you read this?").wait_for()
    page.locator(".answer .actions").wait_for()
    assert page.locator(".question").count() == 1
    assert page.evaluate(STORED) == 1
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"


def test_the_list_is_not_read_while_an_answer_grows(page: Page) -> None:
    page.evaluate(LISTS)
    grow = """async ({ seconds, body }) => {
        const encoder = new TextEncoder();
        window.fetch = async () => new Response(new ReadableStream({ async start(controller) {
            for (let i = 0; i < seconds * 4; i += 1) {
                controller.enqueue(encoder.encode(body));
                await new Promise((resolve) => setTimeout(resolve, 250));
            }
            controller.enqueue(encoder.encode("data: [DONE]\\n\\n"));
            controller.close();
        } }));
    }"""
    page.evaluate(grow, {"seconds": 3, "body": event({"content": "word "})})
    assert ask(page, "Hi").startswith("word word")
    page.wait_for_timeout(300)
    assert page.evaluate("window.lists") == 2  # when it began, and when it ended
