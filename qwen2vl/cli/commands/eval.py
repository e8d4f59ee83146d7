"""`qwen2vl eval`: evaluate a model on a suite with known answers, and compare it with another run.

Prints a table or one JSON object. --output is a results file with every answer, which an
interrupted run continues. Decoding is greedy. The exit code is 0 when the run is complete, whatever
the scores are. Parts that cannot be drawn here (fonts, datasets or libraries are absent), or whose
prompts are too long for the server, are left out with a note.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qwen2vl.cli import options, terminal
from qwen2vl.errors import ConfigError, InputError

if TYPE_CHECKING:
    from qwen2vl.cli.evaluation.server_answers import ServerAnswerer
    from qwen2vl.eval.runner.comparison import PairedComparison
    from qwen2vl.eval.runner.results_file import ResultsFile, ResultsHeader
    from qwen2vl.eval.runner.run import Answerer
    from qwen2vl.eval.suites.suite import Suite, SuiteItem
    from qwen2vl.eval.task import ExampleResult

__all__ = ["eval"]

# Names of the suites, and a former one; eval/suites/registry.py opens them.
SUITES = (
    *("synthetic", "easy-vqa", "fashion-mnist"),
    *("named-pictures", "lines", "any-size", "honesty", "wordings", "clips"),
    "mini",
)
# Options of a model that is loaded here; a server was started with its own.
LOCAL_OPTIONS = ("device", "dtype", "adapters", "quantize", "kv_cache_dtype", "compile")
MAX_NAMES = 2  # of parts that are left out for one reason, in a note
DEFAULT_CONCURRENCY = 16  # requests that `qwen2vl serve` runs at the same time


@click.command()
@click.option(
    "--suite",
    type=click.Choice(SUITES),
    default=SUITES[0],
    show_default=True,
    help="Suite of questions; mini is the former name of synthetic.",
)
@click.option(
    "--task",
    "patterns",
    multiple=True,
    metavar="NAME",
    help="Part of the suite, or a glob pattern (text*); repeatable. Default: all parts.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Evaluate only the first LIMIT questions of a part: a quick look, no fair sample.",
)
@click.option(
    "--blind",
    is_flag=True,
    help="Control: ask each question about the image of another question of its kind.",
)
@click.option(
    "--server",
    metavar="URL",
    help="Evaluate a model of an OpenAI-compatible server, such as `qwen2vl serve`; --model is "
    "then its name there (default: the first).",
)
@click.option(
    "--api-key",
    metavar="KEY",
    envvar="QWEN2VL_API_KEY",
    show_envvar=True,
    help="API key of the server.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    default=DEFAULT_CONCURRENCY,
    show_default=True,
    help="Requests that the server gets at a time.",
)
@click.option(
    "--compare",
    metavar="RESULTS",
    help="Compare with the results file of another run, question by question: differences with "
    "95 % intervals, and p-values.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object in place of the table."
)
@click.option(
    "-o",
    "--output",
    metavar="RESULTS",
    help="Results file with every answer (JSON lines); one that the same command has begun is "
    "continued.",
)
@options.model_options
@terminal.debug_option
def eval(
    suite: str,
    patterns: tuple[str, ...],
    limit: int | None,
    blind: bool,
    server: str | None,
    compare: str | None,
    as_json: bool,
    output: str | None,
    **given: Any,
) -> None:
    """Evaluate a model on a suite of questions with known answers.

    \b
    qwen2vl eval -o nano.jsonl
    qwen2vl eval --model DIR -o other.jsonl --compare nano.jsonl
    """
    from qwen2vl.eval.runner.results_file import open_results
    from qwen2vl.eval.runner.run import num_missing
    from qwen2vl.eval.runner.scores import score_suite
    from qwen2vl.eval.suites.registry import open_suite, select_suite_parts

    options.check_unnamed_adapter(given)
    if output:
        terminal.check_parent_folder(output)
    opened = open_suite(suite)
    parts = select_suite_parts(opened, patterns, blind=blind)
    other = None if compare is None else _read_compared(Path(compare), opened)
    source = _choose_source(opened, server, given)
    parts = _drawable_parts(opened, _fitting_parts(opened, parts, source))
    items = _select_items(opened, parts, limit, blind)
    header = _header(opened, blind, source)
    with open_results(Path(output) if output else None, header) as results:
        num_new, start = num_missing(items, results), time.perf_counter()
        try:
            if num_new:
                _run(opened, items, source, results)
        except KeyboardInterrupt:
            _note_interruption(items, results, output)
            raise
        seconds = time.perf_counter() - start
        answered = {item.id: results.results[item.id] for item in items}
    scores = score_suite(opened, answered.values(), blind=blind)
    comparison = None if other is None else _compare(answered, other, opened)
    if as_json:
        _echo_json(opened, header, limit, seconds, scores, comparison)
        return
    from qwen2vl.cli.evaluation.report import print_comparison, print_scores

    print_scores(scores)
    if comparison is not None:
        print_comparison(comparison, str(compare))
    found = len(items) - num_new
    kept = f"; {found:,} of them were in {output}" if found else ""
    first = f", first {limit:,} of each part" if limit else ""
    terminal.echo(
        f"{opened.name} {opened.digest:.8}{' blind' if blind else ''}, {header.model['name']}: "
        f"{len(items):,} questions{first} in {terminal.format_duration(seconds)}, greedy "
        f"answers{kept}"
    )


def _note_interruption(
    items: Sequence[SuiteItem], results: ResultsFile, output: str | None
) -> None:
    from qwen2vl.eval.runner.run import num_missing

    if output is not None:
        done = len(items) - num_missing(items, results)
        terminal.note(
            f"{done:,} of {len(items):,} answers are in {output}; the same command continues"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the answers come from: a server, or a model that is loaded when it is needed."""

    identity: dict[str, Any]
    given: dict[str, Any]
    server: ServerAnswerer | None


