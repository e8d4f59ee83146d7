"""A whole run on one screen: build, resume, then batch -> loss -> step -> report -> checkpoint.

    folder or preset --build--> model, processor
    step --data--> Batch --model--> hidden_TD --objective--> loss --backward--> optim.step

Weights are float32 and products bfloat16 (autocast). A run that is stopped and started again
gives the same bits as one that was not. (Qwen2-VL sec. 2.2, 2.3.)
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen2vl.adapt.compile import compile_parts
from qwen2vl.errors import EngineError
from qwen2vl.model import Qwen2VL
from qwen2vl.train import checkpoint
from qwen2vl.train.begin import begin
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.data import batches
from qwen2vl.train.metrics import Metrics
from qwen2vl.train.objective import Outcome, token_loss
from qwen2vl.train.optim import Optimisers, apply_rules
from qwen2vl.train.pack import Batch
from qwen2vl.train.rate import rate
from qwen2vl.train.schedule import locate
from qwen2vl.weights.save import save_folder
from qwen2vl.weights.settings import GenerationDefaults

__all__ = ["train"]

GREEDY = GenerationDefaults(do_sample=False)

Report = Callable[[dict[str, Any]], None]


def train(config: TrainConfig, *, report: Report = lambda line: None) -> Path:
    """Run `config` from its last checkpoint, or from the start, to its end or its time limit.

    Args:
        config: the run.
        report: called with every line of metrics.

    Returns:
        The folder with the model as it stands: an ordinary one, which every engine opens.

    Raises:
        EngineError: a loss or gradient is not finite; no weight has taken it in.
        CheckpointError: the run's folder holds checkpoints of another run, or is full.
        ConfigError: the run's folder cannot be made, or a rule of a stage is wrong.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    folder = Path(config.folder)
    checkpoint.make_folder(folder)
    model, processor, tokenizer = begin(config)
    step, optimisers = _resume(config, folder, model)
    if config.compile:
        compile_parts(model)
    metrics = Metrics(folder / "metrics.jsonl")
    stream = batches(config, processor, step)
    ends = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    while step < config.steps and time.monotonic() < ends:
        if optimisers is None or locate(config, step)[1] == 0:
            optimisers = _optimisers(config, step, model)
        asked = time.perf_counter()
        batch = next(stream).to(config.device)
        waited = time.perf_counter() - asked
        outcome = _forward_backward(config, model, batch)
        norm = optimisers.clip()
        _check_finite(step + 1, outcome.loss.item(), norm.item())
        optimisers.step(rate(config, step))
        step += 1
        metrics.add(batch, outcome, norm, waited)
        if step % config.log_every == 0 or step == config.steps:
            line = metrics.report(
                step=step, steps=config.steps, stage=_stage(config, step - 1).name
            )
            report(line)
        if step % config.save_every == 0:
            checkpoint.save(folder, step, model, optimisers, config)
    if optimisers is not None and step % config.save_every:
        checkpoint.save(folder, step, model, optimisers, config)
    target = folder / f"model-{step:06d}"
    shutil.rmtree(target, ignore_errors=True)
    save_folder(
        target,
        config=model.config,
        state_dict=model.state_dict(),
        tokenizer_folder=tokenizer,
        pixels=processor.pixels,
        generation=GREEDY,
    )
    return target


def _resume(config: TrainConfig, folder: Path, model: Qwen2VL) -> tuple[int, Optimisers | None]:
    """Fill model and optimisers from the last checkpoint; (0, None) when there is none."""
    path = checkpoint.latest(folder)
    if path is None:
        return 0, None
    step = checkpoint.read_step(path, config)
    if step == config.steps or locate(config, step)[1] == 0:
        checkpoint.restore(path, model, None)  # the next stage begins with fresh optimisers
        return step, None
    optimisers = _optimisers(config, step, model)
    checkpoint.restore(path, model, optimisers)
    return step, optimisers


def _stage(config: TrainConfig, step: int) -> Stage:
    return config.stages[locate(config, step)[0]]


def _optimisers(config: TrainConfig, step: int, model: Qwen2VL) -> Optimisers:
    """Freeze and group as the stage of `step` says."""
    return Optimisers(model, apply_rules(model, _stage(config, step).rules), config.optim)


def _forward_backward(config: TrainConfig, model: Qwen2VL, batch: Batch) -> Outcome:
    """Run one batch and leave its gradients on the parameters."""
    place = torch.device(config.device).type
    with torch.autocast(place, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        hidden_TD = batch.run(model)
        outcome = token_loss(hidden_TD, model.head_weight, batch, float(batch.weights_R.sum()))
    outcome.loss.backward()
    return outcome


def _check_finite(step: int, loss: float, norm: float) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise EngineError(
            f"step {step}: loss {loss}, gradient norm {norm}; start again to go on "
            "from the last checkpoint, or begin another run with a lower optim.lr and out=FOLDER"
        )
