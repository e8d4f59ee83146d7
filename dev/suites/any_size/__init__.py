"""Sampling of the frozen suite `any-size`: python -m dev.suites.any_size.

The same items on canvases from 64 to 2,000 pixels a side, of aspect ratios from 1:10 to 20:1. A
part is a canvas; where a small model's limit of pixels shrinks the canvas, a second part has the
same items at a limit that does not. Each item is shown in two sizes: relative, a fixed share of the
canvas's short side, and absolute, 48 pixels. Lines of text have the same height in pixels on every
canvas, and parts of their own: they are measured by edits. What a canvas cannot hold is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from dev.suites.any_size.canvases import CANVASES, line_pictures, pictures
from dev.suites.any_size.items import QUESTIONS, BaseItem, sample_items, sample_lines
from dev.suites.sampling import FONTS
from qwen2vl.eval.suites.frozen_suite import FrozenHeader, FrozenItem, Part, write_frozen_suite
from qwen2vl.synth.compositing import Composite
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES

__all__ = ["FILE", "SEED", "freeze"]

SEED = "any-size/1"
FILE = FROZEN / "any-size.jsonl"

MAX_TOKENS = 32  # of an answer
PROMPT_TOKENS = 64  # of the chat template, byte by byte


def freeze(path: Path = FILE) -> None:
    """Write the file of the suite.

    Raises:
        FontError: a font that comes with the package is absent.
    """
    base_items = sample_items(Random(f"{SEED}/items"))
    lines = sample_lines(Random(f"{SEED}/lines"))
    parts: dict[str, Part] = {}
    items: list[FrozenItem] = []
    for canvas in CANVASES:
        placed = {
            canvas.name: pictures(canvas, base_items),
            f"line_{canvas.name}": line_pictures(canvas, lines),
        }
        for name, numbered in placed.items():
            parts[name] = Part(note="at the model's own max_pixels" if canvas.is_shrunk else "")
            items += [_item(name, *one, None) for one in numbered]
        for name, numbered in placed.items() if canvas.is_shrunk else ():
            note = f"not shrunk: {canvas.tokens:,} image tokens"
            parts[f"{name}_unresized"] = Part(note=note, compared_with=name)
            items += [_item(f"{name}_unresized", *one, canvas.max_pixels) for one in numbered]
    write_frozen_suite(path, _header(parts, items), items)


def _header(parts: dict[str, Part], items: Sequence[FrozenItem]) -> FrozenHeader:
    longest = max(canvas.tokens for canvas in CANVASES) + PROMPT_TOKENS + MAX_TOKENS
    longest += max(len(item.question.encode()) for item in items)  # at most a token a byte
    return FrozenHeader(
        suite="any-size",
        parts=parts,
        max_tokens=MAX_TOKENS,
        max_model_len=-(-longest // 64) * 64,
        held_out={
            "styles": HELD_OUT_STYLES,
            "fonts": FONTS,
            "patterns": tuple(q for asked in QUESTIONS.values() for q in asked),
        },
    )


def _item(
    part: str, number: int, base: BaseItem, picture: Composite, max_pixels: int | None
) -> FrozenItem:
    return FrozenItem(
        id=f"{part}/{number:03d}",
        part=part,
        kind=base.kind,
        question=base.question,
        answers=base.answers,
        metric="edit_distance" if base.kind == "line" else "exact_match",
        pictures=(picture,),
        choices=base.choices,
        max_pixels=max_pixels,
    )
