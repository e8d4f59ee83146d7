"""The mini suite without a harness: answers of `LLM`, and options of a server of the same model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen2vl import LLM, SamplingParams
from qwen2vl.errors import ConfigError
from qwen2vl.eval.mini import build_task

__all__ = ["GREEDY", "MAX_TOKENS", "OPTIONS", "serve_options", "suite_answers"]

OPTIONS = {"dtype": "float32", "device": "cpu"}
MAX_TOKENS = 64  # as `qwen2vl eval`
GREEDY = 0  # temperature


def serve_options(options: Mapping[str, str], folder: Path) -> list[str]:
    """Return the options of `qwen2vl serve` for a model, which may read files of `folder`."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--allowed-local-media-path", str(folder)]


def suite_answers(parts: Iterable[str], limit: int | None) -> dict[str, list[str]]:
    """Answer the questions of parts, as a server does: grounding tokens are dropped."""
    llm = LLM("nano", **OPTIONS)
    params = SamplingParams(temperature=GREEDY, max_tokens=MAX_TOKENS, skip_grounding_tokens=True)
    return {
        part: [answer.text for answer in llm.chat(_prompts(part, limit), params)] for part in parts
    }


def _prompts(part: str, limit: int | None) -> list[Any]:
    task, prompts = build_task(part), []
    for case in task.examples()[:limit]:
        try:
            prompts.append(task.prompt(case))
        except ConfigError:  # its fonts are not installed: it is not exported either
            continue
    return prompts
