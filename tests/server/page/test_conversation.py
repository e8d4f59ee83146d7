"""Conversations on the page, in Chromium and with nano: ask, stop, retry, edit, reload, keys."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from tests.requirements import needs_chromium
from tests.server.conftest import LiveServer, ServerStarter
from tests.server.page.conftest import EXAMPLES, PageOpener, ask, attach, problems_of

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = needs_chromium

CHAT = "**/v1/chat/completions"
LOCATE = "Show me where the blue cross is."


def last_answer(page: Page) -> Any:
    return page.locator(".answer").last


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
    return base64.b64encode(file.read_bytes()).decode()


def test_examples_are_answered(page: Page, live_server: LiveServer) -> None:
    expected = {"What does it say?": "Tea 3.50", "How many items are in the picture?": "5"}
    for number, button in enumerate(page.locator(".example").all()):
        question = button.inner_text().strip()
        page.click("#new")
        button.click()
        page.locator("#attachments li").wait_for()
        assert page.input_value("#question") == question
        page.click("#send")
        last_answer(page).locator(".actions").wait_for()
        text = last_answer(page).locator(".text").inner_text().strip()
        assert text == expected.get(question, "blue cross"), number
    page.locator("#conversations li").nth(2).wait_for()


def test_a_box_is_drawn_where_the_model_has_it(page: Page, live_server: LiveServer) -> None:
    assert ask(page, LOCATE, EXAMPLES / "boxes.png") == "blue cross"
    message = ask_api(live_server, LOCATE, EXAMPLES / "boxes.png")
    (shape,) = message["grounding"]
    x1, y1, x2, y2 = shape["pixels"][0]["coordinates"]
    line = last_answer(page).locator("rect.line")
    drawn = [float(line.get_attribute(name) or "") for name in ("x", "y", "width", "height")]
    assert drawn == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.02)
    shown = last_answer(page).locator(".rows code").inner_text()
    assert shown == ", ".join(str(round(number)) for number in (x1, y1, x2, y2))
    # On the screen, the drawing covers the picture.
    picture, overlay = (last_answer(page).locator(f".canvas {tag}").bounding_box() for tag in TAGS)
    assert picture == pytest.approx(overlay, abs=0.5)
    assert picture and picture["width"] / picture["height"] == pytest.approx(195 / 155, rel=0.01)


TAGS = ("img", "svg")


def test_a_phrase_its_box_and_its_row_are_linked(page: Page) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    answer = last_answer(page)
    parts = [answer.locator(name) for name in (".phrase", ".mark", ".rows li")]

    def active() -> list[bool]:
        return ["active" in (part.get_attribute("class") or "").split() for part in parts]

    for part in parts:
        part.hover()
        assert active() == [True] * 3
        page.mouse.move(0, 0)
        assert active() == [False] * 3
    for part in (parts[0], parts[1], answer.locator(".rows button")):
        part.focus()
        assert active() == [True] * 3
        part.blur()
        assert active() == [False] * 3


def test_coordinates_and_answers_are_copied(open_page: PageOpener) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    read = "navigator.clipboard.readText()"
    page.get_by_label("Copy the coordinates of blue cross").click()
    page.wait_for_function(f"() => {read}.then((text) => text.startsWith('['))")
    coordinates = json.loads(page.evaluate(read))
    assert [round(one) for one in coordinates] == [
        int(one) for one in last_answer(page).locator(".rows code").inner_text().split(", ")
    ]
    page.get_by_label("Copy the answer").click()
    page.wait_for_function(f"() => {read}.then((text) => text === 'blue cross')")


def shape(kind: str, label: str | None, *numbers: int) -> dict[str, Any]:
    pixels = [
        {"param": f"messages[0].content[{index}]", "coordinates": [n * scale for n in numbers]}
        for index, scale in enumerate((0.5, 2.0))
    ]
    return {"type": kind, "label": label, "normalized": list(numbers), "pixels": pixels}


def test_all_kinds_of_shapes_on_two_pictures(open_page: PageOpener) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    shapes = [
        shape("box", "cats", 10, 20, 300, 400),
        shape("box", "cats", 500, 20, 700, 400),
        shape("point", "the **nose**", 500, 600),
        shape("quad", None, 1, 2, 900, 4, 900, 900, 1, 800),
    ]
    text = (
        "1. Two cats(10,20),(300,400)(500,20),(700,400)\n"
        "2. the nose(500,600) and (1,2),(900,4),(900,900),(1,800)."
    )
    body = event({"content": text}) + event({"grounding": shapes}, "stop") + "data: [DONE]\n\n"
    page.route(CHAT, lambda r: r.fulfill(status=200, body=body))
    ask(page, "Where?", EXAMPLES / "shapes.png", EXAMPLES / "boxes.png")
    assert page.locator(".answer .text li").all_inner_texts() == [
        "Two cats",
        "the nose point 3 and quad 4.",
    ]
    assert page.locator(".phrase").first.get_attribute("data-shapes") == "0 1"
    assert page.locator(".canvas").count() == 2
    for tag, number in [("rect", 4), ("circle", 2), ("polygon", 2)]:
        assert page.locator(f".canvas {tag}.line").count() == number
    assert "picture 1 as sent" in page.locator("figcaption").inner_text()
    page.get_by_text("Copy all as JSON").click()
    read = "navigator.clipboard.readText()"
    page.wait_for_function(f"() => {read}.then((text) => text.startsWith('['))")
    copied = json.loads(page.evaluate(read))
    assert copied[2] == {
        "type": "point",
        "label": "the **nose**",
        "pictures": [
            {"name": "shapes.png", "coordinates": [250, 300]},
            {"name": "boxes.png", "coordinates": [1000, 1200]},
        ],
    }


def test_two_pictures_keep_their_order(page: Page, live_server: LiveServer) -> None:
    files = [EXAMPLES / "shapes.png", EXAMPLES / "text.png"]
    attach(page, *files)
    assert page.locator("#attachments .order").all_inner_texts() == ["1", "2"]
    page.get_by_label("Move text.png to the left").click()
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    answer = ask(page, "What does the first picture say?")
    assert (
        answer
        == ask_api(live_server, "What does the first picture say?", *reversed(files))["content"]
    )
    (body,) = bodies
    sent = [item["image_url"]["url"] for item in body["messages"][0]["content"][:2]]
    assert sent == [f"data:image/png;base64,{encode(file)}" for file in reversed(files)]
    assert page.locator(".question .number").all_inner_texts() == ["1", "2"]


def test_a_reload_brings_the_conversation_back(page: Page) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    ask(page, "And the orange shape?")
    texts = page.locator(".answer .text").all_inner_texts()
    page.locator("#conversations [aria-current]").wait_for()
    page.reload()
    page.locator(".answer").nth(1).wait_for()
    assert page.locator(".answer .text").all_inner_texts() == texts
    assert page.locator(".mark").count() >= 1
    assert page.evaluate("document.querySelector('.question img').naturalWidth") == 195
    page.click("#new")
    assert page.locator("#empty").is_visible()
    page.locator(".conversation").click()
    page.locator(".answer").nth(1).wait_for()
    page.locator("#conversations .icon-button").click()
    page.locator("#no-conversations").wait_for()
    page.reload()
    page.locator("#no-conversations").wait_for()
    assert page.locator(".answer").count() == 0


def test_an_edited_question_is_asked_again(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    ask(page, "Really?")
    page.locator(".question").first.hover()
    page.get_by_label("Edit the question").first.click()
    area = page.locator(".edit textarea")
    assert area.input_value() == "What does it say?"
    area.fill("Can you read this?")
    area.press("Enter")
    page.locator(".answer .actions").wait_for()
    assert page.locator(".question .line .text").all_inner_texts() == ["Can you read this?"]
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .actions").wait_for()
    assert page.locator(".answer").count() == 1


@contextmanager
def slow_network(page: Page, bytes_per_second: float) -> Iterator[None]:
    """Slow what the page receives down."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    options = {"offline": False, "latency": 20, "uploadThroughput": -1}
    session.send(
        "Network.emulateNetworkConditions", {**options, "downloadThroughput": bytes_per_second}
    )
    yield
    session.detach()


