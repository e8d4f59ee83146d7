"""What a run is made of while it runs: the model, this rank's part of it, and what steps it.

Built here, filled from the last checkpoint here, and laid open for the next one here; loop.py
turns the wheel. The order matters: the model's parts are wrapped while it is whole, then sharded,
then filled, and optimizers come last, since they step what is left on this rank.
Next room: loop.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_parts
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import recompute
from qwen2vl.parallel.fsdp import fill_parts, note_frozen, shard
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.processor.processor import Processor
from qwen2vl.train import checkpoint
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.init import begin, outline
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.data_order import locate
from qwen2vl.train.optim.optimizers import Optimizers, apply_rules, check_moves, never_moving
from qwen2vl.train.optim.spike_guard import Guard

__all__ = ["Run", "build", "resume"]


@dataclass(slots=True)
class Run:
    """The same on every rank, but for its parts."""

    config: TrainConfig
    ranks: Ranks
    model: Qwen2VL
    processor: Processor
    tokenizer: Path  # the folder of its files
    step: int = 0  # done so far
    optimizers: Optimizers | None = None  # of the stage under way
    guard: Guard | None = None
    # This rank's batches, from the next step on.
    stream: Iterator[Batch] = field(default_factory=lambda: iter(()))

    @property
    def folder(self) -> Path:
        """Where checkpoints go."""
        return Path(self.config.folder)

    @property
    def begins_stage(self) -> bool:
        """Whether the next step is the first of its stage; False behind the last."""
        return self.step < self.config.steps and locate(self.config, self.step)[1] == 0

    def stage(self, step: int) -> Stage:
        """Give the stage that a step, counted from 0, belongs to."""
        return self.config.stages[locate(self.config, step)[0]]

    def begin_stage(self) -> None:
        """Freeze and group as the stage of the next step says, with fresh moments.

        Raises:
            ConfigError: a rule is wrong, or the rules leave nothing to move.
        """
        stage = self.stage(self.step)
        check_moves(self.model, stage)
        scales = apply_rules(self.model, stage.rules)
        if self.optimizers is not None:
            note_frozen(self.model)
        self.optimizers = Optimizers(self.model, scales, self.config.optim, self.ranks)
        self.guard = Guard(self.config.optim.spike_sigmas, self.ranks.device)

    def tensors(self) -> dict[str, Tensor]:
        """Name all that a checkpoint keeps; the tensors themselves, of this rank its parts.

        Raises:
            EngineError: a step broke; nothing is worth keeping.
        """
        kept: dict[str, Tensor] = dict(self.model.state_dict())
        if self.optimizers is not None and self.guard is not None:
            self.guard.check()
            kept |= self.optimizers.state() | self.guard.state()
        return kept | _random_state(self.ranks)


def build(config: TrainConfig, ranks: Ranks, *, filled: bool = True) -> Run:
    """Load or make the model, and leave this rank its part.

    With several ranks none ever holds the whole. `filled` False leaves parts without numbers, for
    `resume` to fill.

    Raises:
        ConfigError: there is nothing to begin from, or a rule is wrong.
        CheckpointError: `init` names no folder with a model.
    """
    if ranks.mesh is None:
        model, processor, tokenizer = begin(config)
        _prepare(config, ranks, model)
        return Run(config, ranks, model, processor, tokenizer)
    # The first rank before the others, since it may write the tokenizer.
    if ranks.rank:
        ranks.wait_for_all()
    start = outline(config)
    if not ranks.rank:
        ranks.wait_for_all()
    _prepare(config, ranks, start.model)
    _shard(config, ranks, start.model)
    if filled:
        fill_parts(start.model, start.read)
    return Run(config, ranks, start.model, start.processor, start.tokenizer)


def _prepare(config: TrainConfig, ranks: Ranks, model: Qwen2VL) -> None:
    """Wrap what is computed again or compiled, while modules are whole."""
    # What an adapter's dropout draws from, on each rank something else; a checkpoint keeps it.
    torch.manual_seed(config.seed + ranks.rank)
    asked = config.recompute
    recompute(model, visual=asked.visual, text=asked.text, every=asked.every)
    if config.compile:
        compile_parts(model)


def resume(run: Run) -> None:
    """Fill a run just built from its last checkpoint, if there is one.

    Raises:
        CheckpointError: it is damaged, or of another run.
    """
    path = checkpoint.latest(run.folder)
    if path is None:
        return
    run.step = checkpoint.read_step(path, run.config)
    checkpoint.verify(path, run.ranks)
    stored = checkpoint.shapes(path)
    wanted: dict[str, Tensor] = dict(run.model.state_dict())
    history: dict[str, Tensor] = {}
    if run.step < run.config.steps and not run.begins_stage:
        run.begin_stage()
        assert run.optimizers is not None and run.guard is not None
        history = run.guard.state()
        wanted |= run.optimizers.room_for(stored)
    # A checkpoint of another number of ranks may lack a random state, an old one the history.
    extra = {n: t for n, t in (history | _random_state(run.ranks)).items() if n in stored}
    checkpoint.read(path, wanted | extra, run.ranks)
    if run.guard is not None and history.keys() <= extra.keys():
        run.guard.load_state(extra)
    _set_random_state(run.ranks, extra)


def _shard(config: TrainConfig, ranks: Ranks, model: Qwen2VL) -> None:
    assert ranks.mesh is not None
    never = never_moving(model, config.stages)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in never)
    shard(
        model,
        ranks.mesh,
        device=ranks.device,
        dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        whole=never if config.mesh.frozen == "replicate" else (),
        reshard=config.mesh.reshard,
    )


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    """Name the states of torch's generators; nothing in a step draws, but an adapter's may."""
    states = {f"random|{ranks.rank}|cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"random|{ranks.rank}|cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _set_random_state(ranks: Ranks, states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        if name.endswith("|cpu"):
            torch.set_rng_state(state)
        elif name.endswith("|cuda"):
            torch.cuda.set_rng_state(state, ranks.device)
