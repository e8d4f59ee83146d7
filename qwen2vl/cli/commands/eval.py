"""`qwen2vl eval`: ask a model the questions of a suite, and hold the scores against their bars.

A table for people or one JSON object, and on request every single answer as JSON lines. Answers
are greedy. Ends with 0 when the run is complete, whatever the scores are. Parts whose fonts are
not installed are left out, and it is said. Next room: eval/mini.py, what is asked.
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
    from qwen2vl.eval.drawn import DrawnTask
    from qwen2vl.eval.mini import Verdict
    from qwen2vl.eval.task import Ask, Results

__all__ = ["eval"]

MAX_TOKENS = 64  # the longest right answer, a phrase with its box, has about 50 in nano's alphabet


@click.command()
@click.option("--suite", type=click.Choice(["mini"]), default="mini", show_default=True)
@click.option(
    "--task",
    "patterns",
    multiple=True,
    metavar="NAME",
    help="A part of the suite, or a pattern (text*); may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Ask only so many questions of a part.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-o", "output", metavar="FILE", help="Write every answer here, as JSON lines.")
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
    """Score a model on questions with known answers."""
    from qwen2vl.eval.mini import judge
    from qwen2vl.eval.task import write_results

    if output:
        terminal.check_folder_of(output)
    tasks = _tasks(patterns)
    opened = options.open_model(given)
    start = time.perf_counter()
    runs = _run(tasks, _greedy(opened), limit)
    seconds = time.perf_counter() - start
    if output:
        write_results(Path(output), runs.values())
    verdicts = judge(runs)
    if as_json:
        about = {"suite": suite, "model": opened.name, "limit": limit, "seconds": seconds}
        terminal.say_json({**about, "parts": _as_list(runs, verdicts)})
    else:
        _show(runs, verdicts)
        count = sum(results.count for results in runs.values())
        terminal.say(f"{count:,} questions in {terminal.person_seconds(seconds)}, greedy answers")
    opened.say_what_it_can()


def _tasks(patterns: tuple[str, ...]) -> list[DrawnTask]:
    """Build what was asked for; parts whose fonts are missing are left out aloud."""
    from qwen2vl.eval.mini import build, select

    tasks = [build(name) for name in select(patterns)]
    drawable: list[DrawnTask] = []
    problem = None
    for task in tasks:
        try:
            task.check_fonts()
        except ConfigError as error:
            problem = error
            terminal.note(f"{task.name} is left out: {error}")
        else:
            drawable.append(task)
    if problem is not None and not drawable:
        raise problem
    return drawable


def _greedy(opened: options.Opened) -> Ask:
    """Take the likeliest token at each step, whatever habits the checkpoint has."""
    import qwen2vl

    params = qwen2vl.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=MAX_TOKENS)
    return lambda messages: opened.llm.chat(messages, params)[0]


def _run(tasks: list[DrawnTask], ask: Ask, limit: int | None) -> dict[str, Results]:
    from qwen2vl.eval.task import run_task

    runs: dict[str, Results] = {}
    total = sum(len(task.cases[:limit]) for task in tasks)
    done = count(1)
    with terminal.progress() as step:
        for task in tasks:
            name = task.name
            step(name, sum(results.count for results in runs.values()), total)
            runs[name] = run_task(
                task, ask, limit=limit, on_result=lambda _, name=name: step(name, next(done), total)
            )
    return runs


def _show(runs: Mapping[str, Results], verdicts: Mapping[str, Verdict]) -> None:
    titles = ("part", "measure", "score", "95 %", "bar", "goal", "met", "questions")
    rows = [_row(name, verdict, runs[name].count) for name, verdict in verdicts.items()]
    terminal.say_table(titles, rows, words=("part", "measure"))
    exact = [f"{name} {_percent(r.mean)}" for name, r in runs.items() if r.error_rate is not None]
    if exact:
        terminal.say(f"lines read without any error: {', '.join(exact)}")
    for note in dict.fromkeys(results.note for results in runs.values()):
        names = ", ".join(name for name, results in runs.items() if results.note == note)
        terminal.say(f"{names}: {note}")


def _row(name: str, verdict: Verdict, count: int) -> tuple[str, ...]:
    sign = "<=" if verdict.at_most else ">="
    low, high = verdict.interval
    return (
        name,
        verdict.measure,
        _percent(verdict.score),
        f"{100 * low:.1f} - {100 * high:.1f}",
        _percent(verdict.floor, sign),
        _percent(verdict.goal, sign),
        {None: "", True: "yes", False: "NO"}[verdict.met],
        str(count),
    )


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{sign} {100 * share:.1f} %".strip()


def _as_list(runs: Mapping[str, Results], verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """Put the table into JSON's terms; beside character errors stands the share without any."""
    return [
        {
            "part": name,
            "measure": verdict.measure,
            "score": verdict.score,
            "interval": verdict.interval,
            "bar": verdict.floor,
            "goal": verdict.goal,
            "at_most": verdict.at_most,
            "met": verdict.met,
            "share_right": runs[name].mean,
            "count": runs[name].count,
            "note": runs[name].note,
        }
        for name, verdict in verdicts.items()
    ]
