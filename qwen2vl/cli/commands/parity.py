"""`qwen2vl parity`: hold a model folder against transformers, step by step.

Both sides get the same question; each is loaded, run in fp32 on the CPU and dropped, one after the
other. The table shows every step from pixels to logits, the last line names the first that
differs. Ends with 0 where all agree, else with 1. Next room: eval/parity.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import options, terminal
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.eval.parity import Question, Report, Side, Step

__all__ = ["parity"]


@click.command()
@click.argument("question", required=False)
@options.model_option
@click.option(
    "--image", "images", multiple=True, metavar="PATH", help="A picture; may be repeated."
)
@click.option("--video", "videos", multiple=True, metavar="PATH", help="A clip; may be repeated.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    help="Largest error of a step, relative to its largest magnitude.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@terminal.debug_option
@click.pass_context
def parity(
    ctx: click.Context,
    question: str | None,
    model: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    tolerance: float,
    as_json: bool,
) -> None:
    """Compare a model folder with transformers, from pixels to logits.

    Without pictures and clips, drawn ones are used.
    """
    from qwen2vl.eval.parity import compare

    asked = _question(question, images, videos)
    ours, theirs = _sides(model)
    with terminal.waiting("running this library"):
        our_trace = ours(asked)
    with terminal.waiting("running transformers"):
        their_trace = theirs(asked)
    report = compare(our_trace, their_trace, tolerance)
    if as_json:
        terminal.say_json(_as_dict(report, tolerance))
    else:
        _show(report)
    ctx.exit(0 if report.first_divergence is None else 1)


def _question(text: str | None, images: tuple[str, ...], videos: tuple[str, ...]) -> Question:
    from qwen2vl.eval.parity import Question, drawn_question

    drawn = drawn_question()
    media = [("image", path) for path in images] + [("video", path) for path in videos]
    return Question(text or drawn.text, tuple(media) or drawn.media)


def _sides(name: str) -> tuple[Side, Side]:
    """Prepare both sides; weights are read when a side is asked, and dropped after it.

    Raises:
        InputError: transformers is not installed.
    """
    if missing := [package for package in ("transformers", "jinja2") if not find_spec(package)]:
        raise InputError(
            f"parity compares with transformers, but {' and '.join(missing)} cannot be imported; "
            "pip install 'qwen2vl[parity]'"
        )
    from qwen2vl.eval.parity import our_side
    from qwen2vl.eval.reference import reference_side
    from qwen2vl.loading import load_processor
    from qwen2vl.weights import find

    folder = find(name)
    processor = load_processor(folder)
    return our_side(folder, processor), reference_side(folder, processor)


def _show(report: Report) -> None:
    rows: list[tuple[str, ...]] = []
    for step in report.steps:
        verdict = "equal" if step.agrees else f"DIFFERS {step.note}".rstrip()
        numbers = (step.max_abs, step.relative, step.limit)
        rows.append((step.name, *(f"{number:.1e}" for number in numbers), verdict))
    titles = ("step", "max error", "relative", "limit", "")
    terminal.say_table(titles, rows, words=("step", ""))
    first, worst = report.first_divergence, report.worst
    if first is None:
        terminal.say(f"equal in {len(report.steps)} steps; largest relative error {_at(worst)}")
    else:
        terminal.say(f"first divergence: {_at(first)}, limit {first.limit:.0e}")


def _at(step: Step) -> str:
    return f"{step.relative:.1e} at {step.name}" + (f" ({step.note})" if step.note else "")


def _as_dict(report: Report, tolerance: float) -> dict[str, Any]:
    """Put a report into JSON's terms, which know no infinity."""
    first = report.first_divergence
    return {
        "equal": first is None,
        "first_divergence": first.name if first else None,
        "tolerance": tolerance,
        "steps": [
            {
                "step": step.name,
                "max_abs": step.max_abs if isfinite(step.max_abs) else None,
                "relative": step.relative if isfinite(step.relative) else None,
                "limit": step.limit,
                "equal": step.agrees,
                "note": step.note,
            }
            for step in report.steps
        ],
    }
