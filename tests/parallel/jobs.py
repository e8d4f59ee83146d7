"""What the processes of a gang do: steps of training on their share of a few conversations.

The same function with one process, on the union of all shares, is what they are compared with.
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

from qwen2vl.data.preprocess import Example
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import Mode, recompute
from qwen2vl.parallel.fsdp import shard
from qwen2vl.parallel.mesh import Ranks, join
from qwen2vl.recipes import tiny
from qwen2vl.recipes.nano import ALL
from qwen2vl.train.checkpoint import Saver
from qwen2vl.train.config import OptimConfig, Rules, Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.logging.metrics import Metrics
from qwen2vl.train.loop import one_step
from qwen2vl.train.optim.optimizers import match_rules
from qwen2vl.train.state import Run, resume
from tests.tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer_dir

STEPS = 3

# What a rank can be shown: conversations by number (see `conversations`), in one batch.
TEXT, PICTURES, VIDEO, NOTHING, MIXED = (0, 5), (1, 2), (3,), (), (0, 2, 3, 4, 6)


@cache
def conversations() -> list[Example]:
    """Text, pictures of several shapes, a clip; answers of very different lengths."""
    rng = np.random.default_rng(0)
    processor = tiny_processor()

    def picture(height: int, width: int) -> dict[str, Any]:
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)}

    clip = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    asked = [
        ([], "hello", "hi"),
        ([picture(112, 56)], "what?", "a long answer about it"),
        ([picture(56, 84), picture(84, 112)], "same?", "no"),
        ([clip], "where to?", "left"),
        ([picture(56, 84)], "and this?", "x"),
        ([], "count", "one two three four five six seven eight"),
        ([picture(84, 56), clip], "both?", "yes, both"),
    ]
    return [
        Example(
            processor(
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": answer},
                ],
                for_training=True,
            ),
            f"family{i}",
        )
        for i, (media, question, answer) in enumerate(asked)
    ]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of three steps: who sees what, and how weights are shared and moved."""

    # step -> rank -> batch of the rank -> conversations
    shares: tuple[tuple[tuple[tuple[int, ...], ...], ...], ...]
    optim: OptimConfig = field(default_factory=OptimConfig)
    rules: Rules = ALL
    dtype: str = "float64"
    replicate: int = 1
    frozen: str = "shard"
    visual: Mode = "none"
    text: Mode = "none"
    tied: bool = True
    reshard: bool = True

    @property
    def size(self) -> int:
        return len(self.shares[0])


@dataclass
class Result:
    """What must not depend on the number of processes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    parameters: dict[str, Tensor] = field(default_factory=dict)  # after the last
    moments: dict[str, Tensor] = field(default_factory=dict)
    collectives: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Notes every collective in order, with the shapes that all ranks must agree on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            # Rows travel in unequal parts where matrices do.
            shapes = [] if "alltoall" in str(func) else _shapes(args)
            self.seen.append(f"{func} {shapes}")
        return func(*args, **(kwargs or {}))


class Losses(Metrics):
    """Notes the loss of each step; files and families are another test's."""

    def __init__(self) -> None:
        self.per_step: list[Tensor] = []

    def enter(self, phase: str) -> None:
        pass

    def add(self, batch: Batch, outcome: Any, norm: Tensor, waited: float) -> None:
        self.per_step.append(outcome.loss.detach())


def union(case: Case) -> Case:
    """Let one process see in one batch what all ranks see in all of theirs."""
    shares = tuple(
        ((tuple(i for rank in step for batch in rank for i in batch),),) for step in case.shares
    )
    return replace(case, shares=shares, replicate=1, visual="none", text="none")


def steps(case: Case) -> Result:
    """Train three steps on this rank's share; everything that is compared comes back whole."""
    with join("cpu", replicate=case.replicate) as ranks:
        return train(case, ranks)


def one_process(case: Case) -> Result:
    """Do the same without any other process."""
    return train(union(case), Ranks(torch.device("cpu")))


def train(case: Case, ranks: Ranks) -> Result:
    run, result = make(case, ranks), Result()
    run.begin_stage()
    with Recorder() as recorder:
        for number in range(STEPS):
            step(run, case, number, result)
    result.collectives = recorder.seen
    result.parameters = {n: whole(p) for n, p in run.model.named_parameters()}
    assert run.optimizers is not None
    result.moments = {n: whole(t) for n, t in run.optimizers.state().items()}
    return result if ranks.rank == 0 else replace(result, parameters={}, moments={}, gradients={})


