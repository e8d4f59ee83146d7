"""What one step takes of a rank's memory, worked out before a weight is loaded.

    peak = weights + moments + gathered + the most at one moment of
           activations + logits at the loss, then fewer activations + more gradients + one block

Weights, moments and gradients are counted parameter by parameter, as FSDP parts them; activations
and logits by a rehearsal on shapes. It must not know data. Next room: preview.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import recompute
from qwen2vl.parallel.fsdp import units
from qwen2vl.train.adapter import put_adapter
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.dry_run.activation_memory import Shape, rehearse
from qwen2vl.train.optim.optimizers import apply_rules, moment_bytes, never_moving

__all__ = ["Memory", "Stored", "bare_model", "memory_of_step", "stored_bytes"]

WIDE = torch.float32.itemsize  # of a weight as it is stepped, and of its gradient


class Stored(NamedTuple):
    """Bytes on one rank, whatever it reads."""

    weights: int  # this rank's part
    moments: int  # of the optimizer
    gathered: int  # other ranks' parts while they are needed, and gradients on their way to them
    gradients: int  # this rank's part, when the backward ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank; the peak is less than the sum, for not all is there at once."""

    weights: int  # these four as in Stored
    moments: int
    gathered: int
    gradients: int
    activations: int  # of both towers, kept for the backward
    logits: int  # a chunk of them and what else the loss takes, the head's gradient with it
    peak: int


def memory_of_step(
    config: TrainConfig, shape: Qwen2VLConfig, stage: Stage, batch: Shape, *, ranks: int = 1
) -> Memory:
    """Predict the memory of one step, on the rank that has most.

    Args:
        config: of the run.
        shape: of its model.
        stage: whose rules say who moves.
        batch: the largest that a rank reads at a time.
        ranks: processes that share the run.

    Raises:
        ConfigError: a rule, or a pattern of the adapter, is wrong.
    """
    model = bare_model(config, shape)
    stored = stored_bytes(config, model, stage, ranks=ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_gathered_dtype(config, ranks))
    line = rehearse(
        model,
        batch,
        device=_device(config),
        casts=config.dtype == "bfloat16" and ranks == 1,
    )
    before = stored.gradients if config.accumulate > 1 else 0
    moving = max(line.peak(parts=_parts(config, ranks), before=before), stored.gradients)
    return Memory(
        **stored._asdict(),
        activations=line.kept,
        logits=line.logits,
        peak=stored.weights + stored.moments + stored.gathered + moving,
    )


def stored_bytes(config: TrainConfig, model: Qwen2VL, stage: Stage, *, ranks: int = 1) -> Stored:
    """Add up what a rank has of weights, gradients and moments; freezes as the stage says.

    Raises:
        ConfigError: a rule is wrong.
    """
    whole = _kept_whole(config, model) if ranks > 1 else set()
    apply_rules(model, stage.rules)
    short = _gathered_dtype(config, ranks)
    weights = moments = gradients = 0
    for name, parameter in model.named_parameters():
        own = _part(parameter, 1 if name in whole else _parts(config, ranks))
        weights += own * (short.itemsize if name in whole else WIDE)
        if parameter.requires_grad:
            gradients += own * WIDE
            moments += moment_bytes(config.optim, name, parameter, own)
    weights += sum(buffer.nbytes for buffer in model.buffers())
    gathered = _gathered(model, whole, short, config.mesh.reshard) if ranks > 1 else 0
    return Stored(weights, moments, gathered, gradients)


def bare_model(config: TrainConfig, shape: Qwen2VLConfig) -> Qwen2VL:
    """Build the run's model on the meta device, adapters and recomputing and all.

    Raises:
        ConfigError: a pattern of the adapter matches nothing, or a size is impossible.
    """
    with torch.device("meta"):
        model = Qwen2VL(shape)
    if config.adapter is not None:
        put_adapter(model, replace(config.adapter, init=""), config.seed)
    asked = config.recompute
    recompute(model, visual=asked.visual, text=asked.text, every=asked.every)
    return model


def _device(config: TrainConfig) -> torch.device:
    """Mean the run's own device; where there is none, the kernels of a CPU come close."""
    is_there = config.device != "cuda" or torch.cuda.is_available()
    return torch.device(config.device if is_there else "cpu")


def _parts(config: TrainConfig, ranks: int) -> int:
    return max(1, ranks // config.mesh.replicate)


def _gathered_dtype(config: TrainConfig, ranks: int) -> torch.dtype:
    """Say what weights are multiplied in; alone they stay wide, and autocast shortens copies."""
    return torch.bfloat16 if config.dtype == "bfloat16" and ranks > 1 else torch.float32


def _kept_whole(config: TrainConfig, model: Qwen2VL) -> set[str]:
    return never_moving(model, config.stages) if config.mesh.frozen == "replicate" else set()


def _part(parameter: Tensor, parts: int) -> int:
    """Count the numbers of the first rank's rows, which has most."""
    rows = -(-parameter.shape[0] // parts)
    return rows * parameter[0].numel()


def _gathered(model: Qwen2VL, whole: Collection[str], dtype: torch.dtype, reshard: bool) -> int:
    """Add up what is gathered at the widest moment.

    The rest of the model and the last block stay from their forward on; of the others one is
    computed while the next one comes, unless all stay. Of one, gradients are on their way.
    """
    kept = {parameter for name, parameter in model.named_parameters() if name in whole}
    sizes: list[int] = []
    sent = 0
    counted = set(kept)
    for unit in units(model):
        own = [p for p in unit.parameters() if p not in counted]
        counted.update(own)
        sizes.append(sum(p.numel() for p in own))
        sent = max(sent, sum(p.numel() for p in own if p.requires_grad))
    *blocks, rest = sizes
    stay = sum(blocks) if not reshard else min(sum(blocks), blocks[-1] + 2 * max(blocks))
    return (rest + stay) * dtype.itemsize + sent * WIDE
