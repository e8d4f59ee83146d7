"""A whole run on one screen: build, resume, then batches -> loss -> step -> report -> checkpoint.

    folder or preset --build--> model, processor --shard--> this rank's part
    step --data--> Batches --model--> hidden_TD --objective--> loss --backward--> optim.step

Weights are float32 and products bfloat16. Inside a step the host never waits for the device: it
asks at reports and checkpoints. A run of one process that is stopped and started again gives the
same bits as one that was not; under torchrun the same loop runs in every process, each on its
share of the samples. (Qwen2-VL sec. 2.2, 2.3.)
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.fsdp import free_gathered, is_sharded, reduce_over_copies
from qwen2vl.parallel.mesh import join
from qwen2vl.train.checkpoint import Saver, latest, make_folder
from qwen2vl.train.config import TrainConfig, dump
from qwen2vl.train.evaluate import Probe
from qwen2vl.train.export import describe, export, export_adapter
from qwen2vl.train.flops import costs, peak_of
from qwen2vl.train.loader.batch import Batch, sent
from qwen2vl.train.loader.data_order import check_shares, locate
from qwen2vl.train.loader.dataloader import batches, open_corpora
from qwen2vl.train.logging.loggers import open_sinks
from qwen2vl.train.logging.metrics import Metrics, families_of
from qwen2vl.train.loss import Outcome, token_loss
from qwen2vl.train.optim.lr_schedule import is_warming, rate
from qwen2vl.train.signals import Stop, Wish
from qwen2vl.train.state import Run, build, resume

__all__ = ["one_step", "train"]

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig, *, report: Report = lambda line: None, probe: Probe | None = None
) -> Path:
    """Run `config` from its last checkpoint, or from the start, to its end or its time limit.

    Args:
        config: the run.
        report: called with every line of metrics, on the first rank.
        probe: asked every `config.probe.every` steps, on every rank.

    Returns:
        The folder with the model as it stands: an ordinary one, which every engine opens.

    Raises:
        EngineError: a loss or gradient is not finite; no weight has taken it in.
        CheckpointError: the run's folder holds checkpoints of another run, or is full.
        ConfigError: the run's folder cannot be made, a rule of a stage is wrong, or there are more
            ranks than samples.
        SystemExit: SIGTERM came between two steps: with code 0, after a checkpoint.
        KeyboardInterrupt: Ctrl-C came: after a checkpoint, where there were steps.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    stop = Stop(config.minutes)
    with join(config.device, replicate=config.mesh.replicate) as ranks:
        check_shares(config, ranks.size)
        make_folder(Path(config.folder))
        run = build(config, ranks, filled=latest(Path(config.folder)) is None)
        resume(run)
        # Until here there is nothing to save, and measuring may take hours: signals end it at once.
        corpora = open_corpora(config, run.processor)
        with stop.listening():
            with stop.unheard():  # the workers begin here
                run.stream = batches(
                    config,
                    run.processor,
                    run.step,
                    corpora=corpora,
                    rank=ranks.rank,
                    ranks=ranks.size,
                )
            return _go(run, stop, report, probe)


def _go(run: Run, stop: Stop, report: Report, probe: Probe | None) -> Path:
    """Step, save what the last step left, and put it together unless somebody wishes to stop."""
    facts = {
        "config": json.loads(dump(run.config)),
        **describe(run.processor, run.tokenizer, run.folder),
    }
    saver = Saver(run.folder, run.config.keep, run.ranks)
    try:
        wish = _steps(run, saver, facts, stop, report, probe)
        last = saver.save(run.step, run.tensors(), facts)
    except BaseException as error:
        # A frame that failed may hold the stream, and so the workers; see below.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        run.stream = iter(())  # ends the workers, who are deaf to what would end them at exit
        saver.close()
    if run.ranks.rank == 0:
        _warn_of_warm_up(run)
    if wish in ("SIGTERM", "SIGINT"):
        logger.warning("%s: saved %s; the same command goes on from there", wish, last)
        raise SystemExit(0) if wish == "SIGTERM" else KeyboardInterrupt
    return _export(run, last, facts)


