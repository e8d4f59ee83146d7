"""Memory estimator: the estimates of a rank against the tensors of a real run."""

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
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import lora, nano, tiny
from qwen2vl.train.adapter import inject_adapter
from qwen2vl.train.config import ActivationCheckpointingConfig, MeshConfig, OptimConfig, TrainConfig
from qwen2vl.train.dry_run.activation_memory import BatchShape
from qwen2vl.train.dry_run.memory import (
    StaticMemory,
    StepMemory,
    estimate_static_memory,
    estimate_step_memory,
)
from tests.parallel import training_jobs
from tests.parallel.training_jobs import TEXT, Case
from tests.tiny import tiny_config

SMALL = BatchShape((16, 24), (24, 24), 10)


def estimate_step(config: TrainConfig, batch: BatchShape = SMALL) -> StepMemory:
    return estimate_step_memory(config, tiny_config(), config.stages[0], batch)


def estimate_static(config: TrainConfig, world_size: int = 1) -> StaticMemory:
    with torch.device("meta"):
        model = Qwen2VL(tiny_config())
    if config.adapter is not None:
        inject_adapter(model, config.adapter, 0)
    return estimate_static_memory(config, model, config.stages[0], world_size=world_size)


def case_train_config(case: Case) -> TrainConfig:
    return replace(
        training_jobs.case_config(case, "unused"),
        mesh=MeshConfig(dp_replicate=case.dp_replicate),
        dtype="float32",
    )


def local_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def measure_static(case: Case, distributed: DistributedContext) -> dict[str, int]:
    """Take a step, and sum the bytes of this rank's tensors."""
    state = training_jobs.build_case_state(case, distributed)
    state.start_stage()
    sizes = {"weights": sum(local_shard(p).nbytes for p in state.model.parameters())}
    assert state.optimizers is not None
    clip_grad_norm = state.optimizers.clip_grad_norm

    def record_gradients() -> torch.Tensor:
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        sizes["gradients"] = sum(local_shard(g).nbytes for g in gradients)
        return clip_grad_norm()

    state.optimizers.clip_grad_norm = record_gradients
    training_jobs.take_step(state, case, 0, training_jobs.Result())
    sizes["moments"] = sum(local_shard(t).nbytes for t in state.optimizers.state_dict().values())
    return sizes


METHODS = ("adamw", "muon", "sgd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "rules", [nano.TRAIN_ALL, nano.TRAIN_DECODER_AND_MERGER], ids=["all", "answer"]
)
def test_weights_optimizer_states_and_gradients_equal_those_of_a_run(
    method: Any, rules: Any
) -> None:
    shares = (((TEXT,),),)
    case = Case(shares=shares, optim=OptimConfig(name=method), rules=rules, dtype="float32")
    estimate = estimate_static(case_train_config(case))
    sizes = measure_static(case, DistributedContext(torch.device("cpu")))
    assert {name: getattr(estimate, name) for name in sizes} == sizes
    assert estimate.gathered == 0


def test_qlora_needs_less_memory_than_full_training() -> None:
    full = estimate_static(tiny.recipe())
    config = replace(
        lora.recipe(), device="cpu", adapter=LoraConfig(rank=4, quantize_base="nf4_double")
    )
    qlora_memory = estimate_static(config)
    # Factors of rank 4, and seven layers per block in 4 bits instead of 32.
    assert qlora_memory.weights < full.weights
    assert qlora_memory.moments < full.moments / 4
    assert qlora_memory.gradients < full.gradients / 4


def test_replicas_have_the_shards_of_a_smaller_world_size() -> None:
    config = tiny.recipe()
    replicas = estimate_static(replace(config, mesh=MeshConfig(dp_replicate=2)), world_size=4)
    assert (
        replicas.weights
        == estimate_static(config, world_size=2).weights
        > estimate_static(config, world_size=4).weights
    )


def test_replicated_frozen_parameters_are_kept_in_bfloat16() -> None:
    config = tiny.recipe()
    stage = replace(config.stages[0], rules=nano.TRAIN_DECODER_AND_MERGER)
    config = replace(config, stages=(stage,))
    sharded = estimate_static(config, world_size=8)
    replicated = estimate_static(replace(config, mesh=MeshConfig(frozen="replicate")), world_size=8)
    assert replicated.weights > sharded.weights
    assert replicated.gathered < sharded.gathered


def test_checkpointing_and_gradient_accumulation_change_the_peak() -> None:
    config = replace(tiny.recipe(), optim=OptimConfig(name="adamw"))
    large = BatchShape((64,) * 16, (64,) * 16, 500)
    plain = estimate_step(config, large)
    checkpointing = ActivationCheckpointingConfig(visual="full", text="full", every_n_blocks=2)
    checkpointed = estimate_step(
        replace(config, activation_checkpointing=checkpointing, gradient_accumulation_steps=2),
        large,
    )
    assert checkpointed.activations < plain.activations
    assert checkpointed.weights == plain.weights
    assert checkpointed.peak < plain.peak
    assert plain.weights + plain.moments + plain.activations < plain.peak


def test_impossible_configs_are_refused() -> None:
    config = replace(
        lora.recipe(), device="cpu", adapter=LoraConfig(target_modules=("model.missing",))
    )
    with pytest.raises(
        ConfigError, match=r"adapter.target_modules: 'model.missing' matches no linear layer"
    ):
        estimate_step(config)
    stage = replace(tiny.recipe().stages[0], rules=(("none", 1.0), (".*", 0.0)))
    with pytest.raises(ConfigError, match="rules that match no parameter: none"):
        estimate_step(replace(tiny.recipe(), stages=(stage,)))
