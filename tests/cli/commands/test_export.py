"""`export`: any checkpoint becomes a model folder; and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import Run

SHORT = [
    "num_workers=0",
    "num_threads=1",
    "output_dir=here",
    "save_steps=3",
    "save_total_limit=9",
] + [f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "global_batch_size=4")]


def test_any_checkpoint_is_exported_to_a_working_folder(run: Run) -> None:
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
    ("arguments", "message"),
    [
        (
            ["nowhere", "-o", "new"],
            "nowhere: neither a checkpoint nor a run's folder with one; give",
        ),
        (
            ["run/model-000020", "-o", "new"],
            "model-000020: is no checkpoint; give its run, run, or",
        ),
        (["here", "-o", "no/where"], "there is no folder"),
        (["here", "-o", "."], "exists already"),
    ],
)
def test_errors_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    Path("file").touch()
    for name in ("model-000020", "step-000020"):
        (Path("run") / name).mkdir(parents=True)
    result = run("export", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
