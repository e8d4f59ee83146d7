"""Entry points of the synthetic data: `sample` (index -> spec), `render` (spec -> conversation).

`sample` is a pure function of (seed, index, mixture), without state, so that any dataloader worker
can produce any example and a run can resume at any index. `render` draws the images. The task
families are functions in the table `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np

from qwen2vl.synth.compositing.icons import check_icons
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.families import (
    clips,
    documents,
    grounding,
    lines,
    motion,
    named,
    objects,
    refusals,
    shapes,
    text,
    text_only,
    two_pictures,
)
from qwen2vl.synth.families.lines import check_lines
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.spec import FamilySample, Mixture, Spec, SyntheticExample

__all__ = ["FAMILIES", "build_conversation", "check_resources", "render", "sample"]

FAMILIES: Mapping[str, Callable[[Random, Mixture], FamilySample]] = MappingProxyType(
    {
        "text": text.sample,
        "shapes": shapes.sample,
        "grounding": grounding.sample,
        "two_pictures": two_pictures.sample,
        "motion": motion.sample,
        "text_only": text_only.sample,
        "objects": objects.sample,
        "named": named.sample,
        "lines": lines.sample,
        "documents": documents.sample,
        "refusals": refusals.sample,
        "clips": clips.sample,
    }
)

# Families whose pictures contain text, in fonts of the mixture, and those that contain icons.
_TEXT_FAMILIES = ("text", "two_pictures", "objects", "documents", "refusals", "clips")
_ICON_FAMILIES = ("objects", "named", "refusals", "clips")


def check_resources(mixture: Mixture) -> None:
    """Check before a long run that fonts and datasets of a mixture are available.

    Raises:
        FontError: fonts of the mixture are not installed; names the packages.
        DatasetNotFoundError: a dataset is not on this machine; names the command that fetches it.
        ConfigError: a library is not installed.
    """
    used = {name for name, weight in mixture.weights.items() if weight > 0}
    if used & set(_TEXT_FAMILIES):
        files_of(mixture.fonts)
    if used & set(_ICON_FAMILIES):
        check_icons()
    if "lines" in used:
        check_lines(mixture)


def sample(seed: int, index: int, mixture: Mixture) -> Spec:
    """Sample example number `index` of the unbounded sequence `seed`.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    rng = Random(
        f"{seed}/{index}"
    )  # string seeds are hashed, so consecutive indices are uncorrelated
    names = [name for name in FAMILIES if mixture.weights.get(name, 0) > 0]
    (family,) = rng.choices(names, [mixture.weights[name] for name in names])
    sampled = FAMILIES[family](rng, mixture)
    return Spec(
        family=family,
        seed=seed,
        index=index,
        questions=sampled.questions,
        pictures=sampled.pictures,
        clip=sampled.clip,
    )


def render(spec: Spec) -> SyntheticExample:
    """Draw the images of a spec and build its conversation; images precede the text."""
    # Frames in which nothing changes are one object: a third of those of clips.
    drawn = {id(picture): picture for picture in spec.pictures}
    images = {key: draw_image(picture) for key, picture in drawn.items()}
    messages = build_conversation(spec, [images[id(picture)] for picture in spec.pictures])
    return SyntheticExample(messages=messages, truth=spec.questions, spec=spec)


def build_conversation(spec: Spec, frames: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Build the messages of a spec's conversation with its images, drawn as `frames`."""
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