def _select_items(
    suite: Suite, parts: Sequence[str], limit: int | None, blind: bool
) -> list[SuiteItem]:
    """Return the items of the parts, at most `limit` of each part."""
    items: list[SuiteItem] = []
    counts = dict.fromkeys(parts, 0)
    for item in suite.items(parts, blind=blind):
        counts[item.part] += 1
        if limit is None or counts[item.part] <= limit:
            items.append(item)
    return items


def _drawable_parts(suite: Suite, parts: Sequence[str]) -> list[str]:
    """Return the parts that can be drawn; notes those whose fonts, data or libraries are absent."""
    drawable: list[str] = []
    left_out: dict[str, list[str]] = {}  # reason -> parts
    last_error: ConfigError | None = None
    for part in parts:
        try:
            suite.check_part(part)
        except ConfigError as error:
            left_out.setdefault(str(error), []).append(part)
            last_error = error
        else:
            drawable.append(part)
    if last_error is not None and not drawable:
        raise last_error
    for reason, names in left_out.items():
        terminal.note(f"{_join(names)} left out: {reason}")
    return drawable


def _join(names: Sequence[str]) -> str:
    """Return "text is", "text and lines are", or "text, lines and 11 more parts are"."""
    if len(names) <= MAX_NAMES:
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
    return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more parts are"


def _fitting_parts(suite: Suite, parts: Sequence[str], source: _Source) -> Sequence[str]:
    """Return the parts whose prompts fit into the context of the server; notes the others.

    How long a prompt is only the server knows. Those that need more than usual are the parts that
    are compared with another one: they have the same pictures without shrinking them.
    """
    needed = suite.max_model_len
    if source.server is None or needed is None:
        return parts
    context = source.server.max_model_len()
    if context is None or context >= needed:
        return parts
    long_parts = {part for part, _ in suite.paired_parts}.intersection(parts)
    fitting = [part for part in parts if part not in long_parts]
    reason = (
        f"the longest prompts need a context of {needed:,} tokens, that of {source.server.model} "
        f"on the server has {context:,}; start the server with --max-model-len {needed} if the "
        "model has that many, or evaluate the model here, without --server"
    )
    if not fitting:
        raise InputError(f"{', '.join(parts)}: {reason}")
    if long_parts:
        left_out = [part for part in parts if part in long_parts]
        terminal.note(f"{', '.join(left_out)}: left out: {reason}")
    return fitting


