"""What the tests of documents share: samples of a kind, and the extents of their text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from qwen2vl.synth.compositing.layers import Composite, Text
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.documents import DocumentSample, Fact
from qwen2vl.synth.spec import Box, Mixture

# Fonts of the package, so that the tests need none of the system.
MIXTURE = Mixture(fonts="bundled", max_questions=4)

Kind = Callable[[Random, Mixture], DocumentSample | None]


def samples(kind: Kind, count: int, mixture: Mixture = MIXTURE) -> Iterator[DocumentSample]:
    """Sample documents of a kind."""
    for index in range(count):
        sample = kind(Random(f"tests/{index}"), mixture)
        assert sample is not None
        yield sample


def text_box(layer: Text) -> Box:
    """Return the box that holds the ink of a line, and its advance."""
    left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
    return layer.x + left, layer.y + top, layer.x + right, layer.y + bottom


def overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes share more than a border of two pixels."""
    return (
        min(a[2], b[2]) - max(a[0], b[0]) > 2  # side bearings
        and min(a[3], b[3]) - max(a[1], b[1]) > 1
    )


def assert_text_is_whole(picture: Composite) -> None:
    """Check that no line is cut by the picture's border or covers another one."""
    boxes = [(layer.text, text_box(layer)) for layer in picture.layers if isinstance(layer, Text)]
    for number, (text, box) in enumerate(boxes):
        assert box[0] >= -1 and box[1] >= 0, text
        assert box[2] <= picture.width + 1 and box[3] <= picture.height, text
        for other, other_box in boxes[:number]:
            assert not overlap(box, other_box), (text, other)


def facts_of(sample: DocumentSample, task: str) -> list[Fact]:
    """Return the facts of a task."""
    return [fact for fact in sample.facts if fact.task == task]
