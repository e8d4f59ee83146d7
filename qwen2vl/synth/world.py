"""The door of the world: a number becomes a spec, a spec becomes a conversation with pictures.

`sample` is a pure function of (seed, index, mixture): no state, so any worker can make any example
and a run can resume anywhere. `render` draws. Families are plain functions in a table. It must not
know models, processors or files. Next room: text.py, the first family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np

from qwen2vl.synth.draw import draw
from qwen2vl.synth.families import grounding, motion, shapes, text, text_only, two_pictures
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.spec import Draft, Example, Mixture, Spec

__all__ = ["FAMILIES", "check_fonts", "converse", "render", "sample"]

FAMILIES: Mapping[str, Callable[[Random, Mixture], Draft]] = MappingProxyType(
    {
        "text": text.sample,
        "shapes": shapes.sample,
        "grounding": grounding.sample,
        "two_pictures": two_pictures.sample,
        "motion": motion.sample,
        "text_only": text_only.sample,
    }
)


_WRITING = ("text", "two_pictures")  # families whose pictures hold letters


def check_fonts(mixture: Mixture) -> None:
    """Find out before a long run whether everything in a mixture can be drawn.

    Raises:
        FontError: fonts of the mixture are not installed; names the packages.
    """
    if any(mixture.weights.get(name, 0) > 0 for name in _WRITING):
        files_of(mixture.fonts)


def sample(seed: int, index: int, mixture: Mixture) -> Spec:
    """Make up example number `index` of the endless series `seed`.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    rng = Random(f"{seed}/{index}")  # a text seed is hashed, so neighbors share nothing
    names = [name for name in FAMILIES if mixture.weights.get(name, 0) > 0]
    (family,) = rng.choices(names, [mixture.weights[name] for name in names])
    draft = FAMILIES[family](rng, mixture)
    return Spec(
        family=family,
        seed=seed,
        index=index,
        questions=draft.questions,
        pictures=draft.pictures,
        clip=draft.clip,
    )


def render(spec: Spec) -> Example:
    """Draw the pictures of a spec and lay out its conversation; pictures come first."""
    messages = converse(spec, [draw(picture) for picture in spec.pictures])
    return Example(messages=messages, truth=spec.questions, spec=spec)


def converse(spec: Spec, frames: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Lay out a spec's conversation around its pictures, drawn as `frames`."""
    media: list[dict[str, Any]]
    if spec.clip:
        media = [{"type": "video", "video": np.stack(frames)}]
    else:
        media = [{"type": "image", "image": frame} for frame in frames]
    messages: list[dict[str, Any]] = []
    for question in spec.questions:
        content = [*media, {"type": "text", "text": question.text}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": question.answer})
        media = []
    return messages
