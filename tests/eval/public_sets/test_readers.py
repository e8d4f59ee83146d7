"""Readers of TSV, parquet and JSON files: shared images, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.public_sets import read_json_rows, read_parquet_rows, read_tsv_rows
from qwen2vl.eval.public_sets.tsv_sets import tsv_parser
from tests.eval.public_sets.rows import encode_base64


def write_tsv(folder: Path, *rows: str) -> Path:
    """Write a TSV file with the columns of VLMEvalKit."""
    path = folder / "MMStar.tsv"
    path.write_text("\n".join(["index\timage\tquestion", *rows, ""]), encoding="utf-8")
    return path


def test_an_image_may_be_that_of_another_row(tmp_path: Path) -> None:
    image = encode_base64()
    path = write_tsv(tmp_path, f"1\t{image}\tWhich?", "1000001\t1\tWhich?")
    assert [row["image"] for row in read_tsv_rows(path)] == [image, image]
    with pytest.raises(InputError, match="row 7: its image is that of row 9, which has not come"):
        list(read_tsv_rows(write_tsv(tmp_path, "7\t9\tWhich?")))


def test_several_images_of_a_row(tmp_path: Path) -> None:
    listed = repr([encode_base64("red"), encode_base64("blue")])
    (row,) = read_tsv_rows(write_tsv(tmp_path, f"1\t{listed}\tWhich?"))
    (item,) = tsv_parser("MMStar.tsv")(row, tmp_path)
    assert [part["type"] for part in item.messages[0]["content"]] == ["image", "image", "text"]


def test_json_files_and_lines(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4"}, {"video": "b.mp4"}]
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "lines.jsonl").write_text(f"{lines}\n", encoding="utf-8")
    for name in ("list.json", "lines.jsonl"):
        found = list(read_json_rows(tmp_path / name, task_type="action_count"))
        assert found == [{**row, "task_type": "action_count"} for row in rows]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\xff\xfe not a table")
    for read in (read_tsv_rows, read_parquet_rows, read_json_rows):
        for path in (broken, tmp_path / "absent"):
            with pytest.raises(InputError, match="cannot be read"):
                list(read(path))


def test_unknown_files_and_broken_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Other\.tsv: unknown set; known are AI2D"):
        tsv_parser("Other.tsv")
    row = {"index": "3", "image": "no base64!", "question": "Which?"}
    with pytest.raises(InputError, match="row 3: the image is no base64"):
        tsv_parser("MMStar.tsv")(row, tmp_path)
