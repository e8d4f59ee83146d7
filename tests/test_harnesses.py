"""The task folder for lmms-eval, the comparison of samples, and the pins of the environments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from qwen2vl.eval.mini import build_task
from qwen2vl.synth import fonts

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PARTS = ("find", "motion", "shapes")

# Folder of benchmarks/harness_install.py lmms-eval, for the slow test.
ENVIRONMENT = os.environ.get("QWEN2VL_LMMS_EVAL", "")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert import_module("lmms_eval_export").export(tmp_path, PARTS, 3) == dict.fromkeys(PARTS, 3)
    return tmp_path


class Loader(yaml.SafeLoader):
    """Reads `!function NAME` as a string."""


Loader.add_constructor("!function", lambda loader, node: f"!{loader.construct_scalar(node)}")  # type: ignore[arg-type]


def load_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def load_utils(folder: Path) -> ModuleType:
    spec = util.spec_from_file_location("exported_utils", folder / "utils.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(folder: Path, part: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{part}.parquet").to_pylist()


def test_the_group_lists_the_tasks(folder: Path) -> None:
    group = load_yaml(folder / "qwen2vl_mini.yaml")
    assert group == {"group": "qwen2vl_mini", "task": [f"qwen2vl_mini_{part}" for part in PARTS]}


@pytest.mark.parametrize("part", PARTS)
def test_a_task_names_its_data_and_functions(folder: Path, part: str) -> None:
    task = load_yaml(folder / f"{part}.yaml")
    assert task["task"] == f"qwen2vl_mini_{part}"
    assert task["dataset_path"] == "parquet"
    parquet = task["dataset_kwargs"]["data_files"][task["test_split"]]
    assert Path(parquet) == folder / f"{part}.parquet"
    assert task["generation_kwargs"] == {"max_new_tokens": 64, "temperature": 0}
    utils = load_utils(folder)
    functions = [value for value in task.values() if str(value).startswith("!utils.")]
    assert len(functions) == 3
    assert all(callable(getattr(utils, name.removeprefix("!utils."))) for name in functions)


def test_pictures_are_the_pixels_of_the_suite(folder: Path) -> None:
    utils, task = load_utils(folder), build_task("find")
    for doc, case in zip(rows(folder, "find"), task.examples()[:3], strict=True):
        image, text = task.prompt(case)[0]["content"]
        (found,) = utils.doc_to_visual(doc)
        assert isinstance(found, Image.Image)
        assert np.array_equal(np.asarray(found), image["image"])
        assert utils.doc_to_text(doc) == text["text"]


def test_clips_are_the_frames_of_the_suite_at_two_a_second(folder: Path) -> None:
    utils, task = load_utils(folder), build_task("motion")
    for doc, case in zip(rows(folder, "motion"), task.examples()[:3], strict=True):
        (name,) = utils.doc_to_visual(doc)
        with av.open(name) as file:
            assert file.streams.video[0].average_rate == 2
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert np.array_equal(np.stack(frames), task.prompt(case)[0]["content"][0]["video"])


@pytest.mark.parametrize("part", PARTS)
def test_right_answers_score_one(folder: Path, part: str) -> None:
    utils = load_utils(folder)
    for doc in rows(folder, part):
        assert utils.process_results(doc, [doc["answer"]]) == {"accuracy": 1.0}
        assert utils.process_results(doc, [""]) == {"accuracy": 0.0}


def test_all_packages_of_missing_fonts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled = {file for files in fonts.files_of("bundled") for file in files}
    installed = {file: path for file, path in fonts._installed().items() if file in bundled}
    monkeypatch.setattr(fonts, "_installed", lambda: installed)
    for cached in (fonts.files_of, fonts.glyphs):
        cached.cache_clear()
    export = import_module("lmms_eval_export")
    counts = export.export(tmp_path, ["text"], 40)
    fonts.files_of.cache_clear()
    assert 0 < counts["text"] < 40, "those in bundled fonts are kept"
    error = capsys.readouterr().err
    assert error.startswith(f"text: {40 - counts['text']} of 40 questions are left out: fonts: ")
    bundled_packages = {package for package, _ in fonts.BUNDLED_FAMILIES.values()}
    packages = [one for one in fonts.JUDGE_PACKAGES if one not in bundled_packages]
    assert f"apt-get install {' '.join(packages)}\n" in error


def test_text_has_character_errors(tmp_path: Path) -> None:
    export = import_module("lmms_eval_export")
    if not export.export(tmp_path, ["text"], 20):
        pytest.skip("no font of the held-out lines is installed")
    metrics = load_yaml(tmp_path / "text.yaml")["metric_list"]
    assert [one["metric"] for one in metrics] == ["accuracy", "character_error_rate"]
    utils, doc = load_utils(tmp_path), rows(tmp_path, "text")[0]
    found = utils.process_results(doc, [doc["answer"] + "x"])
    assert found == {"accuracy": 0.0, "character_error_rate": (1, len(doc["answer"]))}
    assert utils.character_error_rate([(1, 4), (0, 6)]) == 0.1


def test_the_task_folder_needs_this_package_only(folder: Path) -> None:
    """lmms-eval imports utils.py in its own environment, elsewhere."""
    code = "import utils; print(utils.doc_to_text({'question': 'Where?'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "Where?\n", done.stderr


def write_samples(folder: Path, *samples: tuple[int, str, int | None, float]) -> Path:
    lines = [
        json.dumps(
            {
                "doc_id": number,
                "filtered_resps": text,
                "token_counts": [
                    None if tokens is None else {"input_tokens": 5, "output_tokens": tokens}
                ],
                "accuracy": accuracy,
            }
        )
        for number, text, tokens, accuracy in samples
    ]
    folder.mkdir()
    (folder / "1_samples_task.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_samples_are_compared_item_by_item(tmp_path: Path) -> None:
    module = import_module("harness.samples")
    failed = "[LMMS_EVAL_REQUEST_FAILED after 1 retries] refused"
    one = write_samples(tmp_path / "1", (0, "a", 1, 1.0), (1, "b", 2, 0.0), (2, failed, None, 0.0))
    two = write_samples(tmp_path / "2", (1, "b", 3, 1.0), (0, "a", 1, 1.0), (3, "d", 1, 1.0))
    first, second = (module.read_samples(one, {"p": "task"})["p"] for one in (one, two))
    found = module.compare(first, second)
    assert (found.items, found.equal, found.equal_usage, found.equal_score) == (4, 2, 1, 1)
    assert (found.sentinels, found.without_usage, found.different) == (1, 1, (2, 3))


def test_missing_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="0 files of samples of task, must be 1"):
        import_module("harness.samples").read_samples(tmp_path, {"p": "task"})


def test_excluded_pins_are_left_out() -> None:
    module = import_module("harness_install")
    lines = ["# a comment", "torch==2.13.0", "av==18.1.0", "protobuf==7.36.2", "avro==1"]
    harness = module.HARNESSES["lmms-eval"]
    assert module.allowed_pins(lines, harness) == ["# a comment", "torch==2.13.0", "avro==1"]
    assert module.find_pin("torch", lines) == "torch==2.13.0"


def test_exclusions_name_pins_that_exist() -> None:
    module = import_module("harness_install")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for harness in module.HARNESSES.values():
        for package in harness.exclusions:
            assert module.find_pin(package, lines).startswith(f"{package}==")


def test_the_check_of_the_guide_finds_both_layouts(tmp_path: Path) -> None:
    """lmms-eval writes into a folder named after the model, or into OUT itself without a name."""
    text = (ROOT / "docs/guides/lmms-eval.md").read_text(encoding="utf-8")
    (command,) = re.findall("^grep .*$", text, re.M)
    out = tmp_path / "out"
    failed = "[LMMS_EVAL_REQUEST_FAILED after 3 retries] refused"
    write_samples(out, (0, "a", 1, 1.0))
    write_samples(
        out / "qwen2-vl", (0, failed, None, 0.0), (1, "b", 1, 1.0), (2, failed, None, 0.0)
    )
    (out / "1_results.json").write_text(failed)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == [
        "out/1_samples_task.jsonl:0",
        "out/qwen2-vl/1_samples_task.jsonl:2",
    ]


@pytest.mark.slow
def test_lmms_eval_gives_the_same_answers_through_both_routes() -> None:
    if not ENVIRONMENT:
        pytest.skip("QWEN2VL_LMMS_EVAL names no environment of benchmarks/harness_install.py")
    command = [sys.executable, str(BENCHMARKS / "lmms_eval_parity.py"), ENVIRONMENT, "--limit", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total = json.loads(done.stdout)["numbers"]["total"]
    assert total["sentinels"] == total["without_usage"] == 0
    equal = ("equal", "equal_usage", "equal_score", "equal_to_llm")
    assert {total[name] for name in equal} == {total["items"]}
