"""Jobs of the process pool: training steps of each rank on its share of a few conversations.

The reference is the same function in one process, on the union of all shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2vl.data.preprocess import TrainingExample
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import (
    CheckpointingMode,
    apply_activation_checkpointing,
)
from qwen2vl.parallel.fsdp import apply_fsdp
from qwen2vl.parallel.mesh import DistributedContext, init_distributed
from qwen2vl.recipes import tiny
from qwen2vl.recipes.nano import TRAIN_ALL
from qwen2vl.train.checkpoint import CheckpointSaver
from qwen2vl.train.config import OptimConfig, Rules, Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.logging.metrics import Metrics
from qwen2vl.train.loop import train_step
from qwen2vl.train.optim.optimizers import match_lr_rules
from qwen2vl.train.state import TrainState, resume
from tests.tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer_dir

STEPS = 3

# The conversations of one batch of a rank, by index into `conversations`.
TEXT, IMAGES, VIDEO, EMPTY, MIXED = (0, 5), (1, 2), (3,), (), (0, 2, 3, 4, 6)


@cache
def conversations() -> list[TrainingExample]:
    """Return text, images of several shapes and a video, with answers of different lengths."""
    rng = np.random.default_rng(0)
    processor = tiny_processor()

    def image(height: int, width: int) -> dict[str, Any]:
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)}

    clip = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    prompts = [
        ([], "hello", "hi"),
        ([image(112, 56)], "what?", "a long answer about it"),
        ([image(56, 84), image(84, 112)], "same?", "no"),
        ([clip], "where to?", "left"),
        ([image(56, 84)], "and this?", "x"),
        ([], "count", "one two three four five six seven eight"),
        ([image(84, 56), clip], "both?", "yes, both"),
    ]
    return [
        TrainingExample(
            processor(
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": answer},
                ],
                for_training=True,
            ),
            f"family{i}",
        )
        for i, (media, question, answer) in enumerate(prompts)
    ]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of three steps: the data of each rank, sharding, optimizer."""

    # step -> rank -> batch of the rank -> conversations
    shares: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    optim: OptimConfig = field(default_factory=OptimConfig)
    rules: Rules = TRAIN_ALL
    dtype: str = "float64"
    dp_replicate: int = 1
    frozen: str = "shard"
    visual: CheckpointingMode = "none"
    text: CheckpointingMode = "none"
    tied: bool = True
    reshard_after_forward: bool = True

    @property
    def world_size(self) -> int:
        return len(self.shares[0])


@dataclass
class Result:
    """What must not depend on the world size."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last step
    optimizer_states: dict[str, Tensor] = field(default_factory=dict)
    collectives: list[str] = field(default_factory=list)


class CollectiveRecorder(TorchDispatchMode):
    """Records every collective in order, with the shapes that must agree on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            # An all-to-all of matrices has splits of unequal sizes.
            shapes = [] if "alltoall" in str(func) else _shapes(args)
            self.collectives.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


class LossRecorder(Metrics):
    """Records the loss of each step; writes no file."""

    def __init__(self) -> None:
        self.per_step: list[Tensor] = []

    def start_phase(self, phase: str) -> None:
        pass

    def add(self, batch: Batch, output: Any, grad_norm: Tensor, data_wait: float) -> None:
        self.per_step.append(output.loss.detach())


def single_process_case(case: Case) -> Case:
    """Return the same case for one process: all batches of all ranks as one batch."""
    shares = tuple(
        ((tuple(i for rank in step for batch in rank for i in batch),),) for step in case.shares
    )
    return replace(case, shares=shares, dp_replicate=1, visual="none", text="none")


def train_sharded(case: Case) -> Result:
    """Train three steps on this rank's share; returns full (unsharded) tensors."""
    with init_distributed("cpu", dp_replicate=case.dp_replicate) as distributed:
        return train_case(case, distributed)


def train_on_one_process(case: Case) -> Result:
    """Train the same three steps in a single process."""
    return train_case(single_process_case(case), DistributedContext(torch.device("cpu")))


def train_case(case: Case, distributed: DistributedContext) -> Result:
    state, result = build_case_state(case, distributed), Result()
    state.start_stage()
    with CollectiveRecorder() as recorder:
        for index in range(STEPS):
            take_step(state, case, index, result)
    result.collectives = recorder.collectives
    result.parameters = {n: full_tensor(p) for n, p in state.model.named_parameters()}
    assert state.optimizers is not None
    result.optimizer_states = {n: full_tensor(t) for n, t in state.optimizers.state_dict().items()}
    return (
        result
        if distributed.rank == 0
        else replace(result, parameters={}, optimizer_states={}, gradients={})
    )


