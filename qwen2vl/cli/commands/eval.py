"""`qwen2vl eval`: evaluate a model on a benchmark suite and compare the scores with thresholds.

Prints a table or one JSON object; --output writes every answer as JSON lines. Decoding is greedy.
The exit code is 0 when the run is complete, whatever the scores are. Parts whose fonts are not
installed are skipped with a note.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import options, terminal
from qwen2vl.errors import ConfigError

if TYPE_CHECKING:
    from qwen2vl.eval.mini import ThresholdCheck
    from qwen2vl.eval.synthetic import SyntheticTask
    from qwen2vl.eval.task import AnswerFn, TaskResults

__all__ = ["eval"]

MAX_TOKENS = (
    64  # the longest correct answer (a phrase and its box) has about 50 with nano's tokenizer
)


@click.command()
@click.option(
    "--suite",
    type=click.Choice(["mini"]),
    default="mini",
    show_default=True,
    help="Benchmark suite.",
)
@click.option(
    "--task",
    "patterns",
    multiple=True,
    metavar="NAME",
    help="Part of the suite, or a glob pattern (text*); repeatable. Default: all parts.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Evaluate only the first LIMIT questions of a part."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object in place of the table."
)
@click.option("-o", "--output", metavar="FILE", help="Write every answer to FILE, as JSON lines.")
@options.model_options
@terminal.debug_option
def eval(
    suite: str,
    patterns: tuple[str, ...],
    limit: int | None,
    as_json: bool,
    output: str | None,
    **given: Any,
) -> None:
    """Evaluate a model on a benchmark suite with known answers."""
    from qwen2vl.eval.mini import check_thresholds
    from qwen2vl.eval.task import write_results

    options.check_unnamed_adapter(given)
    if output:
        terminal.check_parent_folder(output)
    tasks = _build_tasks(patterns)
    loaded = options.load_model_from_options(given)
    start = time.perf_counter()
    runs = _run_tasks(tasks, _greedy_answer_fn(loaded), limit)
    seconds = time.perf_counter() - start
    if output:
        write_results(Path(output), runs.values())
    checks = check_thresholds(runs)
    if as_json:
        header = {"suite": suite, "model": loaded.name, "limit": limit, "seconds": seconds}
        terminal.echo_json({**header, "parts": _parts_to_json(runs, checks)})
    else:
        _print_table(runs, checks)
        count = sum(results.num_examples for results in runs.values())
        terminal.echo(f"{count:,} questions in {terminal.format_duration(seconds)}, greedy answers")


def _build_tasks(patterns: tuple[str, ...]) -> list[SyntheticTask]:
    """Build the selected parts; those whose fonts are not installed are skipped with a note."""
    from qwen2vl.eval.mini import build_task, select_parts

    tasks = [build_task(name) for name in select_parts(patterns)]
    drawable: list[SyntheticTask] = []
    font_error = None
    for task in tasks:
        try:
            task.check_fonts()
        except ConfigError as error:
            font_error = error
            terminal.note(f"{task.name} is left out: {error}")
        else:
            drawable.append(task)
    if font_error is not None and not drawable:
        raise font_error
    return drawable


def _greedy_answer_fn(loaded: options.LoadedModel) -> AnswerFn:
    """Return a function that answers greedily, ignoring the checkpoint's generation defaults."""
    import qwen2vl

    params = qwen2vl.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=MAX_TOKENS)
    return lambda messages: loaded.llm.chat(messages, params)[0]


def _run_tasks(
    tasks: list[SyntheticTask], answer: AnswerFn, limit: int | None
) -> dict[str, TaskResults]:
    from qwen2vl.eval.task import run_task

    runs: dict[str, TaskResults] = {}
    total = sum(len(task.cases[:limit]) for task in tasks)
    done = count(1)
    with terminal.progress_bar() as update:
        for task in tasks:
            name = task.name
            update(name, sum(results.num_examples for results in runs.values()), total)
            runs[name] = run_task(
                task,
                answer,
                limit=limit,
                on_result=lambda _, name=name: update(name, next(done), total),
            )
    return runs


def _print_table(runs: Mapping[str, TaskResults], checks: Mapping[str, ThresholdCheck]) -> None:
    titles = ("part", "metric", "score", "95 % CI", "threshold", "goal", "passed", "questions")
    rows = [_table_row(name, check, runs[name].num_examples) for name, check in checks.items()]
    terminal.echo_table(titles, rows, left_aligned=("part", "metric"))
    exact = [
        f"{name} {_format_percent(r.accuracy)}"
        for name, r in runs.items()
        if r.character_error_rate is not None
    ]
    if exact:
        terminal.echo(f"lines read without any error: {', '.join(exact)}")
    for note in dict.fromkeys(results.note for results in runs.values()):
        names = ", ".join(name for name, results in runs.items() if results.note == note)
        terminal.echo(f"{names}: {note}")


def _table_row(name: str, check: ThresholdCheck, count: int) -> tuple[str, ...]:
    sign = "<=" if check.lower_is_better else ">="
    low, high = check.interval
    return (
        name,
        check.metric,
        _format_percent(check.score),
        f"{100 * low:.1f} - {100 * high:.1f}",
        _format_percent(check.limit, sign),
        _format_percent(check.goal, sign),
        {None: "", True: "yes", False: "NO"}[check.passed],
        str(count),
    )


def _format_percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{sign} {100 * share:.1f} %".strip()


def _parts_to_json(
    runs: Mapping[str, TaskResults], checks: Mapping[str, ThresholdCheck]
) -> list[dict[str, Any]]:
    """Convert the table to JSON values; `accuracy` is reported for every part."""
    return [
        {
            "part": name,
            "metric": check.metric,
            "score": check.score,
            "interval": check.interval,
            "threshold": check.limit,
            "goal": check.goal,
            "lower_is_better": check.lower_is_better,
            "passed": check.passed,
            "accuracy": runs[name].accuracy,
            "num_examples": runs[name].num_examples,
            "note": runs[name].note,
        }
        for name, check in checks.items()
    ]
