"""Whole runs: by torchrun's environment, and ended by signals; in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.cli.main import main
from qwen2vl.data.dataset import Corpus
from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import Ranks, is_first, join
from qwen2vl.recipes import tiny
from qwen2vl.train import checkpoint, loop
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.evaluate import HeldOut
from tests.parallel.gang import FORKS, Gang

ONE = Ranks(torch.device("cpu"))

SHORT = ["workers=0", "threads=1", "dtype=float32", "optim.method=adamw", "optim.eps=1e-3"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "examples=4")
]


def config(out: Path, *words: str) -> TrainConfig:
    return override(tiny.recipe(), [*SHORT, f"out={out}", *words])


def run_recipe(out: Path, *words: str) -> str:
    asked = config(out, *words, "probe.every=4", "probe.examples=4")
    return str(loop.train(asked, probe=HeldOut(asked)))


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    return [] if value is None else [value]


def weights(path: Path) -> dict[str, Tensor]:
    shapes = {n: s for n, s in checkpoint.shapes(path).items() if "|" not in n}
    found = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.read(path, found, ONE)
    return found


def test_two_ranks_train_what_one_process_does(gang: Gang, tmp_path: Path) -> None:
    several = tmp_path / "several"
    words = ("log_every=2", "mesh.frozen=replicate", "recompute.text=selective")
    folders = gang.run(2, run_recipe, several, *words)
    assert folders == [str(several / "model-000008")] * 2
    alone = tmp_path / "alone"
    run_recipe(alone, "accumulate=2", "log_every=2")
    one, two = (weights(folder / "step-000008") for folder in (alone, several))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for mine, theirs in zip(told(several), told(alone), strict=True):
        for key in ("step", "loss", "grad_norm", "held_out"):
            assert _numbers(mine.get(key)) == pytest.approx(
                _numbers(theirs.get(key)), rel=1e-5, abs=1e-5
            )
    # What two ranks began, one goes on with.
    longer = ("stages.3.steps=4",)
    state = several / "step-000008" / "state.json"
    content = json.loads(state.read_text())
    content["config"]["stages"][3]["steps"] = 4
    state.write_text(json.dumps(content))
    assert loop.train(config(several, *longer)).name == "model-000010"


def test_stages_that_freeze_and_free_go_through_in_bfloat16(gang: Gang, tmp_path: Path) -> None:
    words = ("dtype=bfloat16", "log_every=1", "optim.method=muon")
    gang.run(2, run_recipe, tmp_path / "several", *words, "mesh.replicate=2")
    run_recipe(tmp_path / "alone", *words)
    one, two = (
        [line["loss"] for line in told(tmp_path / name) if "loss" in line]
        for name in ("alone", "several")
    )
    assert len(one) == 8
    assert two == pytest.approx(one, rel=2e-2)


def command(*words: str) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        main(list(words))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_saves_before_it_ends_the_run(tmp_path: Path, name: str, code: int) -> None:
    words = ["train", "tiny", *SHORT, f"out={tmp_path}", "log_every=1", "stages.0.steps=9999"]
    words[words.index("workers=0")] = "workers=1"
    process = FORKS.Process(target=command, args=tuple(words))
    process.start()
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid or 0, getattr(signal, name))
    process.join(180)  # on a machine that is busy with others
    ended = process.exitcode
    process.kill()
    assert ended == code
    path = checkpoint.latest(tmp_path)
    assert path is not None
    checkpoint.verify(path, ONE)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert path.name == f"step-{steps[-1]:06d}"  # the last step it took, and no other


def test_measuring_is_interrupted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal was not heard")

    monkeypatch.setattr(Corpus, "open", measure)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(tmp_path, "stages.0.data=none.jsonl"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.latest(tmp_path) is None


def test_one_process_never_starts_torch_distributed(tmp_path: Path) -> None:
    with join("cpu") as ranks:
        assert ranks.mesh is None
        assert not torch.distributed.is_initialized()
        assert ranks.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert is_first()


def test_ranks_that_cannot_be_parted_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match=r"mesh.replicate=2: 1 ranks cannot be parted so; give a"),
        join("cpu", replicate=2),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"mesh.replicate=3: 4 ranks"), join("cpu", replicate=3):
        pass


def test_more_batches_than_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage words: 4 examples .* 1 ranks x 5 batches; raise"):
        loop.train(config(tmp_path, "accumulate=5"))


def test_rules_that_freeze_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage see: its rules freeze every parameter"):
        loop.train(config(tmp_path, 'stages.1.rules=[[".*",0.0]]'))


def test_accumulating_is_one_large_batch(tmp_path: Path) -> None:
    for folder, words in (("one", ()), ("four", ("accumulate=4",))):
        loop.train(config(tmp_path / folder, *words))
    one, four = (weights(tmp_path / folder / "step-000008") for folder in ("one", "four"))
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
