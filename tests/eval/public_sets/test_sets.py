"""Rows of every public set: items, prompts, and scores of right, empty and shuffled answers."""

from __future__ import annotations

import csv
from math import isnan
from pathlib import Path
from random import Random

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics.scores import Style
from qwen2vl.eval.public_sets import (
    SETS,
    PublicItem,
    read_parquet_rows,
    read_tsv_rows,
    score_item,
    score_set,
)
from qwen2vl.eval.public_sets.tsv_sets import tsv_parser
from qwen2vl.processor.messages import parse_messages
from tests.eval.public_sets.rows import LAB_ROWS, TSV_ROWS, draw_image, encode_base64

STYLES: tuple[Style, ...] = ("lmms", "vlmevalkit", "strict")
BEST = {"mme": 200, "ocrbench": 2}  # in place of 100, of the drawn rows

UNREADABLE = {("refcoco_val", "lmms"), ("RefCOCO", "lmms")}  # "box_units"


def lab_items(name: str, media: Path = Path("media")) -> list[PublicItem]:
    """Parse the drawn rows of a set in lmms-lab's columns."""
    return [item for row in LAB_ROWS[name][0] for item in SETS[name].parse(row, media)]


def tsv_items(name: str, folder: Path) -> list[PublicItem]:
    """Write the drawn rows of a TSV file, read it and parse it."""
    rows = [
        {"index": str(i), "image": encode_base64(), **row}
        for i, row in enumerate(TSV_ROWS[name][0])
    ]
    path = folder / f"{name}.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        names = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, names, dialect="excel-tab", restval="")
        writer.writeheader()
        writer.writerows(rows)
    parse = tsv_parser(path.name)
    return [item for row in read_tsv_rows(path) for item in parse(row, folder)]


def test_every_set_has_drawn_rows() -> None:
    same = {
        **{name: name for name in LAB_ROWS},
        "docvqa_test": "docvqa_val",
        "infovqa_test": "infovqa_val",
        "mmbench_en_test": "mmbench_en_dev",
        "mmbench_cn_test": "mmbench_cn_dev",
        "mmt_test": "mmt_val",
    }
    same |= {name: "refcoco_val" for name in SETS if name.startswith("refcoco")}
    assert same.keys() == SETS.keys()
    assert all(SETS[name].parse is SETS[other].parse for name, other in same.items())
    assert {n for n, s in SETS.items() if s.is_scored_by_server} == {
        name for name in SETS if name.endswith("_test") and not name.startswith("refcoco")
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", LAB_ROWS)
def test_right_answers_score_all_and_empty_ones_nothing(name: str, style: Style) -> None:
    items, answers = lab_items(name), LAB_ROWS[name][1]
    assert len(items) == len(answers)
    score = score_set(items, answers, style=style)
    if (name, style) not in UNREADABLE:
        assert score["score"] == pytest.approx(BEST.get(name, 100))
        assert score["parse_rate"] == 1
    assert score["count"] == len(items)
    empty = score_set(items, [""] * len(items), style=style)
    if name != "hallusion_bench_image" or style != "lmms":  # "hallusion_default": empty is no
        assert empty["score"] == empty["parse_rate"] == 0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TSV_ROWS)
def test_rows_of_tsv_files(name: str, style: Style, tmp_path: Path) -> None:
    items, answers = tsv_items(name, tmp_path), TSV_ROWS[name][1]
    score = score_set(items, answers, style=style)
    if (name, style) not in UNREADABLE:
        assert score["score"] == pytest.approx({"MME": 200, "OCRBench": 1}.get(name, 100))
    assert all(isinstance(i.messages[0]["content"][0]["image"], bytes) for i in items)


@pytest.mark.parametrize("name", LAB_ROWS)
def test_messages_are_those_of_the_processor(name: str) -> None:
    for item in lab_items(name):
        (message,) = parse_messages(item.messages)
        text = "".join(getattr(part, "text", "") for part in message.parts)
        assert len(message.parts) >= 2, "media and text"
        assert text.strip() == text.strip("\n ") and "nan" not in text


@pytest.mark.parametrize("name", LAB_ROWS)
def test_the_order_of_items_has_no_effect(name: str) -> None:
    items, answers = lab_items(name), LAB_ROWS[name][1]
    pairs = list(zip(items, answers, strict=True))
    Random(0).shuffle(pairs)
    shuffled = score_set([i for i, _ in pairs], [a for _, a in pairs], style="strict")
    assert shuffled == pytest.approx(score_set(items, answers, style="strict"), nan_ok=True)