def _steps(
    run: Run,
    saver: Saver,
    facts: Mapping[str, Any],
    stop: Stop,
    report: Report,
    probe: Probe | None,
) -> Wish:
    """Step to the end, or until somebody wishes to stop."""
    config, ranks = run.config, run.ranks
    metrics = _open_metrics(run)
    told, wish = run.step, stop.heard(ranks)
    while run.step < config.steps and not wish:
        if run.optimizers is None or run.begins_stage:
            run.begin_stage()
            metrics.costs = None  # who learns may have changed
        metrics.costs = metrics.costs or costs(run.model, config.recompute)
        metrics.enter("data")
        asked = time.perf_counter()
        # All batches of the step at once: their weight together divides the loss of each.
        own = [next(run.stream) for _ in range(config.accumulate)]
        one_step(run, own, metrics, time.perf_counter() - asked)
        metrics.enter("other")
        if run.step % config.log_every == 0:
            _tell(run, metrics, report)
            told = run.step
        if run.step % config.save_every == 0:
            saver.save(run.step, run.tensors(), facts)
        if probe is not None and config.probe.every and run.step % config.probe.every == 0:
            _ask(run, metrics, report, probe)
        wish = stop.heard(ranks)
    if told < run.step:  # a short leg, too, has something to tell
        _tell(run, metrics, report)
    return wish


def _warn_of_warm_up(run: Run) -> None:
    """Tell where the run stands if its last step was too slow to teach."""
    if not run.step:
        return
    _, inner = locate(run.config, run.step - 1)
    if is_warming(run.config, inner + 1):
        logger.warning(
            "step %d is one of the %d in which the rate of stage %s still rises, so it has taught "
            "little; go on, or give fewer, optim.warmup=N",
            run.step,
            run.config.optim.warmup,
            run.stage(run.step - 1).name,
        )


def one_step(run: Run, own: Sequence[Batch], metrics: Metrics, waited: float) -> None:
    """Move the weights once, by the gradients of all batches of all ranks."""
    assert run.optimizers is not None and run.guard is not None
    ranks = run.ranks
    divisor = sent(ranks.sum(_sum_of_weights(own)), ranks.device)
    moved = [batch.to(ranks.device) for batch in own]
    outcomes: list[Outcome] = []
    for number, batch in enumerate(moved, 1):
        reduce_over_copies(run.model, number == len(moved))
        metrics.enter("forward")
        outcomes.append(_forward(run.model, batch, divisor, run.config.dtype))
        metrics.enter("backward")
        outcomes[-1].loss.backward()
    metrics.enter("optimizer")
    norm = run.optimizers.clip()
    loss = ranks.sum(torch.stack([outcome.loss.detach() for outcome in outcomes]).sum())
    skip = run.guard.judge(run.step + 1, loss, norm)
    run.optimizers.step(rate(run.config, run.step), skip)
    run.step += 1
    for batch, outcome in zip(moved, outcomes, strict=True):
        metrics.add(batch, outcome, norm, waited / len(moved))


def _sum_of_weights(batches_of_step: Sequence[Batch]) -> Tensor:
    """Add up the weights of all targets, on the CPU: what the loss of a step is divided by."""
    return torch.stack([b.weights_R.sum(dtype=torch.float64) for b in batches_of_step]).sum()


def _forward(model: Qwen2VL, batch: Batch, divisor: Tensor, dtype: str) -> Outcome:
    """Run one batch to its share of the step's loss."""
    # Sharded weights are gathered in bfloat16 already.
    casts = dtype == "bfloat16" and not is_sharded(model)
    with torch.autocast(batch.input_ids_T.device.type, torch.bfloat16, enabled=casts):
        hidden_TD = batch.run(model)
        return token_loss(hidden_TD, model.head_weight, batch, divisor)


def _open_metrics(run: Run) -> Metrics:
    config, ranks = run.config, run.ranks
    return Metrics(
        run.folder / "metrics.jsonl",
        ranks=ranks,
        families=families_of(config),
        sinks=() if ranks.rank else open_sinks(config),
        peak=peak_of(ranks.device, config.peak_tflops),
    )


def _ask(run: Run, metrics: Metrics, report: Report, probe: Probe) -> None:
    """Let a probe look at the model as it stands."""
    line = metrics.look(run.step, lambda: probe(run.model, run.processor, run.step))
    free_gathered(run.model)
    if run.ranks.rank == 0:
        report(line)


def _tell(run: Run, metrics: Metrics, report: Report) -> None:
    assert run.guard is not None
    run.guard.check()
    line = metrics.report(
        step=run.step,
        steps=run.config.steps,
        stage=run.stage(run.step - 1).name,
        skipped=run.guard.take_skipped(),
    )
    if run.ranks.rank == 0:
        report(line)


def _export(run: Run, last: Path, facts: Mapping[str, Any]) -> Path:
    """Let the first rank put the model together from the checkpoint just written."""
    target = run.folder / f"model-{run.step:06d}"
    if run.ranks.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        export(last, target, facts)
        if run.config.adapter is not None:
            factors = run.folder / f"adapter-{run.step:06d}"
            shutil.rmtree(factors, ignore_errors=True)
            export_adapter(last, factors, facts)
    run.ranks.wait_for_all()
    return target
