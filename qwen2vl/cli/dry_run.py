"""`qwen2vl train RECIPE --dry-run`: check the data of a run, and tell what it would do.

What is measured and packed here is kept, so the run itself begins at once. Samples are shown as
the model will read them, with [[what is learned]] in double brackets. It must not know how data are
measured. Back up: train.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.processor.inputs import ModelInput
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.dry_run.memory import Memory
    from qwen2vl.train.dry_run.report import StageFacts

__all__ = ["dry_run"]


def dry_run(config: TrainConfig) -> None:
    """Say for each stage what it reads, how full and even its bins are, what it takes."""
    from qwen2vl.train.dry_run.report import (
        check_run,
        memory_of_world,
        open_processor,
        preview,
        seconds_left,
    )
    from qwen2vl.train.optim.lr_schedule import is_warming

    processor = open_processor(config)
    check_run(config, processor)
    tokens = 0.0
    for number, stage in enumerate(config.stages):
        if stage.data is None:
            terminal.say(f"stage {stage.name}: {stage.steps:,} steps of the world")
            _say_memory(memory_of_world(config, processor, number))
    with terminal.progress() as progress:
        found = list(preview(config, processor, progress=progress))
    for stage in config.stages:
        if is_warming(config, stage.steps):
            terminal.note(
                f"stage {stage.name}: its {stage.steps:,} steps are all warm-up, in which the rate "
                "still rises; give fewer, optim.warmup=N"
            )
    for facts in found:
        tokens += facts.tokens_per_step * facts.steps
        _say_stage(facts)
        for name, sample in facts.samples:
            terminal.say(f"\n{name}")
            terminal.say(_shown(sample, processor))
    seconds = seconds_left(config, tokens)
    if seconds is not None:
        spoken = terminal.person_seconds(seconds)
        terminal.say(
            f"\n{tokens:,.0f} tokens take {spoken}, at the speed of this run's last report"
        )


def _say_stage(facts: StageFacts) -> None:
    titles = ("source", "samples", "in a pass", "tokens", "learned", "bad")
    rows = [
        (
            source.name,
            f"{source.samples:,}",
            f"{source.entries:,}",
            f"{source.tokens:,}",
            f"{source.targets:,}",
            ", ".join(f"{count:,} {reason}" for reason, count in source.bad.items()) or "none",
        )
        for source in facts.sources
    ]
    terminal.say(f"stage {facts.name}: {facts.steps:,} steps, {facts.passes:.3g} passes (epochs)")
    terminal.say_table(titles, rows, words=("source", "bad"))
    terminal.say(
        f"bins     {facts.bins:,} in a pass, {facts.bins_per_step:,} in a step of "
        f"{facts.tokens_per_step:,.0f} tokens"
    )
    terminal.say(f"fill     {facts.fill:.1%} of {facts.max_tokens:,} tokens")
    even = ", ".join(f"{value:.3f} on {ranks} ranks" for ranks, value in facts.imbalance.items())
    if even:
        terminal.say(f"balance  the vision tower takes {even}, where 1 is even")
    if facts.shrunk:
        terminal.say(f"resized  {facts.shrunk:,} samples, to fit into a bin")
    _say_memory(facts.memory)


def _say_memory(memory: Mapping[int, Memory]) -> None:
    """Show what a rank takes, by cause; they are not all there at once, so the peak is less."""
    causes = ("weights", "moments", "gathered", "gradients", "activations", "logits", "peak")
    rows = [
        (f"{ranks}", *(terminal.person_bytes(getattr(found, cause)) for cause in causes))
        for ranks, found in memory.items()
    ]
    if rows:
        terminal.say("memory of each rank, predicted")
        terminal.say_table(("ranks", *causes), rows, words=())


def _shown(sample: ModelInput, processor: Processor) -> str:
    from qwen2vl.train.dry_run.report import pieces

    return "".join(
        f"[[{text}]]" if piece.learned else text
        for piece in pieces(sample, processor.tokenizer, processor.config.pad_ids)
        for text in [terminal.plain(piece.text, keep="\n")]
    )
