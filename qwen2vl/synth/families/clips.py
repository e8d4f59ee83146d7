"""Task family `clips`: what happens in short videos of composite pictures, still ones included.

A scenario is what may happen in a clip: objects move or do not, race, are shown one after another,
appear and disappear, flash, grow or change their color, and a text is shown. Every clip is as
likely as its reverse, so that frames without their order do not give the answer away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from qwen2vl.synth.clips.events import (
    sample_changes,
    sample_flashes,
    sample_recoloring,
    sample_texts,
    sample_turns,
)
from qwen2vl.synth.clips.movements import sample_growth, sample_motion, sample_race
from qwen2vl.synth.clips.offers import Clip, select_offers
from qwen2vl.synth.clips.tracks import build_frames
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.spec import FamilySample, Mixture, Question

__all__ = ["sample"]

# Shares of the clips. Those of the questions in movements.py and offers.py depend on them.
_SCENARIOS: Mapping[Callable[[Random, Mixture], Clip], float] = MappingProxyType(
    {
        sample_motion: 0.34,
        sample_race: 0.1,
        sample_growth: 0.035,
        sample_turns: 0.16,
        sample_changes: 0.15,
        sample_flashes: 0.08,
        sample_texts: 0.1,
        sample_recoloring: 0.035,
    }
)


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a clip, and up to `max_questions` questions about it.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
        FontError: a font of the mixture is not installed.
    """
    (scenario,) = rng.choices(list(_SCENARIOS), list(_SCENARIOS.values()))
    clip = scenario(rng, mixture)
    is_held_out = mixture.split == "held_out"
    questions = [
        Question(
            task=f"clip_{offer.task}",
            text=word_question(rng, f"clip_{offer.task}", *offer.fields, held_out=is_held_out),
            answer=offer.answer,
            choices=offer.choices,
        )
        for offer in select_offers(rng, clip.offers, mixture.max_questions)
    ]
    return FamilySample(tuple(questions), build_frames(clip.canvas, clip.tracks), clip=True)
