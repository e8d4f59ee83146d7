"""The training loop: build or resume, then batches -> loss -> optimizer step -> log -> checkpoint.

    folder or config --init--> model, processor --FSDP--> this rank's shards
    step --loader--> Batch --model--> hidden_TD --loss--> backward --> optimizers.step

Weights are float32, matmuls bfloat16 (mixed precision). With gradient accumulation a step is
several batches. Inside a step the host never waits for the device; it synchronizes at log lines and
checkpoints. A single-process run that is stopped and resumed equals an uninterrupted one bit for
bit; under torchrun the same loop runs in every process, each on its share of the samples (data
parallel). (Qwen2-VL sec. 2.2, 2.3.)
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl import threads
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.lengths import ProgressCallback
from qwen2vl.flops import build_flop_counter, peak_flops
from qwen2vl.memory import matmul_dtype
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.fsdp import is_sharded, reshard_model, set_replica_all_reduce
from qwen2vl.parallel.mesh import init_distributed
from qwen2vl.train.checkpoint import CheckpointSaver, create_run_folder, latest_checkpoint
from qwen2vl.train.config import TrainConfig, dump
from qwen2vl.train.evaluate import EvaluationFunction
from qwen2vl.train.export import export_adapter, export_metadata, export_model
from qwen2vl.train.loader.batch import Batch, copy_to_device
from qwen2vl.train.loader.data_order import check_global_batch_sizes, locate_step
from qwen2vl.train.loader.data_summary import DataSummary, summarize_data, write_held_out
from qwen2vl.train.loader.dataloader import iterate_batches, open_datasets
from qwen2vl.train.logging.loggers import open_loggers
from qwen2vl.train.logging.metrics import Metrics, metric_families
from qwen2vl.train.loss import LossOutput, token_loss
from qwen2vl.train.optim.lr_schedule import describe_warmup, is_in_warmup, lr_factor
from qwen2vl.train.signals import SignalHandler, StopReason
from qwen2vl.train.state import TrainState, build_train_state, resume

__all__ = ["train", "train_step"]

logger = logging.getLogger(__name__)

ReportFunction = Callable[[dict[str, Any]], None]
DataFunction = Callable[[Sequence[DataSummary]], None]

MAX_FIRST_REPORT_SECONDS = 15.0  # the first report shows that the run works, and when it will end


def train(
    config: TrainConfig,
    *,
    report: ReportFunction = lambda line: None,
    evaluate: EvaluationFunction | None = None,
    progress: ProgressCallback = lambda what, done, total: None,
    on_data: DataFunction = lambda summaries: None,
) -> Path:
    """Train as `config` says, from its last checkpoint or from step 0, to its end or time limit.

    Args:
        config: of the run.
        report: called with every line of metrics, on rank 0.
        evaluate: called every `config.evaluation.eval_steps` steps and after the last, unless this
            is 0; on every rank.
        progress: called while the samples of the data are measured, on rank 0.
        on_data: called before the first step with what the stages read, on rank 0.

    Returns:
        The folder of the exported model, in the ordinary layout.

    Raises:
        EngineError: a loss or gradient norm is not finite; no weight was updated with it.
        CheckpointError: the run's folder holds checkpoints of another run, or the disk is full.
        ConfigError: the run's folder cannot be made, a rule of a stage is wrong, or there are more
            ranks than samples.
        SystemExit: after SIGTERM between two steps, with code 0, once a checkpoint is saved.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved, if a step was done.
    """
    torch.set_num_threads(config.num_threads or threads.default_num_threads())
    signal_handler = SignalHandler(config.max_minutes)
    with init_distributed(config.device, dp_replicate=config.mesh.dp_replicate) as distributed:
        check_global_batch_sizes(config, distributed.world_size)
        create_run_folder(Path(config.folder))
        state = build_train_state(
            config, distributed, fill_weights=latest_checkpoint(Path(config.folder)) is None
        )
        resume(state)
        if distributed.rank == 0 and state.step < config.steps:
            for text in describe_warmup(config):
                logger.warning(text)
        # Nothing to save up to here, and measuring data may take hours: signals end it at once.
        state.datasets = _open_datasets(state, progress, on_data)
        with signal_handler.handle_signals():
            with signal_handler.block_signals():  # the workers start here
                state.data_iterator = iterate_batches(
                    config,
                    state.processor,
                    state.step,
                    datasets=dict(state.datasets),
                    rank=distributed.rank,
                    world_size=distributed.world_size,
                )
            return _train_and_export(state, signal_handler, report, evaluate)


def _open_datasets(
    state: TrainState, progress: ProgressCallback, on_data: DataFunction
) -> dict[int, PackedDataset]:
    """Open the data of all stages; report what they are on rank 0."""
    if state.distributed.rank:
        return open_datasets(state.config, state.processor)
    datasets = open_datasets(state.config, state.processor, progress=progress)
    write_held_out(state.config, datasets)
    on_data([summarize_data(state.config, index, dataset) for index, dataset in datasets.items()])
    return datasets


def _train_and_export(
    state: TrainState,
    signal_handler: SignalHandler,
    report: ReportFunction,
    evaluate: EvaluationFunction | None,
) -> Path:
    """Train, save the last checkpoint, and export the model unless a signal asks to stop."""
    metadata = {
        "config": json.loads(dump(state.config)),
        **export_metadata(state.processor, state.tokenizer_folder, state.folder),
    }
    saver = CheckpointSaver(state.folder, state.config.save_total_limit, state.distributed)
    try:
        stop_reason = _train_steps(state, saver, metadata, signal_handler, report, evaluate)
        last_checkpoint = saver.save(state.step, state.state_dict(), metadata)
    except BaseException as error:
        # A failed frame may hold the data iterator, and so the workers; see below.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        state.data_iterator = iter(())  # ends the workers, which ignore the signal sent at exit
        saver.close()
    if state.distributed.rank == 0:
        _warn_if_cut_in_warmup(state)
    if stop_reason in ("SIGTERM", "SIGINT"):
        logger.warning(
            "%s: saved %s; the same command resumes from it", stop_reason, last_checkpoint
        )
        raise SystemExit(0) if stop_reason == "SIGTERM" else KeyboardInterrupt
    return _export_model(state, last_checkpoint, metadata)


def _train_steps(
    state: TrainState,
    saver: CheckpointSaver,
    metadata: Mapping[str, Any],
    signal_handler: SignalHandler,
    report: ReportFunction,
    evaluate: EvaluationFunction | None,
) -> StopReason:
    """Train to the last step, or until there is a reason to stop; return that reason."""
    config, distributed = state.config, state.distributed
    metrics = _open_metrics(state)
    first_step = last_reported_step = state.step
    stop_reason = signal_handler.poll(distributed)
    while state.step < config.steps and not stop_reason:
        if state.optimizers is None or state.is_stage_start:
            state.start_stage()
            metrics.flop_counter = None  # other parameters may be trainable now
        metrics.flop_counter = metrics.flop_counter or build_flop_counter(
            state.model, **asdict(config.activation_checkpointing)
        )
        metrics.start_phase("data")
        wait_start = time.perf_counter()
        # All batches of the step first: the loss of each is divided by their total target weight.
        batches = [next(state.data_iterator) for _ in range(config.gradient_accumulation_steps)]
        train_step(state, batches, metrics, time.perf_counter() - wait_start)
        metrics.start_phase("other")
        if _is_report_due(state, metrics, is_first=last_reported_step == first_step):
            _report(state, metrics, report)
            last_reported_step = state.step
        # An evaluation may take minutes: the last checkpoint is not left until after it.
        if _is_due(state, config.save_steps):
            saver.save(state.step, state.state_dict(), metadata)
        if evaluate is not None and _is_due(state, config.evaluation.eval_steps):
            _evaluate(state, metrics, report, evaluate)
        stop_reason = signal_handler.poll(distributed)
    if last_reported_step < state.step:  # steps since the last log line
        _report(state, metrics, report)
    return stop_reason


def _is_due(state: TrainState, every_steps: int) -> bool:
    """Return whether to do after this step what is done every so many steps, and after the last.

    0: never.
    """
    is_last = state.step == state.config.steps
    return every_steps > 0 and (is_last or state.step % every_steps == 0)


def _is_report_due(state: TrainState, metrics: Metrics, *, is_first: bool) -> bool:
    """Return whether to report after this step: by its number, or by the time; all ranks agree."""
    config, distributed = state.config, state.distributed
    if _is_due(state, config.logging_steps) or not config.logging_seconds:
        return _is_due(state, config.logging_steps)
    limit = config.logging_seconds
    if is_first:
        limit = min(limit, MAX_FIRST_REPORT_SECONDS)
    is_due = torch.tensor(metrics.seconds >= limit and distributed.rank == 0, dtype=torch.int64)
    return bool(distributed.all_reduce(is_due))


def _warn_if_cut_in_warmup(state: TrainState) -> None:
    """Log a warning if the run was stopped inside the warm-up of a stage with more steps."""
    if not state.step:
        return
    stage_index, stage_step = locate_step(state.config, state.step - 1)
    is_noted = is_in_warmup(state.config, state.config.stages[stage_index].steps)  # at the start
    if is_in_warmup(state.config, stage_step + 1) and not is_noted:
        logger.warning(
            "step %d is one of the %d warm-up steps of stage %s, in which the learning rate still "
            "rises, so the model has learned little; train on, or give fewer, optim.warmup_steps=N",
            state.step,
            state.config.optim.warmup_steps,
            state.stage_at(state.step - 1).name,
        )


def train_step(
    state: TrainState, batches: Sequence[Batch], metrics: Metrics, data_wait: float
) -> None:
    """Take one optimizer step on the gradients of all batches of all ranks."""
    assert state.optimizers is not None and state.guard is not None
    distributed = state.distributed
    divisor = copy_to_device(
        distributed.all_reduce(_sum_target_weights(batches)), distributed.device
    )
    device_batches = [batch.to(distributed.device) for batch in batches]
    outputs: list[LossOutput] = []
    for index, batch in enumerate(device_batches, 1):
        set_replica_all_reduce(state.model, index == len(device_batches))
        metrics.start_phase("forward")
        outputs.append(_forward_loss(state.model, batch, divisor, state.config.dtype))
        metrics.start_phase("backward")
        outputs[-1].loss.backward()
    metrics.start_phase("optimizer")
    grad_norm = state.optimizers.clip_grad_norm()
    loss = distributed.all_reduce(torch.stack([output.loss.detach() for output in outputs]).sum())
    skip = state.guard.should_skip(state.step + 1, loss, grad_norm)
    state.optimizers.step(lr_factor(state.config, state.step), skip)
    state.step += 1
    for batch, output in zip(device_batches, outputs, strict=True):
        metrics.add(batch, output, grad_norm, data_wait / len(device_batches))


def _sum_target_weights(batches: Sequence[Batch]) -> Tensor:
    """Sum the loss weights of all targets, on the CPU: the divisor of the step's loss."""
    return torch.stack([b.weights_R.sum(dtype=torch.float64) for b in batches]).sum()


