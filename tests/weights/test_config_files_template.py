"""CHAT_TEMPLATE, written into saved folders, renders what the official template renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen2vl.weights.config_files import CHAT_TEMPLATE, log_foreign_chat_template
from tests.parity.test_chat import OFFICIAL

IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "a.mp4"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "  Hello {{ 1 }}\n<b>&</b> "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": []}],
    "turns": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}, IMAGE]},
        {"role": "assistant", "content": "A cat.\n"},
        {"role": "user", "content": [VIDEO, {"text": "And "}, {"type": "text", "text": "this? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "tool", "content": [{"image_url": {"url": "u"}}, {"image": "i"}, {"video": "v"}]},
    ],
    "unknown part": [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "x"}]}
    ],
}


def render(template: str, **values: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_vision_id", [False, True])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_the_same_as_the_official_template(
    name: str, add_vision_id: bool, add_generation_prompt: bool
) -> None:
    values = {
        "messages": CONVERSATIONS[name],
        "add_vision_id": add_vision_id,
        "add_generation_prompt": add_generation_prompt,
    }
    assert render(CHAT_TEMPLATE, **values) == render(OFFICIAL, **values)


def test_rendered_text() -> None:
    text = render(CHAT_TEMPLATE, messages=CONVERSATIONS["turns"][:1], add_generation_prompt=True)
    image_tokens = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image_tokens}What?{image_tokens}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_own_and_official_template_are_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "qwen2vl")
    for template in (CHAT_TEMPLATE, OFFICIAL):
        text = json.dumps({"chat_template": template})
        (tmp_path / "chat_template.json").write_text(text, encoding="utf-8")
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        log_foreign_chat_template(tmp_path)
    assert not caplog.text
