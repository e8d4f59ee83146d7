"""Training state of a run: model, optimizers, spike guard, step counter, data iterator.

`build_train_state` builds it, `resume` loads the last checkpoint into it, and `state_dict` returns
the tensors of the next one. The order matters: modules are wrapped (activation checkpointing,
torch.compile) before FSDP shards them, shards are filled after that, and optimizers come last,
since they step this rank's shards. (torchtitan: `Trainer`, `TrainState`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_regions
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.memory import matmul_dtype
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import apply_activation_checkpointing
from qwen2vl.parallel.fsdp import apply_fsdp, fill_shards, refresh_requires_grad
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.processor.processor import Processor
from qwen2vl.train import checkpoint
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.init import build_meta_model, build_model
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.data_order import locate_step
from qwen2vl.train.optim.optimizers import (
    Optimizers,
    always_frozen,
    apply_lr_rules,
    check_trainable,
)
from qwen2vl.train.optim.spike_guard import SpikeGuard

__all__ = ["TrainState", "build_train_state", "resume"]


@dataclass(slots=True)
class TrainState:
    """The state of a run on this rank; ranks differ in their shards and batches only."""

    config: TrainConfig
    distributed: DistributedContext
    model: Qwen2VL
    processor: Processor
    tokenizer_folder: Path  # the folder of the tokenizer's files
    step: int = 0  # optimizer steps done
    optimizers: Optimizers | None = None  # of the current stage
    guard: SpikeGuard | None = None
    datasets: Mapping[int, PackedDataset] = field(default_factory=dict)  # by stage index
    # Batches of this rank, from the next step on.
    data_iterator: Iterator[Batch] = field(default_factory=lambda: iter(()))

    @property
    def folder(self) -> Path:
        """The folder of checkpoints and metrics."""
        return Path(self.config.folder)

    @property
    def is_stage_start(self) -> bool:
        """Whether the next step is the first of its stage; False after the last step."""
        return self.step < self.config.steps and locate_step(self.config, self.step)[1] == 0

    def stage_at(self, step: int) -> Stage:
        """Return the stage of `step`, counted from 0."""
        return self.config.stages[locate_step(self.config, step)[0]]

    @property
    def epoch(self) -> float | None:
        """How often the last step's stage has read its data; None for synthetic samples."""
        stage_index, stage_step = locate_step(self.config, self.step - 1)
        dataset = self.datasets.get(stage_index)
        return None if dataset is None else dataset.epochs(stage_step + 1)

    def start_stage(self) -> None:
        """Apply the freezing rules of the next step's stage, and create its optimizers anew.

        Raises:
            ConfigError: a rule is wrong, or the rules freeze every parameter.
        """
        stage = self.stage_at(self.step)
        check_trainable(self.model, stage)
        lr_scales = apply_lr_rules(self.model, stage.rules)
        if self.optimizers is not None:
            refresh_requires_grad(self.model)
        self.optimizers = Optimizers(self.model, lr_scales, self.config.optim, self.distributed)
        self.guard = SpikeGuard(self.config.optim.spike_sigmas, self.distributed.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by name: the tensors themselves, this rank's shards.

        Raises:
            EngineError: the loss or the gradient norm of a step was not finite.
        """
        tensors: dict[str, Tensor] = dict(self.model.state_dict())
        if self.optimizers is not None and self.guard is not None:
            self.guard.raise_if_not_finite()
            tensors |= self.optimizers.state_dict() | self.guard.state_dict()
        return tensors | _rng_state(self.distributed)


def build_train_state(
    config: TrainConfig, distributed: DistributedContext, *, fill_weights: bool = True
) -> TrainState:
    """Load or initialize the model, and with several ranks keep this rank's shards only.

    With several ranks no rank ever holds the full model. With `fill_weights` False the shards stay
    uninitialized, for `resume` to fill.

    Raises:
        ConfigError: the config has neither `init` nor `model`, or a rule is wrong.
        CheckpointError: `init` names no folder with a model.
    """
    if distributed.mesh is None:
        model, processor, tokenizer_folder = build_model(config)
        _wrap_model(config, distributed, model)
        return TrainState(config, distributed, model, processor, tokenizer_folder)
    # Rank 0 first, since it may write the tokenizer.
    if distributed.rank:
        distributed.barrier()
    meta_model = build_meta_model(config)
    if not distributed.rank:
        distributed.barrier()
    _wrap_model(config, distributed, meta_model.model)
    _shard_model(config, distributed, meta_model.model)
    if fill_weights:
        fill_shards(meta_model.model, meta_model.read_tensor)
    return TrainState(
        config, distributed, meta_model.model, meta_model.processor, meta_model.tokenizer_folder
    )


def _wrap_model(config: TrainConfig, distributed: DistributedContext, model: Qwen2VL) -> None:
    """Apply activation checkpointing and torch.compile to the unsharded modules."""
    # Dropout of LoRA layers draws from this generator, on each rank its own; checkpoints store it.
    torch.manual_seed(config.seed + distributed.rank)
    apply_activation_checkpointing(model, **asdict(config.activation_checkpointing))
    if config.compile:
        compile_regions(model)


def resume(state: TrainState) -> None:
    """Load the last checkpoint of the run's folder into `state`, if there is one.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another run.
    """
    path = checkpoint.latest_checkpoint(state.folder)
    if path is None:
        return
    state.step = checkpoint.read_step(path, state.config)
    checkpoint.verify(path, state.distributed)
    stored_shapes = checkpoint.tensor_shapes(path)
    target_tensors: dict[str, Tensor] = dict(state.model.state_dict())
    guard_state: dict[str, Tensor] = {}
    if state.step < state.config.steps and not state.is_stage_start:
        state.start_stage()
        assert state.optimizers is not None and state.guard is not None
        guard_state = state.guard.state_dict()
        target_tensors |= state.optimizers.allocate_state(stored_shapes)
    # A checkpoint of another world size may lack an RNG state, an older one the guard's history.
    optional_tensors = {
        n: t for n, t in (guard_state | _rng_state(state.distributed)).items() if n in stored_shapes
    }
    checkpoint.load_tensors(path, target_tensors | optional_tensors, state.distributed)
    if state.guard is not None and guard_state.keys() <= optional_tensors.keys():
        state.guard.load_state_dict(optional_tensors)
    _set_rng_state(state.distributed, optional_tensors)


def _shard_model(config: TrainConfig, distributed: DistributedContext, model: Qwen2VL) -> None:
    assert distributed.mesh is not None
    frozen_names = always_frozen(model, config.stages)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen_names)
    dtype = matmul_dtype(config.dtype, distributed.device)
    apply_fsdp(
        model,
        distributed.mesh,
        device=distributed.device,
        dtype=None if dtype == torch.float32 else dtype,
        replicated=frozen_names if config.mesh.frozen == "replicate" else (),
        reshard_after_forward=config.mesh.reshard_after_forward,
    )


def _rng_state(distributed: DistributedContext) -> dict[str, Tensor]:
    """Return the states of torch's generators by name; in a step only LoRA dropout draws."""
    rng_states = {f"random|{distributed.rank}|cpu": torch.get_rng_state()}
    if distributed.device.type == "cuda":
        rng_states[f"random|{distributed.rank}|cuda"] = torch.cuda.get_rng_state(distributed.device)
    return rng_states


def _set_rng_state(distributed: DistributedContext, rng_states: dict[str, Tensor]) -> None:
    for name, state in rng_states.items():
        if name.endswith("|cpu"):
            torch.set_rng_state(state)
        elif name.endswith("|cuda"):
            torch.cuda.set_rng_state(state, distributed.device)