def _forward_loss(model: Qwen2VL, batch: Batch, divisor: Tensor, dtype: str) -> LossOutput:
    """Compute the share of one batch in the step's loss."""
    # FSDP gathers sharded weights in bfloat16 already.
    device = batch.input_ids_T.device
    use_autocast = matmul_dtype(dtype, device) == torch.bfloat16 and not is_sharded(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=use_autocast):
        hidden_TD = batch.forward(model)
        return token_loss(hidden_TD, model.lm_head_weight, batch, divisor)


def _open_metrics(state: TrainState) -> Metrics:
    config, distributed = state.config, state.distributed
    return Metrics(
        state.folder / "metrics.jsonl",
        distributed=distributed,
        families=metric_families(config),
        loggers=() if distributed.rank else open_loggers(config),
        peak_flops=peak_flops(distributed.device, config.peak_tflops),
    )


def _evaluate(
    state: TrainState, metrics: Metrics, report: ReportFunction, evaluate: EvaluationFunction
) -> None:
    """Log what `evaluate` returns for the current model."""
    line = metrics.log_evaluation(
        state.step, lambda: evaluate(state.model, state.processor, state.step)
    )
    reshard_model(state.model)
    if state.distributed.rank == 0 and len(line) > 1:
        report(line)


def _report(state: TrainState, metrics: Metrics, report: ReportFunction) -> None:
    assert state.guard is not None
    state.guard.raise_if_not_finite()
    line = metrics.report(
        step=state.step,
        steps=state.config.steps,
        stage=state.stage_at(state.step - 1).name,
        lr=state.config.optim.lr * lr_factor(state.config, state.step - 1),
        **({} if state.epoch is None else {"epoch": state.epoch}),
        skipped=state.guard.pop_num_skipped(),
    )
    if state.distributed.rank == 0:
        report(line)


def _export_model(state: TrainState, last_checkpoint: Path, metadata: Mapping[str, Any]) -> Path:
    """Export the model, and the adapter, from the checkpoint just written; on rank 0."""
    target = state.folder / f"model-{state.step:06d}"
    if state.distributed.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        export_model(last_checkpoint, target, metadata)
        if state.config.adapter is not None:
            adapter_target = state.folder / f"adapter-{state.step:06d}"
            shutil.rmtree(adapter_target, ignore_errors=True)
            export_adapter(last_checkpoint, adapter_target, metadata)
    state.distributed.barrier()
    return target
