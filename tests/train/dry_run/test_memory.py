"""What is predicted of a rank's memory against the tensors that a run really has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import lora, nano, tiny
from qwen2vl.train.adapter import put_adapter
from qwen2vl.train.config import MeshConfig, OptimConfig, RecomputeConfig, TrainConfig
from qwen2vl.train.dry_run.activation_memory import Shape
from qwen2vl.train.dry_run.memory import Memory, Stored, memory_of_step, stored_bytes
from tests.parallel import jobs
from tests.parallel.jobs import TEXT, Case
from tests.tiny import tiny_config

SMALL = Shape((16, 24), (24, 24), 10)


def predicted(config: TrainConfig, batch: Shape = SMALL) -> Memory:
    return memory_of_step(config, tiny_config(), config.stages[0], batch)


def stored(config: TrainConfig, ranks: int = 1) -> Stored:
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    if config.adapter is not None:
        put_adapter(model, config.adapter, 0)
    return stored_bytes(config, model, config.stages[0], ranks=ranks)


def of_case(case: Case) -> TrainConfig:
    return replace(
        jobs.run_config(case, "unused"), mesh=MeshConfig(replicate=case.replicate), dtype="float32"
    )


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measured(case: Case, ranks: Ranks) -> dict[str, int]:
    """Take a step, and add up this rank's own tensors."""
    run = jobs.make(case, ranks)
    run.begin_stage()
    found = {"weights": sum(local(p).nbytes for p in run.model.parameters())}
    assert run.optimizers is not None
    clip = run.optimizers.clip

    def look() -> torch.Tensor:
        own = [p.grad for p in run.model.parameters() if p.grad is not None]
        found["gradients"] = sum(local(g).nbytes for g in own)
        return clip()

    run.optimizers.clip = look
    jobs.step(run, case, 0, jobs.Result())
    found["moments"] = sum(local(t).nbytes for t in run.optimizers.state().values())
    return found


METHODS = ("adamw", "muon", "sgd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rules", [nano.ALL, nano.ANSWER], ids=["all", "answer"])
def test_weights_moments_and_gradients_are_those_of_a_run(method: Any, rules: Any) -> None:
    shares = (((TEXT,),),)
    case = Case(shares=shares, optim=OptimConfig(method=method), rules=rules, dtype="float32")
    told = stored(of_case(case))
    found = measured(case, Ranks(torch.device("cpu")))
    assert {name: getattr(told, name) for name in found} == found
    assert told.gathered == 0


def test_adapters_and_what_moves_decide_what_is_remembered() -> None:
    whole = stored(tiny.recipe())
    config = replace(
        lora.recipe(), device="cpu", adapter=LoraConfig(rank=4, quantize_base="nf4_double")
    )
    adapted = stored(config)
    # Factors of rank 4, and seven layers a block in 4 bits instead of 32.
    assert adapted.weights < whole.weights
    assert adapted.moments < whole.moments / 4
    assert adapted.gradients < whole.gradients / 4


def test_copies_have_the_parts_of_fewer_ranks() -> None:
    config = tiny.recipe()
    copies = stored(replace(config, mesh=MeshConfig(replicate=2)), ranks=4)
    assert copies.weights == stored(config, ranks=2).weights > stored(config, ranks=4).weights


def test_the_frozen_whole_are_kept_in_bfloat16() -> None:
    config = tiny.recipe()
    stage = replace(config.stages[0], rules=nano.ANSWER)
    config = replace(config, stages=(stage,))
    sharded = stored(config, ranks=8)
    kept = stored(replace(config, mesh=MeshConfig(frozen="replicate")), ranks=8)
    assert kept.weights > sharded.weights
    assert kept.gathered < sharded.gathered


def test_recomputing_and_accumulating_change_the_peak() -> None:
    config = replace(tiny.recipe(), optim=OptimConfig(method="adamw"))
    large = Shape((64,) * 16, (64,) * 16, 500)
    plain = predicted(config, large)
    asked = RecomputeConfig(visual="block", text="block", every=2)
    again = predicted(replace(config, recompute=asked, accumulate=2), large)
    assert again.activations < plain.activations
    assert again.weights == plain.weights
    assert again.peak < plain.peak
    assert plain.weights + plain.moments + plain.activations < plain.peak


def test_what_cannot_be_is_told() -> None:
    config = replace(lora.recipe(), device="cpu", adapter=LoraConfig(targets=("model.eyes",)))
    with pytest.raises(ConfigError, match=r"adapter.targets: 'model.eyes' matches no linear layer"):
        predicted(config)
    stage = replace(tiny.recipe().stages[0], rules=(("none", 1.0), (".*", 0.0)))
    with pytest.raises(ConfigError, match="rules that match no parameter: none"):
        predicted(replace(tiny.recipe(), stages=(stage,)))