def _read_compared(path: Path, suite: Suite) -> dict[str, ExampleResult]:
    """Read the results of another run of the same suite."""
    from qwen2vl.eval.runner.results_file import read_results

    header, results = read_results(path)
    if header.suite != suite.name or header.digest != suite.digest:
        raise InputError(
            f"--compare {path}: has results of {header.suite} {header.digest:.8}, this is "
            f"{suite.name} {suite.digest:.8}; only runs of the same questions can be compared"
        )
    return results


def _compare(
    answered: dict[str, ExampleResult], other: dict[str, ExampleResult], suite: Suite
) -> list[PairedComparison]:
    from qwen2vl.eval.runner.comparison import compare_results, pooled_parts

    comparison = compare_results(answered, other, suite.parts, pooled_parts(suite))
    if not comparison:
        raise InputError("--compare: the two runs have no question in common; run the same parts")
    return comparison


def _choose_source(suite: Suite, server: str | None, given: dict[str, Any]) -> _Source:
    """Connect to the server, or identify the model; nothing is loaded."""
    from qwen2vl.cli.evaluation.model_identity import local_identity, server_identity

    if server is None:
        if _is_given("api_key") or _is_given("concurrency"):
            raise click.UsageError("--api-key and --concurrency are for a server: --server URL")
        return _Source(identity=local_identity(given), given=given, server=None)
    from qwen2vl.cli.chat.server_connection import ServerConnection
    from qwen2vl.cli.evaluation.server_answers import ServerAnswerer

    for option in LOCAL_OPTIONS:
        if _is_given(option):
            flag = "--adapter" if option == "adapters" else f"--{option.replace('_', '-')}"
            raise click.UsageError(
                f"{flag} is an option of a model that is loaded here; with --server the server was "
                "started with its own"
            )
    connection = ServerConnection(server, given["api_key"])
    click.get_current_context().call_on_close(connection.close)
    answerer = ServerAnswerer(
        connection,
        given["model"] if _is_given("model") else None,
        max_tokens=suite.max_tokens,
        concurrency=given["concurrency"],
    )
    return _Source(identity=server_identity(answerer.model), given=given, server=answerer)


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def _header(suite: Suite, blind: bool, source: _Source) -> ResultsHeader:
    from qwen2vl.eval.runner.results_file import ResultsHeader

    return ResultsHeader(
        suite=suite.name,
        digest=suite.digest,
        blind=blind,
        model=source.identity,
        settings={"temperature": 0, "max_tokens": suite.max_tokens},
    )


def _run(suite: Suite, items: Sequence[SuiteItem], source: _Source, results: ResultsFile) -> None:
    """Answer the items that have no result yet."""
    from qwen2vl.eval.runner.run import run_items

    answerer = source.server or _load_answerer(suite, source.given)
    with terminal.progress_bar() as update:
        run_items(suite, items, answerer, results, on_progress=update)


def _load_answerer(suite: Suite, given: dict[str, Any]) -> Answerer:
    from qwen2vl.cli.evaluation.engine_answers import (
        EngineAnswerer,
        context_arguments,
        engine_config,
    )
    from qwen2vl.weights import resolve_model

    context = context_arguments(resolve_model(given["model"]), suite.max_model_len)
    loaded = options.load_model_from_options(given, engine=engine_config(), **context)
    return EngineAnswerer(loaded.llm, suite.max_tokens)


def _echo_json(
    suite: Suite,
    header: ResultsHeader,
    limit: int | None,
    seconds: float,
    scores: Any,
    comparison: Sequence[PairedComparison] | None,
) -> None:
    from qwen2vl.cli.evaluation.report import comparison_to_json, scores_to_json

    terminal.echo_json(
        {
            "suite": suite.name,
            "digest": header.digest,
            "model": header.model["name"],
            "identity": dict(header.model),
            "blind": header.blind,
            "limit": limit,
            "seconds": seconds,
            **scores_to_json(scores),
            **({} if comparison is None else {"comparison": comparison_to_json(comparison)}),
        }
    )
