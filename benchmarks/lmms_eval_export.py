"""Write parts of the mini suite as a task folder of lmms-eval, to be used offline.

    python benchmarks/lmms_eval_export.py FOLDER [--part text --part motion] [--limit N]
    python -m lmms_eval ... --include_path FOLDER --tasks qwen2vl_mini

FOLDER gets PART.yaml, PART.parquet, utils.py, media/ with pictures (PNG) and clips (MP4, lossless
RGB, 2 frames a second), and qwen2vl_mini.yaml, the group of all. The YAML files hold the absolute
path of the parquet files: export again instead of moving the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness.suite import MAX_TOKENS
from PIL import Image

from qwen2vl.eval.mini import PARTS, build_task, select_parts
from qwen2vl.eval.synthetic import EvalCase, SyntheticTask
from qwen2vl.synth.fonts import FontError

__all__ = ["DEFAULT_PARTS", "GROUP", "export", "task_name"]

GROUP = "qwen2vl_mini"
DEFAULT_PARTS = ("text", "shapes", "counting", "relations", "find", "motion", "two_pictures")
CLIP_FPS = 2  # at which the processor samples: all frames are taken
UTILS = Path(__file__).resolve().parent / "harness" / "task_utils.py"

# Questions with a box in them: lmms-eval's messages have no place for one, and the tokens of a box
# in text stay plain text.
NOT_EXPORTED = ("name_box", "wrong_name_box")

SCHEMA = pa.schema(
    [
        ("part", pa.string()),
        ("number", pa.int64()),  # of the case within the part
        ("question", pa.string()),
        ("answer", pa.string()),
        ("images", pa.list_(pa.string())),  # files, relative to the folder
        ("video", pa.string()),  # the same; "" without one
    ]
)

TASK_YAML = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: "{parquet}"
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_tokens}
  temperature: 0
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""

CHARACTER_ERROR_YAML = """\
  - metric: character_error_rate
    aggregation: !function utils.character_error_rate
    higher_is_better: false
"""


def export(folder: Path, parts: Sequence[str], limit: int | None = None) -> dict[str, int]:
    """Write the task folder; return part -> number of its questions.

    Questions whose fonts are not installed are left out, with a note on stderr that names the
    packages of all fonts: with them, an export has the same questions everywhere.
    """
    (folder / "media").mkdir(parents=True, exist_ok=True)
    copyfile(UTILS, folder / "utils.py")
    counts = {}
    for part in parts:
        rows = list(_rows(folder, build_task(part), limit))
        if not rows:
            continue
        counts[part] = len(rows)
        parquet = folder.resolve() / f"{part}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), parquet)
        text = TASK_YAML.format(task=task_name(part), parquet=parquet, max_tokens=MAX_TOKENS)
        if PARTS[part].section == "text":
            text += CHARACTER_ERROR_YAML
        (folder / f"{part}.yaml").write_text(text, encoding="utf-8")
    names = "".join(f"  - {task_name(part)}\n" for part in counts)
    group = f"group: {GROUP}\ntask:\n{names}"
    (folder / f"{GROUP}.yaml").write_text(group, encoding="utf-8")
    return counts


def task_name(part: str) -> str:
    """Return the name of a part's task in lmms-eval."""
    return f"{GROUP}_{part}"


def _rows(folder: Path, task: SyntheticTask, limit: int | None) -> Iterator[dict[str, Any]]:
    cases, failures = task.examples()[:limit], []
    for case in cases:
        try:
            yield _row(folder, task, case)
        except FontError as error:
            failures.append(error)
    if failures:
        left_out = f"{len(failures)} of {len(cases)} questions are left out"
        print(f"{task.name}: {left_out}: {_all_missing(task, failures[0])}", file=sys.stderr)


def _all_missing(task: SyntheticTask, failure: FontError) -> FontError:
    """Return the error that names all fonts that a task lacks, not only those of one question."""
    try:
        task.check_fonts()
    except FontError as error:
        return error
    return failure


def _row(folder: Path, task: SyntheticTask, case: EvalCase) -> dict[str, Any]:
    (message,) = task.prompt(case)
    *media, text = message["content"]  # media come first, as in lmms-eval's messages
    images, video = [], ""
    for index, item in enumerate(media):
        name = f"media/{task.name}_{case.name}_{index}"
        if item["type"] == "video":
            video = f"{name}.mp4"
            _write_clip(folder / video, item["video"])
        else:
            images.append(f"{name}.png")
            Image.fromarray(item["image"]).save(folder / images[-1])
    return {
        "part": task.name,
        "number": int(case.name),
        "question": text["text"],
        "answer": case.question.answer,
        "images": images,
        "video": video,
    }


def _write_clip(path: Path, frames_FHWC: np.ndarray) -> None:
    height, width = frames_FHWC.shape[1:3]
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264rgb", rate=CLIP_FPS, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        for frame in frames_FHWC:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def main() -> None:
    """Export, and print the number of questions of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", action="append", help=f"default: {', '.join(DEFAULT_PARTS)}")
    parser.add_argument("--limit", type=int, help="questions of a part")
    given = parser.parse_args()
    parts = select_parts(given.part) if given.part else DEFAULT_PARTS
    if refused := set(parts) & set(NOT_EXPORTED):
        parser.error(f"{', '.join(sorted(refused))}: lmms-eval's messages have no boxes")
    for part, number in export(given.folder, parts, given.limit).items():
        print(f"{task_name(part)}: {number} questions")


if __name__ == "__main__":
    main()