def make(case: Case, ranks: Ranks, folder: str = "unused") -> Run:
    """Build the same model on every rank, as train.run does from a config."""
    config = run_config(case, folder)
    torch.manual_seed(0)
    model = tiny_model(0, tiny_config(tie_word_embeddings=case.tied))
    model.requires_grad_(True)
    if case.dtype == "float64":
        model = model.double()
    recompute(model, visual=case.visual, text=case.text)
    if ranks.mesh is not None:
        never = frozen_names(model, case)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in never)
        dtype = torch.bfloat16 if case.dtype == "bfloat16" else None
        whole_names = never if case.frozen == "replicate" else set()
        shard(
            model,
            ranks.mesh,
            device=ranks.device,
            dtype=dtype,
            whole=whole_names,
            reshard=case.reshard,
        )
    return Run(config, ranks, model, tiny_processor(), tiny_tokenizer_dir())


def run_config(case: Case, folder: str) -> TrainConfig:
    mixture = tiny.recipe().stages[0].mixture
    stage = Stage(name="all", steps=STEPS + 2, examples=8, mixture=mixture, rules=case.rules)
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float32"
    return TrainConfig(name="t", stages=(stage,), optim=case.optim, dtype=dtype, out=folder)


def frozen_names(model: Qwen2VL, case: Case) -> set[str]:
    scales = match_rules([name for name, _ in model.named_parameters()], case.rules)
    return {name for name, scale in scales.items() if not scale}


def step(run: Run, case: Case, number: int, result: Result) -> None:
    """Take one step, and note its loss, norm and (of the first) gradients over all ranks."""
    optimizers, guard = run.optimizers, run.guard
    assert optimizers is not None and guard is not None
    clip, judge = optimizers.clip, guard.judge

    def note_gradients() -> Tensor:
        if number == 0:
            for name, parameter in optimizers.named.items():
                assert parameter.grad is not None, name
                result.gradients[name] = whole(parameter.grad)
        return clip()

    def note_loss(step: int, loss: Tensor, norm: Tensor) -> Tensor:
        result.losses.append(loss.item())
        result.norms.append(norm.item())
        return judge(step, loss, norm)

    optimizers.clip = note_gradients
    guard.judge = note_loss
    own = [packed(ids) for ids in case.shares[number % len(case.shares)][run.ranks.rank]]
    one_step(run, own, Losses(), 0.0)
    optimizers.clip, guard.judge = clip, judge


def packed(ids: Sequence[int]) -> Batch:
    """Pack conversations; -i is conversation i shown without any supervised token."""
    shown = [conversations()[abs(i)]._replace(family=f"{n}") for n, i in enumerate(ids)]
    batch = pack(shown, pad_id=0, weighting="root")
    silent = {f"{n}" for n, i in enumerate(ids) if i < 0}
    kept = [n for n, o in enumerate(batch.owner_R.tolist()) if batch.families[o] not in silent]
    rows = torch.tensor(kept, dtype=torch.int64)
    fields = ("target_index_R", "targets_R", "weights_R", "owner_R")
    return replace(batch, **{name: getattr(batch, name)[rows] for name in fields})


def save(case: Case, folder: str) -> Result:
    """Take two steps, save, and take one more, for those who resume to compare with."""
    with join("cpu", replicate=case.replicate) as ranks:
        run, result = make(case, ranks, folder), Result()
        run.begin_stage()
        for number in range(2):
            step(run, case, number, result)
        saver = Saver(Path(folder), 2, ranks)
        import json

        from qwen2vl.train.config import dump

        saver.save(2, run.tensors(), {"config": json.loads(dump(run.config))})
        step(run, case, 2, result)
        saver.close()
        return _after(run, result)


def go_on(case: Case, folder: str) -> Result:
    """Resume, on any number of ranks, and take the third step."""
    with join("cpu", replicate=case.replicate) as ranks:
        return resumed(case, ranks, folder)


def resumed(case: Case, ranks: Ranks, folder: str) -> Result:
    run, result = make(case, ranks, folder), Result()
    for parameter in run.model.parameters():
        parameter.data.zero_()  # all that counts must come from the checkpoint
    resume(run)
    assert run.step == 2
    step(run, case, 2, result)
    return _after(run, result)


def _after(run: Run, result: Result) -> Result:
    assert run.optimizers is not None
    result.parameters = {n: whole(p) for n, p in run.model.named_parameters()}
    result.moments = {n: whole(t) for n, t in run.optimizers.state().items()}
    return result


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together from all ranks, detached from what still moves."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def _shapes(args: Any) -> list[Any]:
    if isinstance(args, Tensor):
        return [tuple(args.shape)]
    if isinstance(args, list | tuple):
        return [shape for part in args for shape in _shapes(part)]
    return []
