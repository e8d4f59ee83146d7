"""`export`: the model of any checkpoint, as an ordinary folder; and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Run

SHORT = ["workers=0", "threads=1", "out=here", "save_every=3", "keep=9"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "examples=4")
]


def test_any_step_becomes_a_folder_that_answers(run: Run) -> None:
    assert run("train", "tiny", *SHORT).exit_code == 0
    assert sorted(p.name for p in Path("here").glob("step-*")) == [
        "step-000003",
        "step-000006",
        "step-000008",
    ]
    last = run("export", "here", "-o", "last")
    assert last.stdout.splitlines()[0] == f"model: last (of {Path('here/step-000008')})"
    assert run("export", "here/step-000003", "-o", "third").exit_code == 0
    given, trained = (
        load_file(Path(p) / "model.safetensors") for p in ("last", "here/model-000008")
    )
    assert all(torch.equal(tensor, trained[name]) for name, tensor in given.items())
    third = load_file("third/model.safetensors")
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in third.items())
    answer = run("ask", "--model", "third", "Hi", "--max-tokens", 2)
    assert answer.exit_code == 0, answer.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere", "-o", "new"], "nowhere: neither a checkpoint nor a run's folder with one"),
        (["here", "-o", "no/where"], "there is no folder"),
        (["here", "-o", "."], "exists already"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run: Run, words: list[str], complaint: str) -> None:
    Path("file").touch()
    result = run("export", *words)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert complaint in line
