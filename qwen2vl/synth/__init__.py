"""Synthetic training and evaluation data: images, videos and questions with known answers.

    mixture = Mixture(weights={"text": 2, "shapes": 1}, text_length=(1, 8), max_questions=3)
    spec = sample(seed=1, index=42, mixture=mixture)   # coordinates and answers, no pixels; JSON
    example = render(spec)                             # example.messages, example.truth

`sample` is a pure function (the index is all the state a resumed run needs). It and `render` take
0.3 ms for a line or a scene of shapes, and some 4 ms for a picture of icons with four questions.
Messages have Qwen's content format; pixels are uint8 (H, W, 3) or (F, H, W, 3) in the first user
turn only. `example.prompt` is that turn, `example.truth[i]` the `Question` that
assistant turn i answers. The fields of `Mixture` define a curriculum. Missing fonts raise
`FontError` with the packages to install.
"""

from __future__ import annotations

from qwen2vl.synth.spec import Mixture, Question, Spec, SyntheticExample
from qwen2vl.synth.world import FAMILIES, render, sample

__all__ = ["FAMILIES", "Mixture", "Question", "Spec", "SyntheticExample", "render", "sample"]
