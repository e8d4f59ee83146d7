"""`qwen2vl export RUN_OR_STEP -o DIR`: the model of a run, at its last checkpoint or at any.

DIR is an ordinary model folder in the official layout, which every engine opens. A run that goes
on is not disturbed. It must not know how checkpoints are stored. Next room: train/export.py.
"""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl.cli import terminal

__all__ = ["export"]


@click.command()
@click.argument("source", metavar="RUN_OR_STEP")
@click.option("-o", "target", metavar="DIR", required=True, help="The folder to make.")
@terminal.debug_option
def export(source: str, target: str) -> None:
    """Write the model of RUN_OR_STEP, a run's folder or one of its checkpoints, to DIR.

    \b
    qwen2vl export runs/nano -o nano-now
    qwen2vl export runs/nano/step-001500 -o nano-1500
    """
    # Imported here: torch takes a second, and a misspelled option should not cost that.
    from qwen2vl.train.export import export as write
    from qwen2vl.weights import check_target

    check_target(target)
    with terminal.waiting("putting the model together"):
        path = write(Path(source), Path(target))
    terminal.say(f"model: {target} (of {path})")
    terminal.say(f"try:   qwen2vl ask --model {target} --image PICTURE QUESTION")
