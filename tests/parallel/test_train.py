"""Whole training runs: with torchrun's environment, and ended by signals; in own processes."""

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
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import DistributedContext, init_distributed, is_main_process
from qwen2vl.recipes import tiny
from qwen2vl.train import checkpoint, loop
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.evaluate import Evaluator
from tests.parallel.process_pool import FORKSERVER, ProcessPool

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))

SHORT = [
    "num_workers=0",
    "num_threads=1",
    "dtype=float32",
    "optim.name=adamw",
    "optim.eps=1e-3",
] + [f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "global_batch_size=4")]


def config(out: Path, *overrides: str) -> TrainConfig:
    return override(tiny.recipe(), [*SHORT, f"output_dir={out}", *overrides])


def run_recipe(out: Path, *overrides: str) -> str:
    run_config = config(out, *overrides, "evaluation.eval_steps=4", "evaluation.num_examples=4")
    return str(loop.train(run_config, evaluate=Evaluator(run_config)))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    return [] if value is None else [value]


def weights(path: Path) -> dict[str, Tensor]:
    shapes = {n: s for n, s in checkpoint.tensor_shapes(path).items() if "|" not in n}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    checkpoint.load_tensors(path, tensors, SINGLE_PROCESS)
    return tensors


def test_two_ranks_train_the_same_weights_as_one_process(
    process_pool: ProcessPool, tmp_path: Path
) -> None:
    sharded = tmp_path / "several"
    overrides = (
        "logging_steps=2",
        "mesh.frozen=replicate",
        "activation_checkpointing.text=selective",
    )
    folders = process_pool.run(2, run_recipe, sharded, *overrides)
    assert folders == [str(sharded / "model-000008")] * 2
    single = tmp_path / "alone"
    run_recipe(single, "gradient_accumulation_steps=2", "logging_steps=2")
    single_weights, sharded_weights = (
        weights(folder / "step-000008") for folder in (single, sharded)
    )
    assert single_weights.keys() == sharded_weights.keys()
    for name, tensor in single_weights.items():
        torch.testing.assert_close(sharded_weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for sharded_line, single_line in zip(read_metrics(sharded), read_metrics(single), strict=True):
        for key in ("step", "loss", "grad_norm", "held_out"):
            assert _numbers(sharded_line.get(key)) == pytest.approx(
                _numbers(single_line.get(key)), rel=1e-5, abs=1e-5
            )
    # One process resumes the run of two ranks.
    longer = ("stages.3.steps=4",)
    state = sharded / "step-000008" / "state.json"
    content = json.loads(state.read_text())
    content["config"]["stages"][3]["steps"] = 4
    state.write_text(json.dumps(content))
    assert loop.train(config(sharded, *longer)).name == "model-000010"


def test_stages_that_freeze_and_unfreeze_run_in_bfloat16(
    process_pool: ProcessPool, tmp_path: Path
) -> None:
    overrides = ("dtype=bfloat16", "logging_steps=1", "optim.name=muon")
    process_pool.run(2, run_recipe, tmp_path / "several", *overrides, "mesh.dp_replicate=2")
    run_recipe(tmp_path / "alone", *overrides)
    single_weights, sharded_weights = (
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("alone", "several")
    )
    assert len(single_weights) == 8
    assert sharded_weights == pytest.approx(single_weights, rel=2e-2)


def command(*overrides: str) -> None:
    os.environ.pop("RANK", None)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        main(list(overrides))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_saves_a_checkpoint_before_the_run_ends(
    tmp_path: Path, name: str, code: int
) -> None:
    overrides = [
        "train",
        "tiny",
        *SHORT,
        f"output_dir={tmp_path}",
        "logging_steps=1",
        "stages.0.steps=9999",
    ]
    overrides[overrides.index("num_workers=0")] = "num_workers=1"
    process = FORKSERVER.Process(target=command, args=tuple(overrides))
    process.start()
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid or 0, getattr(signal, name))
    process.join(180)  # on a busy machine
    exit_code = process.exitcode
    process.kill()
    assert exit_code == code
    path = checkpoint.latest_checkpoint(tmp_path)
    assert path is not None
    checkpoint.verify(path, SINGLE_PROCESS)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert path.name == f"step-{steps[-1]:06d}"  # its last step


def test_a_signal_interrupts_data_measurement_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal was not delivered")

    monkeypatch.setattr(PackedDataset, "open", measure)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.train(config(tmp_path, "stages.0.data=none.jsonl"))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_a_single_process_does_not_initialize_torch_distributed(tmp_path: Path) -> None:
    with init_distributed("cpu") as distributed:
        assert distributed.mesh is None
        assert not torch.distributed.is_initialized()
        assert distributed.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
    assert is_main_process()


def test_a_world_size_that_dp_replicate_does_not_divide_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        pytest.raises(
            ConfigError,
            match=r"mesh.dp_replicate=2: 1 ranks cannot be divided into that many replicas; give",
        ),
        init_distributed("cpu", dp_replicate=2),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "4")
    with (
        pytest.raises(ConfigError, match=r"mesh.dp_replicate=3: 4 ranks"),
        init_distributed("cpu", dp_replicate=3),
    ):
        pass


def test_more_batches_than_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"stage words: global_batch_size is 4, .* for 5 batches .*; raise it to 5",
    ):
        loop.train(config(tmp_path, "gradient_accumulation_steps=5"))


def test_rules_that_freeze_every_parameter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage see: its rules freeze every parameter"):
        loop.train(config(tmp_path, 'stages.1.rules=[[".*",0.0]]'))


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    for folder, overrides in (("one", ()), ("four", ("gradient_accumulation_steps=4",))):
        loop.train(config(tmp_path / folder, *overrides))
    single_weights, four = (
        weights(tmp_path / folder / "step-000008") for folder in ("one", "four")
    )
    for name, tensor in single_weights.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
