"""What fits into a request: sizes of pictures, numbers, bytes, the context; said before sending."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    TIMEOUT,
    ask,
    attach,
    expect,
    expect_value,
    finish,
    last_answer,
    problems_of,
    refuse,
    requests_of,
    set_limits,
    wait_for_pending,
    write_picture,
)

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

pytestmark = needs_chromium

SIZE = "#picture-size"


def expect_problem(page: Page, sentence: str | re.Pattern[str]) -> None:
    """Wait until the form says a sentence."""
    expect(page.locator("#composer-problem")).to_be_visible()
    expect(page.locator("#composer-problem")).to_have_text(sentence)


def assert_not_sent(page: Page) -> None:
    """Check that neither the button nor Enter sends the question."""
    before = page.locator(".question").count()
    page.fill("#question", "What is it?")
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Enter")
    wait_for_pending(page)
    expect(page.locator(".question")).to_have_count(before)
    expect(page.locator("#question")).to_have_value("What is it?")


def expect_failure(page: Page, sentence: str | re.Pattern[str]) -> None:
    """Wait until the last answer says this about its failure."""
    expect(last_answer(page).locator(".failure p")).to_have_text(sentence)


# The size of pictures -----------------------------------------------------------------------------


def test_earlier_questions_keep_the_size_that_they_were_asked_with(
    page: Page, tmp_path: Path
) -> None:
    bodies = requests_of(page)
    large = write_picture(tmp_path / "large.png", (1000, 800))
    ask(page, "What is it?", large)
    attach(page, write_picture(tmp_path / "other.png", (1000, 800)))
    page.locator(SIZE).press("Home")
    ask(page, "And this?")
    captions = ["980 \u00d7 784 · 980 tokens", "112 \u00d7 84 · 12 tokens · size limited"]
    notes = page.locator(".question .media .note")
    expect(notes).to_have_text(captions)
    attach(page, EXAMPLES / "text.png")  # the slider begins anew
    expect(page.locator("#size-text")).to_have_text("at most 1,024 tokens each")
    expect_value(page, "localStorage['qwen2vl.settings'] ?? ''", "")
    page.reload()
    expect(notes).to_have_text(captions)
    ask(page, "Both?")
    sent = [
        item.get("max_pixels")
        for message in bodies[-1]["messages"]
        if message["role"] == "user"
        for item in message["content"]
        if item["type"] == "image_url"
    ]
    assert sent == [None, 16 * 784]
    expect(notes).to_have_text(captions)


# The context --------------------------------------------------------------------------------------


def test_an_answer_may_have_what_fits(page: Page, tmp_path: Path) -> None:
    files = [write_picture(tmp_path / f"{i}.png", (1200, 1200)) for i in range(4)]
    bodies = requests_of(page)
    page.click("#settings")
    expect(page.locator("#max-tokens")).to_have_value("")
    page.fill("#max-tokens", "1024")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    ask(page, "Which one is it?", *files)
    sentence = (
        r"^The conversation does not fit into the model: 4,9\d\d tokens, and the context of the "
        r"model has 4,096\. 1,024 of them are kept free for the answer \(“Longest answer” in the "
        r"settings\)\.$"
    )
    expect_failure(page, re.compile(sentence))
    page.get_by_role("button", name="Clear “Longest answer” and ask again").click()
    page.locator(".answer:not(:has(.failure)) .actions").wait_for(timeout=3 * TIMEOUT)
    assert bodies[0]["max_tokens"] == 1024
    assert "max_tokens" not in bodies[1]
    assert len(problems_of(page)) == 1


def test_smaller_pictures_are_offered(page: Page) -> None:
    message = (
        "the prompt has 5,837 = 71 text + 5,766 image tokens, more than 4,096, the context "
        "(max_model_len); lower max_pixels to 392,000, which leaves 1,024 for the output"
    )
    refuse(page, 400, message, code="context_length_exceeded", param="messages")
    ask(page, "What does it say?", EXAMPLES / "text.png")
    sentence = (
        "The conversation does not fit into the model: 5,837 tokens, and the context of the model "
        "has 4,096. Make the pictures smaller (“Picture size”)"
    )
    expect_failure(page, re.compile("^" + re.escape(sentence)))
    page.unroute(CHAT)
    bodies = requests_of(page)
    page.get_by_role("button", name="Ask with at most 500 tokens a picture").click()
    page.locator(".answer:not(:has(.failure)) .actions").wait_for()
    assert bodies[0]["messages"][0]["content"][0]["max_pixels"] == 392_000
    expect(page.locator(".media .note")).to_have_text(re.compile("size limited$"))
    problems_of(page)


def test_pictures_that_do_not_fit_are_not_sent(page: Page, tmp_path: Path) -> None:
    files = [write_picture(tmp_path / f"{i}.png", (1200, 1200)) for i in range(5)]
    attach(page, *files)
    expect_problem(
        page,
        "The pictures have 4,805 tokens, and the context of the model has 4,096 for them, the "
        "texts and the answer. Lower “Picture size”, or remove pictures.",
    )
    expect(page.locator("#size-text")).to_have_text(re.compile("together 4,805 of 4,096$"))
    assert_not_sent(page)
    page.locator(SIZE).press("Home")
    page.locator("#composer-problem").wait_for(state="hidden")
    expect(page.locator("#send")).to_be_enabled()


# Numbers and bytes --------------------------------------------------------------------------------


def test_the_number_of_pictures_is_limited_with_earlier_ones(page: Page, tmp_path: Path) -> None:
    files = [write_picture(tmp_path / f"{i}.png", (30, 30)) for i in range(17)]
    attach(page, *files)
    expect_problem(page, "The server takes 16 pictures in one request, and these are 17. Remove 1.")
    assert_not_sent(page)
    page.get_by_label("Remove 16.png").click()
    page.route(CHAT, finish)
    ask(page, "What are they?")
    attach(page, files[16])
    expect_problem(page, re.compile("those of earlier questions are sent again, which makes 17"))
    assert_not_sent(page)


def test_a_file_that_is_too_large_is_refused_unread(page: Page) -> None:
    set_limits(page, max_body_bytes=3_000_000)
    page.evaluate("() => { FileReader.prototype.readAsDataURL = () => { window.isRead = true; }; }")
    picture = (EXAMPLES / "text.png").read_bytes()
    files: Any = {"name": "a.png", "mimeType": "image/png", "buffer": picture + bytes(2_300_000)}
    page.set_input_files("#file", files)
    expect_problem(
        page,
        "a.png has 2.3 MB, and a file may have 2.2 MB: sending adds a third, and the server takes "
        "3 MB. Use a smaller one.",
    )
    expect(page.locator("#attachments li")).to_have_count(0)
    for name in ("b.png", "c.png"):
        files = {"name": name, "mimeType": "image/png", "buffer": picture + bytes(1_200_000)}
        page.set_input_files("#file", files)
        page.locator(f"#attachments li[title='{name}']").wait_for()
    expect_problem(
        page, re.compile(r"have 3\.2 MB as they are sent, a third more than their files")
    )
    assert_not_sent(page)
    assert not page.evaluate("window.isRead ?? false")


def test_a_picture_with_too_many_pixels_is_refused(page: Page, tmp_path: Path) -> None:
    set_limits(page, max_image_pixels=10_000)
    page.set_input_files("#file", write_picture(tmp_path / "a.png", (200, 100)))
    expect_problem(page, re.compile(r"^a\.png has 20,000 pixels, and the server takes 10,000\."))
    expect(page.locator("#attachments li")).to_have_count(0)


# Refusals of the server ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "param", "shown"),
    [
        (
            "image 2 is not an image in a known format; supported are JPEG and PNG",
            "messages[2].content[1]",
            "Picture 2 (boxes.png) is not an image in a known format; supported are JPEG and PNG.",
        ),
        (
            "messages[0].content[0]: the image has 21 MB, at most 20 MB",
            "messages[0].content[0]",
            "Picture 1 of question 1 (shapes.png): the image has 21 MB, at most 20 MB.",
        ),
        (
            "messages[2].content[1]: the request has 3 images, at most 2 may be given "
            "(--limit-mm-per-prompt); send fewer",
            "messages[2].content[1]",
            "The request has 3 images, at most 2 may be given; send fewer.",
        ),
        ("max_tokens: got 0, at least 1", "max_tokens", "“Longest answer”: got 0, at least 1."),
        (
            "this server needs an API key: give one as Authorization: Bearer KEY",
            "",
            "This server needs an API key: enter it.",
        ),
    ],
)
def test_refusals_are_in_the_words_of_the_page(
    page: Page, message: str, param: str, shown: str
) -> None:
    page.route(CHAT, finish)
    ask(page, "First", EXAMPLES / "shapes.png")
    status = 401 if "key" in message else 400
    refuse(page, status, message, param=param, code="invalid_value")
    attach(page, EXAMPLES / "text.png", EXAMPLES / "boxes.png")
    ask(page, "Second")
    if status == 401:
        page.locator("#key-dialog [data-close]").click()
        page.get_by_role("button", name="Enter the key").wait_for()
    expect_failure(page, shown)
    problems_of(page)
