"""Scenes for the tests of the question samplers."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from qwen2vl.synth.compositing import Composite, Ground, Icon, ShapeLayer
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene, QuestionSampler
from qwen2vl.synth.objects import SceneObject
from qwen2vl.synth.spec import Box

__all__ = ["make_scene", "sample_many", "thing"]


def thing(name: str, box: Box) -> SceneObject:
    """Return "red circle" as a shape, and a name without a color as an icon."""
    color, _, kind = name.rpartition(" ")
    if color:
        layer = ShapeLayer(kind=kind, rgb=(9, 9, 9), box=box)
        return SceneObject(name=kind, color=color, layer=layer, box=box)
    layer = Icon(style="noto", name=name, box=box)
    return SceneObject(name=name, color="", layer=layer, box=box)


def make_scene(*named: tuple[str, Box], size: tuple[int, int] = (200, 100)) -> ObjectScene:
    """Build a scene on white."""
    width, height = size
    picture = Composite(width=width, height=height, ground=Ground(rgb=(255, 255, 255)))
    return ObjectScene(picture=picture, objects=tuple(thing(name, box) for name, box in named))


def sample_many(sampler: QuestionSampler, scene: ObjectScene, count: int) -> Iterator[Candidate]:
    """Yield the candidates of several attempts."""
    rng = Random(str([one.box for one in scene.objects]))
    for _ in range(count):
        candidate = sampler(rng, scene)
        if candidate is not None:
            yield candidate
