"""`qwen2vl export RUN_OR_CHECKPOINT -o DIR`: convert a training checkpoint to a model folder.

DIR has the official Hugging Face layout, which every inference engine loads. Exporting from a run
that is still training is safe. See `qwen2vl.train.export`.
"""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl.cli import terminal

__all__ = ["export"]


@click.command()
@click.argument("source", metavar="RUN_OR_CHECKPOINT")
@click.option("-o", "--output", metavar="DIR", required=True, help="Model folder to create.")
@terminal.debug_option
def export(source: str, output: str) -> None:
    """Export the last checkpoint of a run, or a given checkpoint, to the model folder DIR.

    \b
    qwen2vl export runs/nano -o nano-now
    qwen2vl export runs/nano/step-001500 -o nano-1500
    """
    # Imported here, so that usage errors do not wait for the import of torch.
    from qwen2vl.train.export import export_model as write
    from qwen2vl.weights import check_output_folder

    check_output_folder(output)
    with terminal.spinner("exporting"):
        path = write(Path(source), Path(output))
    terminal.echo(f"model: {output} (of {path})")
    terminal.echo(f"try:   qwen2vl ask --model {output} --image IMAGE QUESTION")
