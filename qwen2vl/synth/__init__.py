"""A procedural world with known answers, from which a small model learns and is judged.

    mixture = Mixture(weights={"text": 2, "shapes": 1}, text_length=(1, 8), questions=3)
    spec = sample(seed=1, index=42, mixture=mixture)   # numbers and the truth, no pixels, JSON-able
    example = render(spec)                             # example.messages, example.truth

`sample` is a pure function of its arguments (the index is all the state a resumed run needs) and
costs some 0.1 ms; `render` some 0.2 ms. `example.messages` is in Qwen's content form:

    {"role": "user", "content": [{"type": "image", "image": uint8 (H, W, 3)}, ...,
                                 {"type": "text", "text": question}]},
    {"role": "assistant", "content": answer}, ...     # `mixture.questions` pairs at most

A clip is {"type": "video", "video": uint8 (F, H, W, 3)}. Pictures stand in the first user turn
only; `example.prompt` is that turn alone, and `example.truth[i]` is the Question (task, text,
answer, box in pixels or None, choices) of assistant turn i. `Spec.to_json` / `Spec.from_json`
freeze an example, `spec.scaled(k)` asks the same at k times the size. Mixture's fields are the
knobs of a curriculum; wrong ones raise ConfigError. Missing fonts raise FontError (a ConfigError)
with the packages to install. Next room: spec.py for the structs, world.py for the door.
"""

from __future__ import annotations

from qwen2vl.synth.spec import Example, Mixture, Question, Spec
from qwen2vl.synth.world import FAMILIES, render, sample

__all__ = ["FAMILIES", "Example", "Mixture", "Question", "Spec", "render", "sample"]
