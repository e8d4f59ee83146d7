"""Files of requests for the tests of `batch`, and the answers that are expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen2vl.engine import LLM, SamplingParams

CHAT = "/v1/chat/completions"
WORDS = ("apple", "river", "stone", "cloud", "seven", "music")


def questions(count: int) -> list[str]:
    return [f"What is {WORDS[i % len(WORDS)]}{i} backwards?" for i in range(count)]


def write_requests(path: Path, texts: list[str], **fields: Any) -> Path:
    """Write a request for each text; its custom id is the text."""
    with path.open("w") as file:
        for text in texts:
            messages = [{"role": "user", "content": text}]
            body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
            line = {"custom_id": text, "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def contents(path: Path) -> dict[str, str]:
    """Return custom id -> answer; every id once."""
    found = records(path)
    by_id = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
        for one in found
    }
    assert len(by_id) == len(found)
    return by_id


def chat(texts: list[str]) -> dict[str, str]:
    """Return text -> answer of LLM.chat."""
    params = SamplingParams(temperature=0, max_tokens=12, skip_grounding_tokens=True)
    with LLM("nano", device="cpu", dtype="float32") as llm:
        found = llm.chat([[{"role": "user", "content": one}] for one in texts], params)
    return {text: one.text for text, one in zip(texts, found, strict=True)}
