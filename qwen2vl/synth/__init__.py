"""A procedural world with known answers, from which a small model learns and is judged.

    mixture = Mixture(weights={"text": 2, "shapes": 1}, text_length=(1, 8), questions=3)
    spec = sample(seed=1, index=42, mixture=mixture)   # numbers and the truth, no pixels, JSON-able
    example = render(spec)                             # example.messages, example.truth

`sample` is a pure function (the index is all the state a resumed run needs), about 0.1 ms; `render`
about 0.2 ms. Messages are in Qwen's content form, pixels uint8 (H, W, 3) or (F, H, W, 3), in the
first user turn only; `example.prompt` is that turn, `example.truth[i]` the Question that assistant
turn i answers. Mixture's fields are the knobs of a curriculum. Missing fonts raise FontError with
the packages to install. Next room: spec.py for the structs, world.py for the door.
"""

from __future__ import annotations

from qwen2vl.synth.spec import Example, Mixture, Question, Spec
from qwen2vl.synth.world import FAMILIES, render, sample

__all__ = ["FAMILIES", "Example", "Mixture", "Question", "Spec", "render", "sample"]
