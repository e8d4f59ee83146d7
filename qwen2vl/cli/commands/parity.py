"""`qwen2vl parity`: numerical comparison of a model folder with transformers, step by step.

Both implementations get the same prompt; each is loaded, run in float32 on the CPU and released
before the other is loaded. The table lists every step from pixels to logits, the last line names
the first divergence. The exit code is 0 if all steps agree, else 1. See `qwen2vl.eval.parity`.
"""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from math import isfinite
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import options, terminal
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.eval.parity import ParityPrompt, ParityReport, StepComparison, Tracer

__all__ = ["parity"]


@click.command()
@click.argument("question", required=False)
@options.model_option
@click.option(
    "--image", "images", multiple=True, metavar="PATH", help="Image of the prompt; repeatable."
)
@click.option(
    "--video", "videos", multiple=True, metavar="PATH", help="Video of the prompt; repeatable."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    help="Maximum error of a step, relative to its largest magnitude.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object in place of the table."
)
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
    """Compare the activations of a model folder with transformers, from pixels to logits.

    Without --image and --video, synthetic ones are used. Of a quantized folder both compute with
    the dequantized weights.
    """
    if question is not None:
        _check_question(question)
    from qwen2vl.eval.parity import compare

    prompt = _build_prompt(question, images, videos)
    ours, reference = _build_tracers(model)
    _note_quantization(model)
    with terminal.spinner("running this library"):
        our_trace = ours(prompt)
    with terminal.spinner("running transformers"):
        reference_trace = reference(prompt)
    report = compare(our_trace, reference_trace, tolerance)
    if as_json:
        terminal.echo_json({"model": model, **_report_to_json(report, tolerance)})
    else:
        terminal.echo(f"model: {model}")
        _print_report(report)
    ctx.exit(0 if report.first_divergence is None else 1)


def _check_question(text: str) -> None:
    """Check that the question is no folder, which would leave another model compared.

    Raises:
        UsageError: it is a folder, or looks like the path of one.
    """
    looks_like_path = "/" in text and not any(c.isspace() for c in text)
    if looks_like_path or os.path.isdir(os.path.expanduser(text)):
        raise click.UsageError(
            f"{text!r} is a path, not a question; --model {shlex.quote(text)} compares the model "
            "of a folder or repository"
        )


def _build_prompt(
    text: str | None, images: tuple[str, ...], videos: tuple[str, ...]
) -> ParityPrompt:
    from qwen2vl.eval.parity import ParityPrompt, synthetic_prompt

    synthetic = synthetic_prompt()
    media = [("image", path) for path in images] + [("video", path) for path in videos]
    return ParityPrompt(text or synthetic.text, tuple(media) or synthetic.media)


def _build_tracers(name: str) -> tuple[Tracer, Tracer]:
    """Build both tracers; each loads its weights when called and releases them afterwards.

    Raises:
        InputError: transformers is not installed.
    """
    if missing := [package for package in ("transformers", "jinja2") if not find_spec(package)]:
        raise InputError(
            f"parity compares with transformers, but {' and '.join(missing)} cannot be imported; "
            "pip install 'qwen2vl[parity]'"
        )
    from qwen2vl.eval.parity import model_tracer
    from qwen2vl.eval.reference import reference_tracer
    from qwen2vl.loading import load_processor
    from qwen2vl.weights import resolve_model

    folder = resolve_model(name)
    processor = load_processor(folder)
    return model_tracer(folder, processor), reference_tracer(folder, processor)


def _note_quantization(name: str) -> None:
    from qwen2vl.weights import open_tensors, resolve_model

    if quantization := open_tensors(resolve_model(name)).quantization_config:
        terminal.note(
            f"the weights are quantized ({quantization.describe()}): both compute with the "
            "dequantized weights in float32; `qwen2vl eval` measures the quantized model"
        )


def _print_report(report: ParityReport) -> None:
    rows: list[tuple[str, ...]] = []
    for step in report.steps:
        verdict = "equal" if step.matches else f"DIFFERS {step.note}".rstrip()
        numbers = (step.max_abs, step.relative, step.limit)
        rows.append((step.name, *(f"{number:.1e}" for number in numbers), verdict))
    titles = ("step", "max error", "relative", "limit", "")
    terminal.echo_table(titles, rows, left_aligned=("step", ""))
    first, worst = report.first_divergence, report.worst
    if first is None:
        terminal.echo(
            f"equal in {len(report.steps)} steps; largest relative error {_format_step(worst)}"
        )
    else:
        terminal.echo(f"first divergence: {_format_step(first)}, limit {first.limit:.0e}")


def _format_step(step: StepComparison) -> str:
    return f"{step.relative:.1e} at {step.name}" + (f" ({step.note})" if step.note else "")


def _report_to_json(report: ParityReport, tolerance: float) -> dict[str, Any]:
    """Convert a report to JSON values; infinite errors become null."""
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
                "equal": step.matches,
                "note": step.note,
            }
            for step in report.steps
        ],
    }