def build_case_state(
    case: Case, distributed: DistributedContext, folder: str = "unused"
) -> TrainState:
    """Build the same model on every rank, as `build_train_state` does from a config."""
    config = case_config(case, folder)
    torch.manual_seed(0)
    model = tiny_model(0, tiny_config(tie_word_embeddings=case.tied))
    model.requires_grad_(True)
    if case.dtype == "float64":
        model = model.double()
    apply_activation_checkpointing(model, visual=case.visual, text=case.text)
    if distributed.mesh is not None:
        frozen = frozen_names(model, case)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else None
        replicated = frozen if case.frozen == "replicate" else set()
        apply_fsdp(
            model,
            distributed.mesh,
            device=distributed.device,
            dtype=dtype,
            replicated=replicated,
            reshard_after_forward=case.reshard_after_forward,
        )
    return TrainState(config, distributed, model, tiny_processor(), tiny_tokenizer_dir())


def case_config(case: Case, folder: str) -> TrainConfig:
    mixture = tiny.recipe().stages[0].mixture
    stage = Stage(
        name="all", steps=STEPS + 2, global_batch_size=8, mixture=mixture, rules=case.rules
    )
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float32"
    return TrainConfig(name="t", stages=(stage,), optim=case.optim, dtype=dtype, output_dir=folder)


def frozen_names(model: Qwen2VL, case: Case) -> set[str]:
    lr_scales = match_lr_rules([name for name, _ in model.named_parameters()], case.rules)
    return {name for name, scale in lr_scales.items() if not scale}


def take_step(state: TrainState, case: Case, index: int, result: Result) -> None:
    """Take one step; record its loss, gradient norm and, of the first step, full gradients."""
    optimizers, guard = state.optimizers, state.guard
    assert optimizers is not None and guard is not None
    clip_grad_norm, should_skip = optimizers.clip_grad_norm, guard.should_skip

    def record_gradients() -> Tensor:
        if index == 0:
            for name, parameter in optimizers.parameters.items():
                assert parameter.grad is not None, name
                result.gradients[name] = full_tensor(parameter.grad)
        return clip_grad_norm()

    def record_loss(step: int, loss: Tensor, norm: Tensor) -> Tensor:
        result.losses.append(loss.item())
        result.grad_norms.append(norm.item())
        return should_skip(step, loss, norm)

    optimizers.clip_grad_norm = record_gradients
    guard.should_skip = record_loss
    batches = [
        pack_conversations(ids)
        for ids in case.shares[index % len(case.shares)][state.distributed.rank]
    ]
    train_step(state, batches, LossRecorder(), 0.0)
    optimizers.clip_grad_norm, guard.should_skip = clip_grad_norm, should_skip


def pack_conversations(ids: Sequence[int]) -> Batch:
    """Pack conversations by index; -i is conversation i without supervised tokens."""
    examples = [conversations()[abs(i)]._replace(family=f"{n}") for n, i in enumerate(ids)]
    batch = pack_batch(examples, pad_id=0, weighting="root")
    unsupervised = {f"{n}" for n, i in enumerate(ids) if i < 0}
    target_rows = [
        n
        for n, o in enumerate(batch.example_index_R.tolist())
        if batch.families[o] not in unsupervised
    ]
    rows = torch.tensor(target_rows, dtype=torch.int64)
    fields = ("target_index_R", "targets_R", "weights_R", "example_index_R")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in fields})


def save_and_step(case: Case, folder: str) -> Result:
    """Take two steps, save a checkpoint, and take one more step as the reference for resuming."""
    with init_distributed("cpu", dp_replicate=case.dp_replicate) as distributed:
        state, result = build_case_state(case, distributed, folder), Result()
        state.start_stage()
        for index in range(2):
            take_step(state, case, index, result)
        saver = CheckpointSaver(Path(folder), 2, distributed)
        import json

        from qwen2vl.train.config import dump

        saver.save(2, state.state_dict(), {"config": json.loads(dump(state.config))})
        take_step(state, case, 2, result)
        saver.close()
        return _collect(state, result)


def resume_and_step(case: Case, folder: str) -> Result:
    """Resume with any world size, and take the third step."""
    with init_distributed("cpu", dp_replicate=case.dp_replicate) as distributed:
        return resume_state(case, distributed, folder)


def resume_state(case: Case, distributed: DistributedContext, folder: str) -> Result:
    state, result = build_case_state(case, distributed, folder), Result()
    for parameter in state.model.parameters():
        parameter.data.zero_()  # everything must come from the checkpoint
    resume(state)
    assert state.step == 2
    take_step(state, case, 2, result)
    return _collect(state, result)


def _collect(state: TrainState, result: Result) -> Result:
    assert state.optimizers is not None
    result.parameters = {n: full_tensor(p) for n, p in state.model.named_parameters()}
    result.optimizer_states = {n: full_tensor(t) for n, t in state.optimizers.state_dict().items()}
    return result


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor from all ranks, detached and copied."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _shapes(args: Any) -> list[Any]:
    if isinstance(args, Tensor):
        return [tuple(args.shape)]
    if isinstance(args, list | tuple):
        return [shape for part in args for shape in _shapes(part)]
    return []
