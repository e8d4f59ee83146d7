"""Samples that lmms-eval logged, and their comparison item by item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Comparison", "Sample", "compare", "read_samples"]

SENTINEL = "[LMMS_EVAL_"  # begins what lmms-eval scores in place of an answer: request failed, ...


@dataclass(frozen=True, slots=True)
class Sample:
    """The answer to one question, with its usage and score."""

    text: str
    input_tokens: int | None
    output_tokens: int | None
    accuracy: float

    @property
    def is_sentinel(self) -> bool:
        """Whether the request failed."""
        return self.text.startswith(SENTINEL)

    @property
    def has_usage(self) -> bool:
        """Whether tokens were counted."""
        return bool(self.input_tokens) and self.output_tokens is not None


Samples = Mapping[str, Mapping[int, Sample]]  # part -> document id -> sample


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of one task, item by item."""

    items: int
    equal: int  # texts
    equal_usage: int  # numbers of prompt and output tokens
    equal_score: int
    sentinels: int  # in either run
    without_usage: int
    different: tuple[int, ...]  # document ids of different texts


def read_samples(folder: Path, tasks: Mapping[str, str]) -> dict[str, dict[int, Sample]]:
    """Read the sample files of one run.

    Args:
        folder: of --output_path.
        tasks: part -> name of its task.

    Raises:
        FileNotFoundError: a task has no samples, or several files of them.
    """
    return {part: _read_task(folder, name) for part, name in tasks.items()}


def compare(first: Mapping[int, Sample], second: Mapping[int, Sample]) -> Comparison:
    """Compare two runs of a task; an item that one of them lacks is different."""
    ids = sorted(first.keys() | second.keys())
    pairs = [(first[i], second[i]) for i in ids if i in first and i in second]
    found = [*first.values(), *second.values()]
    return Comparison(
        items=len(ids),
        equal=sum(a.text == b.text for a, b in pairs),
        equal_usage=sum(
            (a.input_tokens, a.output_tokens) == (b.input_tokens, b.output_tokens) for a, b in pairs
        ),
        equal_score=sum(a.accuracy == b.accuracy for a, b in pairs),
        sentinels=sum(sample.is_sentinel for sample in found),
        without_usage=sum(not sample.has_usage for sample in found),
        different=tuple(
            i for i in ids if i not in first or i not in second or first[i].text != second[i].text
        ),
    )


def _read_task(folder: Path, name: str) -> dict[int, Sample]:
    files = sorted(folder.rglob(f"*_samples_{name}.jsonl"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder}: {len(files)} files of samples of {name}, must be 1")
    lines = files[0].read_text(encoding="utf-8").splitlines()
    return dict(_read_sample(json.loads(line)) for line in lines)


def _read_sample(raw: Mapping[str, Any]) -> tuple[int, Sample]:
    usage = raw["token_counts"][0] or {}
    return raw["doc_id"], Sample(
        text=raw["filtered_resps"],  # a string, since each question was asked once
        input_tokens=usage.get("input_tokens"),
        output_tokens=usage.get("output_tokens"),
        accuracy=raw["accuracy"],
    )
