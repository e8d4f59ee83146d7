"""Suites of one file: header and items, chance levels, blind control, what drawing needs."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.frozen_suite import (
    FrozenHeader,
    FrozenItem,
    FrozenSuite,
    Part,
    write_frozen_suite,
)
from qwen2vl.eval.suites.thresholds import CHANCE, NO_THRESHOLD
from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.compositing import Composite, Ground, Icon, ShapeLayer, Text
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.fonts import FontError
from qwen2vl.synth.spec import Line, Picture, Scene, Shape

RED = (255, 0, 0)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
REFUSALS = ("not visible", "I cannot see that")


def composite(number: int, *layers: Icon | ShapeLayer | Text) -> Composite:
    return Composite(
        width=32, height=24, ground=Ground(rgb=(number, 7, 9)), layers=layers, blur=0.5
    )


def scene(number: int) -> Scene:
    shape = Shape(kind="star", color="red", rgb=RED, box=(1, 2, 21, 22))
    return Scene(width=40, height=30, ground=(number, 200, 200), shapes=(shape,))


def line(text: str, font: str = "Cabin-Bold.otf") -> Line:
    return Line(
        **{"text": text, "font": font, "size": 20, "width": 90, "height": 30, "x": 5, "y": 22},
        ink=BLACK,
        ground=WHITE,
    )


def item(id: str, **changes: Any) -> FrozenItem:
    number = int(id.split("/")[1])
    fields: dict[str, Any] = {
        **{"id": id, "part": id.split("/")[0], "kind": "color", "question": "What color?"},
        **{"answers": ("red",), "pictures": (composite(number),)},
    }
    return FrozenItem(**{**fields, **changes})


def open_suite(folder: Path, items: list[FrozenItem], **changes: Any) -> FrozenSuite:
    parts = changes.pop("parts", {item.part: Part() for item in items})
    header = FrozenHeader(suite="toy", parts=parts, **changes)
    write_frozen_suite(folder / "toy.jsonl", header, items)
    return FrozenSuite(folder / "toy.jsonl")


FULL_HEADER = FrozenHeader(
    suite="toy",
    parts={
        "plain": Part(note="a note"),
        "control": Part(is_control=True, has_blind_control=False),
        "other": Part(compared_with="plain"),
    },
    max_tokens=16,
    max_model_len=4096,
    refusals=REFUSALS,
    held_out={"fonts": ("A", "B"), "patterns": ("color: What color?",)},
)


def test_header_and_items_survive_the_file(tmp_path: Path) -> None:
    text = Text(text="Ünï שלום\u2028", font="culmus/A.ttf", size=9, x=1, y=8)
    items = [
        item("plain/1", answers=("grün", "a\nb"), pictures=(scene(1),)),
        item("plain/2", answers=(), max_pixels=784, pictures=(composite(2, text),)),
        item("control/1", metric="edit_distance", answers=("Tea",), pictures=(line("Tea"),)),
        item("other/1", metric="box_iou", box=(0.1, 0.2, 0.5, 0.75), choices=4),
        item("other/2", clip=True, pictures=(scene(1), scene(2), scene(3))),
    ]
    write_frozen_suite(tmp_path / "toy.jsonl", FULL_HEADER, items)
    suite = FrozenSuite(tmp_path / "toy.jsonl")
    assert suite.header == FULL_HEADER
    assert list(suite.frozen_items) == items
    assert (suite.name, suite.max_tokens, suite.max_model_len) == ("toy", 16, 4096)
    assert suite.parts == ("plain", "control", "other")
    assert suite.blind_parts == ("plain", "other")
    assert list(suite.paired_parts) == [("other", "plain")]


def test_an_item_omits_defaults() -> None:
    assert set(item("plain/1").to_json()) == {
        *("id", "part", "kind", "question", "answers", "pictures")
    }
    assert "answers" not in item("plain/1", answers=()).to_json()


def test_writing_refuses_repeated_ids_and_parts_without_items(tmp_path: Path) -> None:
    header = FrozenHeader(suite="toy", parts={"plain": Part()})
    with pytest.raises(AssertionError, match="unique"):
        write_frozen_suite(tmp_path / "a", header, [item("plain/1"), item("plain/1")])
    for wrong in ([item("other/1")], [], [item("plain/1"), item("other/1")]):
        with pytest.raises(AssertionError, match="every part"):
            write_frozen_suite(tmp_path / "a", header, wrong)
    with pytest.raises(AssertionError, match="refusals are listed"):
        write_frozen_suite(tmp_path / "a", header, [item("plain/1", answers=())])
    assert not (tmp_path / "a").exists()


def test_the_digest_is_that_of_the_file_and_changes_with_it(tmp_path: Path) -> None:
    suite = open_suite(tmp_path, [item("plain/1"), item("plain/2")])
    path = tmp_path / "toy.jsonl"
    assert suite.digest == sha256(path.read_bytes()).hexdigest()
    assert open_suite(tmp_path, [item("plain/1"), item("plain/2")]).digest == suite.digest
    other = open_suite(tmp_path, [item("plain/1"), item("plain/2", answers=("blue",))])
    assert other.digest != suite.digest
    header = open_suite(tmp_path, [item("plain/1"), item("plain/2")], max_tokens=65)
    assert header.digest not in (suite.digest, other.digest)


def test_notes_and_thresholds(tmp_path: Path) -> None:
    items = [item("plain/1"), item("control/1"), item("other/1")]
    write_frozen_suite(tmp_path / "toy.jsonl", FULL_HEADER, items)
    suite = FrozenSuite(tmp_path / "toy.jsonl")
    assert suite.note("plain") == "a note" and "another question" in suite.note("plain", blind=True)
    assert suite.threshold("plain") == NO_THRESHOLD
    assert suite.threshold("control") == suite.threshold("plain", blind=True) == CHANCE


def chances(suite: FrozenSuite) -> dict[str, float]:
    return {item.id: item.chance for item in suite.items(suite.parts)}


def test_chance_is_the_best_constant_answer_within_part_and_kind(tmp_path: Path) -> None:
    suite = open_suite(
        tmp_path,
        [
            item("plain/1"),
            item("plain/2", answers=("red", "crimson")),
            item("plain/3", answers=("blue",)),
            item("plain/4", kind="count", answers=("2", "two")),
            item("other/1", answers=("blue",)),
        ],
    )
    assert chances(suite) == {
        **{"plain/1": 2 / 3, "plain/2": 2 / 3, "plain/3": 2 / 3},
        **{"plain/4": 1.0, "other/1": 1.0},
    }


def test_chance_is_at_least_one_of_the_choices(tmp_path: Path) -> None:
    names = ("red", "blue", "green", "black", "white")
    items = [item(f"plain/{i}", answers=(name,)) for i, name in enumerate(names)]
    few = [item(f"few/{i}", answers=(name,), choices=2) for i, name in enumerate(names)]
    many = [item(f"many/{i}", answers=(name,), choices=50) for i, name in enumerate(names)]
    suite = open_suite(tmp_path, [*items, *few, *many])
    assert [suite.items([p])[0].chance for p in suite.parts] == [0.2, 0.5, 0.2]


def test_chance_of_boxes_is_the_best_of_them_as_a_constant_answer(tmp_path: Path) -> None:
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.4), (0.6, 0.6, 1.0, 1.0), (0.0, 0.8, 0.1, 1.0)]
    suite = open_suite(
        tmp_path,
        [
            item(f"plain/{i}", kind="find", metric="box_iou", box=box, answers=(str(box),))
            for i, box in enumerate(boxes)
        ],
    )
    assert set(chances(suite).values()) == {0.5}
    same = suite.items(["plain"])[1]
    assert score_item(same, SuiteAnswer(text="(0,0),(500,450)")).score == 1


def test_questions_that_the_picture_does_not_answer(tmp_path: Path) -> None:
    items = [item("plain/1"), *(item(f"plain/{i}", answers=()) for i in (2, 3, 4))]
    suite = open_suite(tmp_path, items, refusals=REFUSALS)
    answerable, *others = suite.items(["plain"])
    assert chances(suite)["plain/1"] == 0.75  # a refusal is the best constant answer
    assert answerable.is_answerable and answerable.answers == ("red",)
    assert answerable.refusals == REFUSALS
    for other in others:
        assert not other.is_answerable and other.answers == REFUSALS and other.chance == 0.75
        for answer, score in (("Not visible.", 1), ("i cannot see that", 1), ("red", 0)):
            assert score_item(other, SuiteAnswer(text=answer)).score == score
    assert score_item(answerable, SuiteAnswer(text="Not visible.")).score == 0


def test_the_blind_control_exchanges_pictures_within_kinds(tmp_path: Path) -> None:
    same = composite(9)
    suite = open_suite(
        tmp_path,
        [
            item("plain/1", pictures=(same,)),
            item("plain/2", pictures=(same,)),
            item("plain/3"),
            item("plain/4", kind="count"),
            item("plain/5", kind="count", max_pixels=784),
            item("other/6", kind="count"),
            item("other/7", kind="count"),
        ],
    )
    plain, blind = suite.items(suite.parts), suite.items(suite.parts, blind=True)
    assert [one.id for one in plain] == [one.id for one in blind]
    pictures = [one.media.pictures[0].ground.rgb[0] for one in blind]
    assert pictures == [3, 3, 9, 5, 4, 7, 6]
    for one, exchanged in zip(plain, blind, strict=True):
        assert (one.question, one.answers, one.chance) == (
            *(exchanged.question, exchanged.answers, exchanged.chance),
        )
    assert [one.id for one in suite.items(["other"], blind=True)] == ["other/6", "other/7"]


def content(suite: FrozenSuite, index: int = 0) -> list[dict[str, Any]]:
    (message,) = suite.messages(suite.items(suite.parts)[index])
    assert message["role"] == "user"
    return message["content"]


def test_messages_show_the_pictures_and_ask_the_question(tmp_path: Path) -> None:
    two: tuple[Picture, ...] = (scene(1), line("Tea"))
    suite = open_suite(tmp_path, [item("plain/1", pictures=two)])
    *images, text = content(suite)
    assert text == {"type": "text", "text": "What color?"}
    for shown, picture in zip(images, two, strict=True):
        assert set(shown) == {"type", "image"} and (shown["image"] == draw_image(picture)).all()


def test_a_clip_is_one_video(tmp_path: Path) -> None:
    frames = tuple(scene(number) for number in (1, 2, 3))
    suite = open_suite(tmp_path, [item("plain/1", clip=True, pictures=frames, max_pixels=1568)])
    video, _ = content(suite)
    assert video["type"] == "video" and video["max_pixels"] == 1568
    assert video["video"].shape == (3, 30, 40, 3) and video["video"].dtype == np.uint8
    assert [frame[0, 39, 0] for frame in video["video"]] == [1, 2, 3]


def test_max_pixels_reaches_the_message(tmp_path: Path) -> None:
    suite = open_suite(tmp_path, [item("plain/1", max_pixels=784), item("plain/2")])
    assert content(suite, 0)[0]["max_pixels"] == 784
    assert "max_pixels" not in content(suite, 1)[0]


def test_parts_are_checked_for_what_their_pictures_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path / "datasets"))
    icon = Icon(style="openmoji", name="guitar", box=(0, 0, 9, 9))
    text = Text(text="a", font="culmus/A.ttf", size=9, x=0, y=9)
    suite = open_suite(
        tmp_path,
        [
            item("drawn/1", pictures=(scene(1), line("a"), composite(2))),
            item("icons/1", pictures=(composite(1),)),
            item("icons/2", pictures=(composite(1), composite(1, icon))),
            item("scripts/1", pictures=(composite(1, text),)),
            item("fonts/1", pictures=(line("a", font="NoSuch.ttf"),)),
        ],
    )
    suite.check_part("drawn")
    for part, error, remedy in (
        ("icons", DatasetNotFoundError, "qwen2vl fetch-data named-pictures"),
        ("scripts", DatasetNotFoundError, "qwen2vl fetch-data test-fonts"),
        ("fonts", FontError, r"NoSuch\.ttf"),
    ):
        assert issubclass(error, ConfigError)
        with pytest.raises(error, match=remedy):
            suite.check_part(part)


def test_the_file_is_lines_of_json(tmp_path: Path) -> None:
    open_suite(tmp_path, [item("plain/1"), item("plain/2")])
    rows = [json.loads(row) for row in (tmp_path / "toy.jsonl").read_bytes().splitlines()]
    assert [row.get("id") for row in rows] == [None, "plain/1", "plain/2"]
    assert rows[0]["parts"] == {
        "plain": {
            **{"note": "", "is_control": False, "has_blind_control": True, "compared_with": ""}
        }
    }
