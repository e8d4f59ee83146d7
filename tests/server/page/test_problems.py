"""What the page says when a request fails, the server cannot be reached, or wants a key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.requirements import needs_chromium
from tests.server.conftest import ServerStarter
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    MODELS,
    PageOpener,
    ask,
    attach,
    edit,
    event,
    expect,
    expect_value,
    last_answer,
    problems_of,
    refuse,
    requests_of,
    wait_for_pending,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium


def expect_failure(page: Page, sentence: str | re.Pattern[str]) -> None:
    """Wait until the last answer says this about its failure."""
    expect(last_answer(page).locator(".failure p")).to_have_text(sentence)


def test_errors_are_sentences_and_can_be_retried(page: Page) -> None:
    refuse(page, 429, "too many requests wait; try again in 2 s")
    ask(page, "What does it say?", EXAMPLES / "text.png")
    expect_failure(page, "Too many requests wait; try again in 2 s.")
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=502, content_type="text/html", body="<h1>Bad"))
    page.get_by_role("button", name="Try again").click()
    expect_failure(page, "The server answered with the status 502.")
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.abort())
    page.get_by_role("button", name="Try again").click()
    expect_failure(page, re.compile(r"The server cannot be reached\."))
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=200, body=event({"content": "half"})))
    page.get_by_role("button", name="Try again").click()
    expect_failure(page, re.compile(r"The connection ended before the answer was complete\."))
    expect(last_answer(page).locator(".text")).to_have_text("half")
    page.unroute(CHAT)
    failed = 'data: {"error": {"message": "the engine has stopped"}}\n\n'
    page.route(CHAT, lambda r: r.fulfill(status=200, body=event({"content": "half"}) + failed))
    page.get_by_role("button", name="Try again").click()
    expect_failure(page, "The engine has stopped.")
    page.unroute(CHAT)
    page.get_by_role("button", name="Try again").click()
    page.locator(".answer:not(:has(.failure)) .actions").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")
    assert all("Failed to load resource" in problem for problem in problems_of(page))


def test_a_failed_question_is_left_out_of_later_requests(page: Page) -> None:
    refuse(page, 400, "image 1 is damaged", param="messages[0].content[0]")
    ask(page, "What does it say?", EXAMPLES / "text.png")
    expect_failure(page, "Picture 1 (text.png) is damaged.")
    page.unroute(CHAT)
    bodies = requests_of(page)
    assert ask(page, "Hi")
    expect(page.locator(".question").first.locator(".left-out")).to_have_text(
        "Not answered, so it is not sent again with later questions."
    )
    expect(page.locator(".left-out")).to_have_count(1)
    (message,) = bodies[0]["messages"]
    assert message["content"] == [{"type": "text", "text": "Hi"}]
    edit(page)  # the picture that was refused can be taken away
    page.get_by_label("Remove text.png").click()
    page.focus("#question")
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_count(1)
    page.locator(".answer:not(:has(.failure)) .actions").wait_for()
    expect(page.locator(".left-out")).to_have_count(0)
    assert len(problems_of(page)) == 1


def test_refusals_of_the_server_are_shown(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "cut.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    attach(page, broken)
    ask(page, "What happens?")
    expect_failure(page, re.compile(r"^[A-Z].*\.$"))
    expect_failure(page, re.compile("video", re.IGNORECASE))
    assert len(problems_of(page)) == 1


def test_an_unreachable_server_is_said_when_the_page_opens(open_page: PageOpener) -> None:
    page = open_page()
    page.route(MODELS, lambda r: r.abort())
    page.reload()
    page.locator("#problem", has_text="The server cannot be reached.").wait_for()
    page.unroute(MODELS)
    page.locator("#problem button").click()
    page.locator("#problem").wait_for(state="hidden")
    expect(page.locator("#model-name")).to_have_text("nano")
    problems_of(page)


def test_the_key_is_asked_for_and_kept_in_the_tab(
    open_page: PageOpener, start_server: ServerStarter
) -> None:
    server = start_server(api_keys=("right-key",))
    page = open_page(server.base_url)
    page.locator("#key-dialog[open]").wait_for()
    page.fill("#key", "wrong-key")
    page.keyboard.press("Enter")
    page.get_by_text("The server does not accept this key.").wait_for()
    expect_value(page, "document.activeElement.id", "key")
    for blank in ("", "  "):
        page.fill("#key", blank)
        page.keyboard.press("Enter")
        wait_for_pending(page)
        expect(page.locator("#key-dialog[open]")).to_have_count(1)
    page.fill("#key", "right-key")
    page.keyboard.press("Enter")
    page.locator("#model-name", has_text="nano").wait_for()
    assert ask(page, "What does it say?", EXAMPLES / "text.png") == "Tea 3.50"
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    local, session = json.loads(stored)
    assert "right-key" not in json.dumps(local)
    assert session["qwen2vl.key"] == "right-key"
    page.get_by_label("Show the request").click()
    expect(page.locator("#code-text")).to_contain_text("$QWEN2VL_API_KEY")
    expect(page.locator("#code-text")).not_to_contain_text("right-key")
    page.reload()
    page.locator(".answer").wait_for()
    page.locator("#model-name", has_text="nano").wait_for()
    problems_of(page)
