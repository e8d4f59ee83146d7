"""`qwen2vl train RECIPE [key=value ...]`: run a recipe, or one leg of it.

The same command again goes on where the last one stopped. Progress goes to stdout as one line a
report; the full record is metrics.jsonl in the run's folder. It must not know how training works.
Next room: train/loop.py.
"""

from __future__ import annotations

import time
from typing import Any

import click

from qwen2vl.cli import terminal

__all__ = ["train"]


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Only check the data, and tell what would be done.")
@terminal.debug_option
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train by RECIPE, a name (nano, tiny) or the path of a Python file.

    KEY=VALUE words replace fields: minutes=40, optim.lr=1e-3, stages.2.steps=500, init=FOLDER.
    """
    # Imported here: torch takes a second, and a misspelt option should not cost that.
    from qwen2vl import recipes
    from qwen2vl.train.config import override
    from qwen2vl.train.loop import train as run

    config = override(recipes.build(recipe), overrides)
    if dry_run:
        from qwen2vl.cli.dry_run import dry_run as say_plan

        say_plan(config)
        return
    began = time.monotonic()
    folder = run(config, report=lambda line: terminal.say(_line(line, time.monotonic() - began)))
    terminal.say(f"model: {folder}")
    terminal.say(f"try:   qwen2vl ask --model {folder} --image PICTURE QUESTION")


def _line(line: dict[str, Any], seconds: float) -> str:
    """Fit one report into a line: where, loss, speed, and loss with exact share a family."""
    families = "  ".join(
        f"{name} {f['loss']:.3f}/{f['exact']:.0%}" for name, f in line["families"].items()
    )
    return (
        f"{seconds / 60:6.1f} min  {line['step']}/{line['steps']} {line['stage']}  "
        f"loss {line['loss']:.3f}  {line['examples_per_second']:.0f} ex/s  "
        f"{line['tokens_per_second']:.0f} tok/s  wait {line['data_wait']:.0%}  | {families}"
    )