def test_one_wrong_rotation_makes_a_question_wrong() -> None:
    items = lab_items("mmbench_en_dev")
    assert score_set(items, ["A", "A"], style="strict")["score"] == 0
    assert score_item(items[0], "A", style="strict").value == 1


def test_groups_are_scored() -> None:
    score = score_set(lab_items("chartqa"), ["12", "no"], style="lmms")
    assert (score["human_test"], score["augmented_test"], score["score"]) == (100, 0, 50)
    assert score["low"] < 50 < score["high"]


def test_images_of_mmmu_stand_where_they_are_named() -> None:
    content = lab_items("mmmu_val")[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image", "text", "image", "text"]
    assert content[1]["image"] != content[3]["image"]
    assert content[-1]["text"].startswith(".\nA. same\nB. other\n\nAnswer with")


def test_clips_and_subtitles_lie_in_a_folder(tmp_path: Path) -> None:
    item = lab_items("mvbench", tmp_path)[0]
    assert item.messages[0]["content"][0]["video"] == str(tmp_path / "perception/videos/clip.mp4")
    (tmp_path / "subtitle").mkdir()
    block = '1\n00:00:01,000 --> 00:00:02,000\n<font color="white">hello</font>\nthere\n'
    (tmp_path / "subtitle" / "clip.srt").write_text(f"{block}\n{block}", encoding="utf-8")
    text = lab_items("videomme_w_subtitle", tmp_path)[0].messages[0]["content"][1]["text"]
    assert text.startswith("This video's subtitles are listed below: \nhello")
    absent = lab_items("videomme_w_subtitle", tmp_path / "absent")[0].messages[0]["content"][1]
    assert "No subtitles available" in absent["text"]


def test_test_splits_have_no_references() -> None:
    row = {**LAB_ROWS["docvqa_val"][0][0], "answers": None}
    (item,) = SETS["docvqa_test"].parse(row, Path())
    assert item.answers == ()
    with pytest.raises(InputError, match="scored by its authors' server"):
        score_item(item, "1993", style="lmms")


def test_an_empty_set_has_no_score() -> None:
    score = score_set([], [], style="strict")
    assert isnan(score["score"]) and isnan(score["parse_rate"]) and score["count"] == 0


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, answers = LAB_ROWS["chartqa"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    read = list(read_parquet_rows(tmp_path / "test.parquet", task_type="x"))
    assert read == [{**row, "task_type": "x"} for row in rows]
    items = [item for row in read for item in SETS["chartqa"].parse(row, tmp_path)]
    assert score_set(items, answers, style="lmms")["score"] == 100


def test_an_image_as_an_object() -> None:
    from io import BytesIO

    from PIL import Image

    image = Image.open(BytesIO(draw_image()["bytes"]))
    row = {**LAB_ROWS["refcoco_val"][0][0], "image": image}
    item = SETS["refcoco_val"].parse(row, Path())[0]
    assert item.details == {"box": (8.0, 8.0, 24.0, 24.0), "size": (48, 64)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("chartqa", {"question": None}, None),
        ("mtvqa", {"qa_pairs": "__import__('os')"}, "qa_pairs cannot be read"),
        ("ocrbench", {"image": {"bytes": None, "path": None}}, "needs bytes or a path"),
        ("refcoco_val", {"image": {"bytes": b"x", "path": ""}}, "cannot be read"),
    ],
)
def test_broken_rows(name: str, change: dict[str, object], message: str | None) -> None:
    row = {**LAB_ROWS[name][0][0], **change}
    if message is None:
        del row["question"]
        message = "has no column 'question'"
    with pytest.raises(InputError, match=message):
        SETS[name].parse(row, Path())


def test_numbers_of_answers_and_metrics_must_fit() -> None:
    items = [*lab_items("ai2d"), *lab_items("mtvqa")]
    with pytest.raises(InputError, match="1 answers to 3 items"):
        score_set(items, ["A"], style="strict")
    with pytest.raises(InputError, match="one metric, got ai2d, mtvqa"):
        score_set(items, ["A"] * 3, style="strict")
