"""`qwen2vl train RECIPE --dry-run`: validate configuration and data, and report the planned run.

For each stage: sources and bad samples, sequence packing (bins), estimated memory, and rendered
samples with the supervised text in [[double brackets]]. Measured lengths and bins are cached, so
that the run itself starts without this delay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.processor.inputs import ModelInput
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.dry_run.memory import StepMemory
    from qwen2vl.train.dry_run.report import StageReport

__all__ = ["dry_run"]


def dry_run(config: TrainConfig) -> None:
    """Print for each stage its data, packing efficiency and load balance, memory, and samples."""
    from qwen2vl.train.dry_run.report import (
        build_processor,
        check_config,
        estimate_duration,
        estimate_synthetic_stage_memory,
        report_stages,
    )
    from qwen2vl.train.optim.lr_schedule import is_in_warmup

    processor = build_processor(config)
    check_config(config, processor)
    tokens = 0.0
    for number, stage in enumerate(config.stages):
        if stage.data is None:
            terminal.echo(f"stage {stage.name}: {stage.steps:,} steps of synthetic data")
            _print_memory(estimate_synthetic_stage_memory(config, processor, number))
    with terminal.progress_bar() as progress:
        reports = list(report_stages(config, processor, progress=progress))
    for stage in config.stages:
        if is_in_warmup(config, stage.steps):
            terminal.note(
                f"stage {stage.name}: its {stage.steps:,} steps are all warm-up, in which the "
                "learning rate still rises; give fewer, optim.warmup_steps=N"
            )
    for report in reports:
        tokens += report.tokens_per_step * report.steps
        _print_stage(report)
        for name, sample in report.samples:
            terminal.echo(f"\n{name}")
            terminal.echo(_render_sample(sample, processor))
    seconds = estimate_duration(config, tokens)
    if seconds is not None:
        duration = terminal.format_duration(seconds)
        terminal.echo(
            f"\n{tokens:,.0f} tokens take {duration}, at the throughput of this run's last report"
        )


def _print_stage(report: StageReport) -> None:
    titles = ("source", "samples", "in an epoch", "tokens", "supervised", "bad")
    rows = [
        (
            source.name,
            f"{source.num_samples:,}",
            f"{source.num_entries:,}",
            f"{source.num_tokens:,}",
            f"{source.num_targets:,}",
            ", ".join(f"{count:,} {reason}" for reason, count in source.bad.items()) or "none",
        )
        for source in report.sources
    ]
    terminal.echo(f"stage {report.name}: {report.steps:,} steps, {report.epochs:.3g} epochs")
    terminal.echo_table(titles, rows, left_aligned=("source", "bad"))
    terminal.echo(
        f"bins     {report.num_bins:,} in an epoch, {report.num_bins_per_step:,} in a step of "
        f"{report.tokens_per_step:,.0f} tokens"
    )
    terminal.echo(f"fill     {report.packing_efficiency:.1%} of {report.max_tokens:,} tokens")
    imbalance = ", ".join(
        f"{value:.3f} on {ranks} ranks" for ranks, value in report.imbalance.items()
    )
    if imbalance:
        terminal.echo(f"balance  {imbalance}: vision tower time relative to equal shares")
    if report.num_resized:
        terminal.echo(f"resized  {report.num_resized:,} samples whose images exceeded a bin")
    _print_memory(report.memory)


def _print_memory(memory: Mapping[int, StepMemory]) -> None:
    """Print the memory of a rank by category; the peak is less than the sum."""
    categories = ("weights", "moments", "gathered", "gradients", "activations", "logits", "peak")
    rows = [
        (
            f"{ranks}",
            *(terminal.format_bytes(getattr(estimate, category)) for category in categories),
        )
        for ranks, estimate in memory.items()
    ]
    if rows:
        terminal.echo("estimated memory of each rank")
        terminal.echo_table(("ranks", *categories), rows, left_aligned=())


def _render_sample(sample: ModelInput, processor: Processor) -> str:
    from qwen2vl.train.dry_run.report import text_spans

    return "".join(
        f"[[{text}]]" if span.is_supervised else text
        for span in text_spans(sample, processor.tokenizer, processor.config.placeholder_ids)
        for text in [terminal.escape_control_characters(span.text, keep="\n")]
    )
