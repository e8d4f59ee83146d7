"""`qwen2vl train RECIPE [key=value ...]`: run a recipe, or one leg of it.

The same command again goes on where the last one stopped. Progress goes to stdout as one line a
report; the full record is metrics.jsonl in the run's folder. It must not know how training works.
Next room: train/loop.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.progress import Progress

__all__ = ["train"]


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Only check the data, and tell what would be done.")
@terminal.debug_option
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train by RECIPE, a name or the path of a Python file.

    Names: full_finetune, lora, nano, qlora, stage1_vision, stage2_joint, stage3_instruct, tiny.

    Under torchrun all its processes share the work: torchrun --nproc-per-node 8 -m qwen2vl train
    RECIPE. SIGTERM and Ctrl-C save before they end the run; before its first step they end it
    at once.

    KEY=VALUE words replace fields: minutes=40, optim.lr=1e-3, stages.2.steps=500, init=FOLDER.
    """
    # Imported here: torch takes a second, and a misspelled option should not cost that.
    from qwen2vl import recipes
    from qwen2vl.cli.evaluations import probe_of
    from qwen2vl.parallel.mesh import is_first
    from qwen2vl.train.checkpoint import latest, read_state
    from qwen2vl.train.config import override
    from qwen2vl.train.loop import train as run

    config = override(recipes.build(recipe), overrides)
    if dry_run:
        from qwen2vl.cli.dry_run import dry_run as say_plan

        say_plan(config)
        return
    if is_first() and (last := latest(Path(config.folder))) is not None:
        done = read_state(last)["step"]
        if done < config.steps:
            terminal.say(f"going on from step {done:,} of {config.steps:,}: {last}")
    began = time.monotonic()
    told = Progress()
    step = 0

    def report(line: dict[str, Any]) -> None:
        nonlocal step
        step = line["step"]
        terminal.say(told(line, time.monotonic() - began))

    folder = run(config, report=report, probe=probe_of(config))
    if is_first():  # of the processes that torchrun started
        if 0 < step < config.steps:
            terminal.say(f"stopped at step {step} of {config.steps}; the same command goes on")
        if config.adapter is not None:
            terminal.say(f"adapter: {folder.parent / folder.name.replace('model', 'adapter', 1)}")
        terminal.say(f"model: {folder}")
        terminal.say(f"try:   qwen2vl ask --model {folder} --image PICTURE QUESTION")
