"""`qwen2vl train RECIPE --dry-run`: validate configuration and data, and report the planned run.

For each stage: sources and bad samples, sequence packing (bins), estimated memory, and samples that
were decoded, with the supervised text in [[double brackets]]. Measured lengths and bins are cached,
so that the run itself starts without this delay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen2vl.cli import terminal
from qwen2vl.cli.training_summary import print_data, print_evaluation, print_resume, print_run

if TYPE_CHECKING:
    from qwen2vl.processor.inputs import ModelInput
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.dry_run.memory import StepMemory
    from qwen2vl.train.dry_run.report import StageReport
    from qwen2vl.train.dry_run.sample_check import SampleCheck

__all__ = ["dry_run"]


def dry_run(config: TrainConfig, recipe: TrainConfig) -> None:
    """Print for each stage its data, packing efficiency and load balance, memory, and samples.

    Args:
        config: of the run.
        recipe: the same before any override.

    Raises:
        InputError: more samples are bad when they are decoded than the data config allows.
    """
    from qwen2vl.train.checkpoint import read_resume_step
    from qwen2vl.train.dry_run.preconditions import check_preconditions
    from qwen2vl.train.dry_run.report import (
        check_config,
        estimate_duration,
        estimate_synthetic_stage_memory,
        report_stages,
    )
    from qwen2vl.train.dry_run.sample_check import raise_if_bad
    from qwen2vl.train.init import build_processor
    from qwen2vl.train.loader.data_summary import MAX_BAD_SAMPLES
    from qwen2vl.train.optim.lr_schedule import describe_warmup

    step = read_resume_step(config)
    processor = build_processor(config)
    parameters = check_config(config, processor)
    check_preconditions(config, recipe)
    print_run(config, parameters)
    print_resume(config, step)
    for text in describe_warmup(config):
        terminal.note(text)
    tokens = 0.0
    for number, stage in enumerate(config.stages):
        if stage.data is None and stage.steps:
            terminal.echo(f"\nstage {stage.name}: {stage.steps:,} steps of synthetic data")
            _print_memory(estimate_synthetic_stage_memory(config, processor, number))
    with terminal.progress_bar() as progress:
        reports = list(report_stages(config, processor, progress=progress))
    for report in reports:
        tokens += report.data.tokens_per_step * report.data.steps
        terminal.echo("")
        print_data(config, report.data, max_bad_samples=MAX_BAD_SAMPLES)
        _print_packing(report)
        _print_check(report.check, processor)
    terminal.echo("")
    print_evaluation(config, processor)
    seconds = estimate_duration(config, tokens)
    if seconds is not None:
        duration = terminal.format_duration(seconds)
        terminal.echo(
            f"{tokens:,.0f} tokens take {duration}, at the throughput of this run's last report"
        )
    for report in reports:
        raise_if_bad(report.check)


def _print_packing(report: StageReport) -> None:
    data = report.data
    terminal.echo(f"fill     {data.packing_efficiency:.1%} of {data.max_tokens:,} tokens")
    imbalance = ", ".join(
        f"{value:.3f} on {ranks} ranks" for ranks, value in report.imbalance.items()
    )
    if imbalance:
        terminal.echo(f"balance  {imbalance}: vision tower time relative to equal shares")
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


def _print_check(check: SampleCheck, processor: Processor) -> None:
    """Print what came of the samples that were decoded, and some of them."""
    num_good = check.num_checked - len(check.bad)
    terminal.echo(
        f"decoded  {check.num_checked:,} sample{'s' * (check.num_checked != 1)}: {num_good:,} as "
        "their headers say; what is learned is in [[ ]]"
    )
    for sample in check.bad:
        terminal.note(f"{sample.source}: bad when decoded: {sample.id}: {sample.text}")
    for name, model_input in check.shown:
        terminal.echo(f"\n{name}")
        terminal.echo(_render_sample(model_input, processor))


def _render_sample(sample: ModelInput, processor: Processor) -> str:
    from qwen2vl.train.dry_run.report import text_spans

    return "".join(
        f"[[{text}]]" if span.is_supervised else text
        for span in text_spans(sample, processor.tokenizer, processor.config.placeholder_ids)
        for text in [terminal.escape_control_characters(span.text, keep="\n")]
    )
