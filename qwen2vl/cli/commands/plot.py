"""`qwen2vl plot RUN... -o run.png`: training curves of metrics.jsonl, drawn with matplotlib.

One run is plotted with its stages and task families; several runs are overlaid. See
`qwen2vl.cli.training_curves`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from qwen2vl.cli import terminal
from qwen2vl.errors import InputError

__all__ = ["plot"]

FORMATS = (".png", ".svg", ".pdf")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o", "--output", default="run.png", show_default=True, metavar="FILE", help="PNG, SVG or PDF."
)
@terminal.debug_option
def plot(runs: tuple[str, ...], output: str) -> None:
    """Plot the metrics of RUNs: folders of training runs, or their metrics.jsonl files."""
    terminal.check_image_path(output, FORMATS)
    if find_spec("matplotlib") is None:
        raise InputError("plot needs matplotlib, which is missing; pip install 'qwen2vl[plot]'")
    from qwen2vl.cli.training_curves import build_figure, read_run

    figure = build_figure([read_run(Path(run)) for run in runs])
    try:
        figure.savefig(output, dpi=140)
    except OSError as error:
        raise InputError(f"-o {output}: cannot be written: {error.strerror or error}") from error
    terminal.note(f"wrote {output}")
