"""JSON round trip and scaling of specs; validation of mixtures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.synth import Mixture, Spec, render, sample
from qwen2vl.synth.spec import Line, Scene
from tests.requirements import needs_training_fonts
from tests.synth.family_parameters import FAMILY_PARAMETERS


@pytest.mark.parametrize("family", FAMILY_PARAMETERS)
def test_json_round_trip(family: str) -> None:
    mixture = Mixture(weights={family: 1.0}, max_questions=3, fonts="bundled")
    for index in range(30):
        spec = sample(5, index, mixture)
        text = json.dumps(spec.to_json())
        assert Spec.from_json(json.loads(text)) == spec


def test_json_omits_defaults() -> None:
    spec = sample(1, 2, Mixture(weights={"shapes": 1.0}, textured_share=0.0))
    raw = spec.to_json()
    assert "texture" not in raw["pictures"][0]
    assert "box" not in raw["questions"][0]


@pytest.mark.parametrize("k", [2, 3])
def test_scaled_multiplies_every_length(k: int) -> None:
    spec = sample(3, 0, Mixture(weights={"grounding": 1.0}))
    question = next(
        s
        for s in (sample(3, i, Mixture(weights={"grounding": 1.0})) for i in range(50))
        if s.questions[0].box
    )
    (small,), (large,) = spec.pictures, spec.scaled(k).pictures
    assert isinstance(small, Scene)
    assert isinstance(large, Scene)
    assert (large.width, large.height) == (k * small.width, k * small.height)
    assert [s.side for s in large.shapes] == [k * s.side for s in small.shapes]
    box = question.questions[0].box
    assert box
    assert question.scaled(k).questions[0].box == tuple(k * v for v in box)


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("all", marks=needs_training_fonts)])
@pytest.mark.parametrize("k", [2, 3])
def test_scaled_text_stays_inside_its_canvas(k: int, fonts: Any) -> None:
    mixture = Mixture(weights={"text": 1.0}, plain_share=1.0, padding=(4, 8), fonts=fonts)
    for index in range(40):
        spec = sample(9, index, mixture).scaled(k)
        (line,) = spec.pictures
        assert isinstance(line, Line)
        image = render(spec).messages[0]["content"][0]["image"]
        border = [image[0], image[-1], image[:, 0], image[:, -1]]
        assert all((side == 255).all() for side in border), line


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": {"texts": 1.0}}, "texts.*families are text, shapes"),
        ({"weights": {"text": -1.0, "shapes": 2.0}}, "none may be negative"),
        ({"weights": {}}, "one positive"),
        ({"layout": "free"}, "layout is 'free'; choose cells, line"),
        ({"fonts": "serif"}, "choose mono2, all, validation, judge, bundled"),
        ({"split": "test"}, "choose train, held_out, all"),
        ({"alphabet": "greek"}, "choose digits, letters, all"),
        ({"text_length": (5, 2)}, r"text_length is \(5, 2\); it must rise and start at 1"),
        ({"text_length": (0, 2)}, "start at 1"),
        ({"canvas": (20, 50)}, "start at 56"),
        ({"max_questions": 0}, "max_questions is 0"),
        ({"num_frames": (4, 1)}, "3 frames at least"),
        ({"num_shapes": (2, 9)}, "at most 5"),
        ({"num_names": 5}, "num_names is 5; 0, or 40 at least"),
        ({"plain_share": 1.5}, "between 0 and 1"),
    ],
)
def test_invalid_mixtures_raise_config_errors(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Mixture(**change)  # type: ignore[arg-type]
