"""What a training run is about to do, printed by `qwen2vl train` and its --dry-run alike.

`print_run` needs no weights and no data: model, stages, trainable parameters, device, output.
`print_data` follows once the data are measured: sources, epochs, bins, bad samples;
`print_evaluation` names what the loss is evaluated on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import Stage, TrainConfig
    from qwen2vl.train.dry_run.report import ParameterCounts
    from qwen2vl.train.loader.data_summary import DataSummary

__all__ = ["print_data", "print_evaluation", "print_resume", "print_run"]

MAX_EPOCHS = 20  # of a stage, without a note
MAX_NAMED_BAD_SAMPLES = 3  # of a source, by a run
MAX_NAMED_SOURCES = 3  # in the line of a stage


def print_run(config: TrainConfig, parameters: ParameterCounts) -> None:
    """Print what is trained, where and how."""
    base = config.init or "random weights"
    terminal.echo(
        f"run      {config.name}: {_count(config.steps, 'step')}, {config.optim.name}, learning "
        f"rate {config.optim.lr:g}; output in {config.folder}"
    )
    terminal.echo(f"model    {base}, {parameters.total:,} parameters")
    what = "adapter parameters" if config.adapter is not None else "parameters"
    for stage, num_trainable in zip(config.stages, parameters.trainable, strict=True):
        if stage.steps:
            share = num_trainable / parameters.total
            terminal.echo(
                f"stage    {stage.name}: trains {num_trainable:,} {what} ({share:.1%}) in "
                f"{_count(stage.steps, 'step')} of {_describe_batch(stage)}"
            )
    terminal.echo(f"device   {_describe_device(config)}")
    terminal.echo(f"reports  {_describe_reports(config)}")


def print_resume(config: TrainConfig, step: int) -> None:
    """Print at which step a run with a checkpoint continues, or that it is finished."""
    from qwen2vl.train.checkpoint import describe_continuation, latest_checkpoint

    folder = Path(config.folder)
    if step >= config.steps:
        terminal.echo(
            f"finished {config.steps:,} steps before; {describe_continuation(folder, step)}"
        )
    elif step:
        last = latest_checkpoint(folder)
        terminal.echo(f"resuming from step {step:,} of {config.steps:,}: {last}")


def print_data(
    config: TrainConfig, data: DataSummary, *, max_bad_samples: int = MAX_NAMED_BAD_SAMPLES
) -> None:
    """Print what a stage reads, how often, and what it is evaluated on.

    Args:
        config: of the run.
        data: of the stage.
        max_bad_samples: of each source that are named, if the summary has as many.
    """
    titles = ("source", "samples", "in an epoch", "tokens", "supervised", "held out", "bad")
    rows = [
        (
            source.name,
            f"{source.num_samples:,}",
            f"{source.num_entries:,}",
            f"{source.num_tokens:,}",
            f"{source.num_targets:,}",
            f"{source.num_held_out:,}",
            f"{sum(source.bad.values()):,}",
        )
        for source in data.sources
    ]
    terminal.echo(
        f"data     of stage {data.name}, in {_count(data.steps, 'step')}: "
        f"{_format_epochs(data.epochs)} (passes over the data)"
    )
    terminal.echo_table(titles, rows, left_aligned=("source",))
    terminal.echo(
        f"bins     {data.num_bins:,} in an epoch, {data.num_bins_per_step:,} in a step of "
        f"{data.tokens_per_step:,.0f} tokens"
    )
    if data.num_resized:
        terminal.echo(f"resized  {data.num_resized:,} samples whose images exceeded a bin")
    _print_held_out(config, data)
    _print_bad_samples(config, data, max_bad_samples)
    for source in data.sources:
        _print_notes(source.name, source.unused, source.notes, source.num_samples)
    if data.epochs > MAX_EPOCHS:
        steps = data.steps_of(MAX_EPOCHS)
        terminal.note(
            f"stage {data.name}: {data.steps:,} steps read the same "
            f"{data.num_samples - data.num_held_out:,} samples {data.epochs:,.0f} times, which "
            f"mostly memorizes them; stages.{data.stage_index}.steps={steps} reads them "
            f"{MAX_EPOCHS} times"
        )


def print_evaluation(config: TrainConfig, processor: Processor) -> None:
    """Print what is evaluated when; opens the data, so that errors come before the training."""
    from qwen2vl.train.evaluate import open_held_out

    evaluation = config.evaluation
    if not evaluation.num_examples or not evaluation.eval_steps:
        return
    lines: dict[str, None] = {}  # a set in order: stages may share their data
    for stage_index, stage in enumerate(config.stages):
        opened = open_held_out(config, stage_index, processor) if stage.steps else None
        if opened is not None:
            _, dataset, entries = opened
            samples = _count(len(entries), "sample")
            if evaluation.path:
                samples += f" of {evaluation.path}"
                (table,) = dataset.lengths
                if samples not in lines:
                    _print_notes(evaluation.path, table.unused, table.notes, len(table))
            elif len(entries) == len(dataset.held_out):
                samples = f"the {samples} held out of stage {stage.name}"
            else:
                samples += f" of the {len(dataset.held_out):,} held out of stage {stage.name}"
            lines[samples] = None
        elif stage.steps and stage.data is None:
            lines[f"{_count(evaluation.num_examples, 'synthetic sample')} of another seed"] = None
    when = f"every {_count(evaluation.eval_steps, 'step')} and after the last"
    if evaluation.eval_steps >= config.steps:
        when = "after the last step"
    for line in lines:
        terminal.echo(f"evaluate {when}, on {line}")


def _print_held_out(config: TrainConfig, data: DataSummary) -> None:
    from qwen2vl.train.loader.data_summary import HELD_OUT_FILE

    for source in data.sources:
        if source.num_held_out:
            hidden = source.num_held_out - len(source.held_out_samples)
            more = f" and {hidden:,} more; the run lists all in " if hidden else "; listed in "
            terminal.echo(
                f"held out {_count(source.num_held_out, 'sample')} of {source.name}: "
                f"{', '.join(source.held_out_samples)}{more}{Path(config.folder) / HELD_OUT_FILE}"
            )


def _print_bad_samples(config: TrainConfig, data: DataSummary, limit: int) -> None:
    from qwen2vl.data.formats import describe_reasons

    path = Path(config.folder) / "bad_samples.jsonl"
    for source in data.sources:
        if source.bad:
            named = source.bad_samples[:limit]
            separator = "; " if len(named) <= MAX_NAMED_BAD_SAMPLES else terminal.LINE_BREAK
            hidden = sum(source.bad.values()) - len(named)
            more = f"and {hidden:,} more; the run lists those that it reads in {path}"
            lines = [f"{source.name}: left out {describe_reasons(source.bad)}: {named[0]}"]
            terminal.note(separator.join([*lines, *named[1:], *([more] if hidden else [])]))


def _print_notes(
    name: str, unused: Mapping[str, int], notes: Mapping[str, int], num_samples: int
) -> None:
    """Print the columns of a source that were not used, and what is likely an error in its rows."""
    if unused:
        columns = _describe_columns(unused, num_samples)
        terminal.note(f"{name}: ignored columns: {columns}")
    for note, count in notes.items():
        terminal.note(f"{name}: {_count(count, 'sample')} with {note}")


def _describe_columns(unused: Mapping[str, int], num_samples: int) -> str:
    return ", ".join(
        name if count == num_samples else f"{name} (of {_count(count, 'sample')})"
        for name, count in unused.items()
    )


def _describe_batch(stage: Stage) -> str:
    if stage.data is None:
        return f"{stage.global_batch_size:,} synthetic conversations"
    sources = ", ".join(source.path or source.label for source in stage.data.sources)
    if len(stage.data.sources) > MAX_NAMED_SOURCES:
        sources = f"{len(stage.data.sources)} sources"
    return (
        f"{_count(stage.data.global_batch_size, 'bin')} of up to {stage.data.max_tokens:,} tokens "
        f"from {sources}"
    )


def _describe_device(config: TrainConfig) -> str:
    import torch

    from qwen2vl import threads
    from qwen2vl.memory import matmul_dtype
    from qwen2vl.train.loader.dataloader import num_local_workers

    parts = [config.device]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.device == "cpu":
        parts.append(_count(config.num_threads or threads.default_num_threads(), "thread"))
    dtype = str(matmul_dtype(config.dtype, torch.device(config.device)))
    parts += [dtype.removeprefix("torch."), _count(num_local_workers(config), "data worker")]
    if world_size > 1:
        parts.append(f"{world_size:,} processes")
    return ", ".join(parts)


def _describe_reports(config: TrainConfig) -> str:
    often = f"every {_count(config.logging_steps, 'step')}"
    if config.logging_seconds:
        often += f", or {config.logging_seconds:g} s"
    end = ""
    if config.max_minutes:
        end = f"; ends after {config.max_minutes:g} minute" + "s" * (config.max_minutes != 1)
    return f"{often}; checkpoints every {_count(config.save_steps, 'step')}{end}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _format_epochs(epochs: float) -> str:
    if epochs == 1:
        return "1 epoch"
    return f"{epochs:,.3g} epochs" if epochs < 1000 else f"{epochs:,.0f} epochs"
