"""The request of an answer as code, and the settings in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    LOCATE,
    ask,
    event,
    expect,
    expect_value,
    last_answer,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = needs_chromium


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ('it\'s $(a) "picture".png', 'it\'s $(a) "picture".png'),
        ("größe `touch hacked`;\\.png", "größe `touch hacked`;\\.png"),
        ("a\nEND\ntouch hacked\n.png", "a_END_touch hacked_.png"),
        ("a\r\u2028\u202egnp.png", "a___gnp.png"),
    ],
)
def test_curl_and_python_get_the_same_answer(
    page: Page, tmp_path: Path, name: str, shown: str
) -> None:
    (tmp_path / name).write_bytes((EXAMPLES / "text.png").read_bytes())
    question = 'What does it say? `$HOME` \\ "x" \\u0000'
    answer = ask(page, question, tmp_path / name)
    (tmp_path / name).rename(tmp_path / shown)
    page.get_by_label("Show the request").click()
    expect(page.locator("#code-text")).to_contain_text("curl ")
    curl = page.locator("#code-text").inner_text()
    page.click("#code-python")
    expect(page.locator("#code-text")).to_contain_text("import base64")
    python = page.locator("#code-text").inner_text()
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True)
    response = json.loads(done.stdout)
    assert response["choices"][0]["message"]["content"] == answer, done.stderr
    command = [sys.executable, "-c", python]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == answer, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [shown]


def test_the_python_program_shows_boxes(page: Page, tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "boxes.png", tmp_path)
    ask(page, LOCATE, tmp_path / "boxes.png")
    page.get_by_label("Show the request").click()
    page.click("#code-python")
    expect(page.locator("#code-text")).to_contain_text("import base64")
    command = [sys.executable, "-c", page.locator("#code-text").inner_text()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    _, box = done.stdout.splitlines()
    assert "'label': 'blue cross'" in box and "'coordinates': [" in box, done.stderr


@pytest.mark.parametrize(
    ("kind", "type_", "shown"),
    [
        ("image", "image/svg+xml", "image/svg+xml"),
        ("image", "image/$(touch hacked)", "image/png"),
        ("video", "video/a\nEND\ntouch hacked", "video/mp4"),
        ("image", "", "image/png"),
    ],
)
def test_only_a_plain_media_type_is_written(page: Page, kind: str, type_: str, shown: str) -> None:
    script = """async ([kind, type]) => {
        const url = new URL("page/js/answers/request_code.js", document.baseURI);
        const { showRequestCode } = await import(url);
        const media = new Map([["m", { id: "m", kind, name: "a", type, blob: new Blob() }]]);
        const settings = { system: "", maxTokens: 1, temperature: null };
        const messages = [{ role: "user", text: "Hi", media: ["m"], maxPixels: null }];
        showRequestCode(messages, media, { settings, model: "nano" });
        return document.getElementById("code-text").textContent;
    }"""
    curl = page.evaluate(script, [kind, type_])
    assert f'"url": "data:{shown};base64,$(base64 < a | tr -d \'\\n\')"' in curl
    assert "hacked" not in curl


def test_settings_reach_the_request(page: Page) -> None:
    page.click("#settings")
    page.fill("#max-tokens", "7")
    page.fill("#temperature", "0.5")
    page.fill("#system", "Be brief.")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    bodies: list[Any] = []

    def answer(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        done = event({"content": "ok"}) + event({}, "length") + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=done)

    page.route(CHAT, answer)
    assert ask(page, "Hi") == "ok"
    expect(last_answer(page).locator("> .note")).to_contain_text("The answer was cut")
    (body,) = bodies
    assert (body["max_tokens"], body["temperature"]) == (7, 0.5)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.locator("body.ready").wait_for()
    page.click("#settings")
    expect(page.locator("#max-tokens")).to_have_value("7")
    page.select_option("#theme", "dark")
    expect_value(page, "document.documentElement.dataset.theme", "dark")
    page.reload()
    expect_value(page, "document.documentElement.dataset.theme", "dark")