def test_a_slow_answer_is_shown_as_it_comes_and_can_be_stopped(page: Page) -> None:
    attach(page, EXAMPLES / "boxes.png")
    with slow_network(page, 1200):
        page.fill("#question", LOCATE)
        page.keyboard.press("Enter")
        assert page.locator("#send").is_hidden()
        page.locator(".waiting").wait_for()
        last_answer(page).locator(".text p", has_text=re.compile("^b")).wait_for()
        assert last_answer(page).get_attribute("aria-busy") == "true"
        page.click("#stop")
        last_answer(page).locator(".actions").wait_for()
    assert last_answer(page).locator("> .note").inner_text() == "Stopped."
    text = last_answer(page).locator(".text").inner_text()
    assert text and "blue cross(".startswith(text[:11])
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .shapes").wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "blue cross"
    assert page.locator("#send").is_visible()


def test_what_is_deleted_stays_deleted(page: Page) -> None:
    with slow_network(page, 300):
        page.fill("#question", "Hi")
        page.keyboard.press("Enter")
        page.locator(".conversation").wait_for()
        page.get_by_label("Delete the conversation Hi").click()
        page.locator("#no-conversations").wait_for()
    ask(page, "What is 2 + 2?")
    page.locator(".conversation").wait_for()
    page.click("#settings")
    page.click("#delete-all")
    page.click("#delete-all-now")
    page.locator("#no-conversations").wait_for(state="attached")
    page.reload()
    page.locator("body.ready").wait_for()
    page.wait_for_timeout(300)
    assert page.locator(".conversation").count() == 0
    stored = "indexedDB.databases().then((all) => all.length)"
    assert page.evaluate(stored) == 1


