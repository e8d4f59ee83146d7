"""`qwen2vl train RECIPE [key=value ...]`: train with a recipe; resumes an interrupted run.

The same command again resumes from the last checkpoint. Progress is printed as one line a report;
the complete metrics are in metrics.jsonl of the run's folder. See `qwen2vl.train.loop`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.progress import ProgressFormatter

__all__ = ["train"]


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--dry-run", is_flag=True, help="Validate configuration and data, and report what would run."
)
@terminal.debug_option
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train with RECIPE, a name or the path of a Python file.

    Names: full_finetune, lora, nano, qlora, stage1_vision, stage2_joint, stage3_instruct, tiny.

    Distributed training (FSDP): torchrun --nproc-per-node 8 -m qwen2vl train RECIPE. SIGTERM and
    Ctrl-C save a checkpoint before the run ends; before the first step they end it at once. The
    same command resumes from the last checkpoint.

    KEY=VALUE overrides fields of the configuration: max_minutes=40, optim.lr=1e-3,
    stages.2.steps=500, init=FOLDER.
    """
    # Imported here, so that usage errors do not wait for the import of torch.
    from qwen2vl import recipes
    from qwen2vl.cli.evaluations import build_evaluation
    from qwen2vl.parallel.mesh import is_main_process
    from qwen2vl.train.checkpoint import latest_checkpoint, read_manifest
    from qwen2vl.train.config import override
    from qwen2vl.train.loop import train as run

    config = override(recipes.load_recipe(recipe), overrides)
    if dry_run:
        from qwen2vl.cli.dry_run import dry_run as print_dry_run

        print_dry_run(config)
        return
    if is_main_process() and (last := latest_checkpoint(Path(config.folder))) is not None:
        done = read_manifest(last)["step"]
        if done < config.steps:
            terminal.echo(f"resuming from step {done:,} of {config.steps:,}: {last}")
    start = time.monotonic()
    format_line = ProgressFormatter()
    step = 0

    def report(metrics: dict[str, Any]) -> None:
        nonlocal step
        step = metrics["step"]
        terminal.echo(format_line(metrics, time.monotonic() - start))

    folder = run(config, report=report, evaluate=build_evaluation(config))
    if is_main_process():  # of the processes that torchrun started
        if 0 < step < config.steps:
            terminal.echo(f"stopped at step {step} of {config.steps}; the same command resumes")
        if config.adapter is not None:
            terminal.echo(f"adapter: {folder.parent / folder.name.replace('model', 'adapter', 1)}")
        terminal.echo(f"model: {folder}")
        terminal.echo(f"try:   qwen2vl ask --model {folder} --image IMAGE QUESTION")