def test_nothing_is_sent_before_there_is_a_question(page: Page) -> None:
    assert page.locator("#send").is_disabled()
    page.focus("#question")
    page.keyboard.press("Enter")
    page.fill("#question", "  ")
    page.keyboard.press("Enter")
    assert page.locator(".question").count() == 0
    page.fill("#question", "two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#question") == "two\nlines"


# Errors -------------------------------------------------------------------------------------------


def refuse(page: Page, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "t", "param": None, "code": "c"}})
    page.route(CHAT, lambda r: r.fulfill(status=status, content_type="application/json", body=body))


def failure(page: Page) -> str:
    return last_answer(page).locator(".failure p").inner_text()


def test_errors_are_sentences_and_can_be_retried(page: Page) -> None:
    refuse(page, 429, "too many requests wait; try again in 2 s")
    ask(page, "What does it say?", EXAMPLES / "text.png")
    assert failure(page) == "Too many requests wait; try again in 2 s."
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=502, content_type="text/html", body="<h1>Bad"))
    page.get_by_role("button", name="Try again").click()
    page.locator(".failure p", has_text="The server answered with the status 502.").wait_for()
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.abort())
    page.get_by_role("button", name="Try again").click()
    page.locator(".failure p", has_text="The server cannot be reached.").wait_for()
    page.unroute(CHAT)
    page.route(CHAT, lambda r: r.fulfill(status=200, body=event({"content": "half"})))
    page.get_by_role("button", name="Try again").click()
    page.locator(
        ".failure p", has_text="The connection ended before the answer was complete."
    ).wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "half"
    page.unroute(CHAT)
    failed = 'data: {"error": {"message": "the engine has stopped"}}\n\n'
    page.route(CHAT, lambda r: r.fulfill(status=200, body=event({"content": "half"}) + failed))
    page.get_by_role("button", name="Try again").click()
    page.locator(".failure p", has_text="The engine has stopped.").wait_for()
    page.unroute(CHAT)
    page.get_by_role("button", name="Try again").click()
    page.locator(".answer:not(:has(.failure)) .actions").wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"
    assert all("Failed to load resource" in problem for problem in problems_of(page))


def event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def test_refusals_of_the_server_are_shown(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "cut.mp4"
    broken.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(40))
    attach(page, broken)
    ask(page, "What happens?")
    assert re.fullmatch(r"[A-Z].*\.", failure(page))
    assert "video" in failure(page).lower()
    assert len(problems_of(page)) == 1


def test_an_unreachable_server_is_said_when_the_page_opens(open_page: PageOpener) -> None:
    page = open_page()
    page.route("**/v1/models", lambda r: r.abort())
    page.reload()
    page.locator("#problem", has_text="The server cannot be reached.").wait_for()
    page.unroute("**/v1/models")
    page.locator("#problem button").click()
    page.locator("#problem").wait_for(state="hidden")
    assert page.locator("#model-name").inner_text() == "nano"
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
    page.fill("#key", "right-key")
    page.keyboard.press("Enter")
    page.locator("#model-name", has_text="nano").wait_for()
    assert ask(page, "What does it say?", EXAMPLES / "text.png") == "Tea 3.50"
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    local, session = json.loads(stored)
    assert "right-key" not in json.dumps(local)
    assert session["qwen2vl.key"] == "right-key"
    page.get_by_label("Show the request").click()
    code = page.locator("#code-text").inner_text()
    assert "right-key" not in code and "$QWEN2VL_API_KEY" in code
    page.reload()
    page.locator(".answer").wait_for()
    page.locator("#model-name", has_text="nano").wait_for()
    problems_of(page)


# The request as code ------------------------------------------------------------------------------


def test_curl_and_python_get_the_same_answer(page: Page, tmp_path: Path) -> None:
    name = 'it\'s $(a) "picture".png'
    (tmp_path / name).write_bytes((EXAMPLES / "text.png").read_bytes())
    question = 'What does it say? `$HOME` \\ "x" \\u0000'
    answer = ask(page, question, tmp_path / name)
    page.get_by_label("Show the request").click()
    curl = page.locator("#code-text").inner_text()
    page.click("#code-python")
    python = page.locator("#code-text").inner_text()
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True)
    response = json.loads(done.stdout)
    assert response["choices"][0]["message"]["content"] == answer, done.stderr
    command = [sys.executable, "-c", python]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == answer, done.stderr


def test_settings_reach_the_request(page: Page) -> None:
    page.click("#settings")
    page.fill("#max-tokens", "7")
    page.fill("#temperature", "0.5")
    page.fill("#system", "Be brief.")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    bodies: list[dict[str, Any]] = []

    def answer(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        done = event({"content": "ok"}) + event({}, "length") + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=done)

    page.route(CHAT, answer)
    assert ask(page, "Hi") == "ok"
    assert last_answer(page).locator("> .note").inner_text().startswith("The answer was cut")
    (body,) = bodies
    assert (body["max_tokens"], body["temperature"]) == (7, 0.5)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.click("#settings")
    assert page.input_value("#max-tokens") == "7"
    page.select_option("#theme", "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
