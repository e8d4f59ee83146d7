"""Runs of a suite by a model, by its blind control and by peers, each with a results file.

A run answers some parts of a suite, and writes FOLDER/SUITE.NAME.jsonl, which a repeated command
continues. A peer is an Answerer, like a model, so that all are scored by the same code on the same
pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen2vl.cli.evaluation.engine_answers import (
    EngineAnswerer,
    context_arguments,
    engine_config,
)
from qwen2vl.cli.evaluation.model_identity import local_identity
from qwen2vl.engine import LLM
from qwen2vl.errors import ConfigError
from qwen2vl.eval.runner.results_file import ResultsHeader, open_results
from qwen2vl.eval.runner.run import Answerer, num_missing, run_items
from qwen2vl.eval.runner.scores import ALL, PartScore, score_suite
from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.task import ExampleResult
from qwen2vl.weights import resolve_model

__all__ = ["Row", "SuiteRun", "execute", "is_accuracy", "model_runs"]


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """What answers some parts of a suite."""

    name: str  # of the results file: "nano", "nano-blind", "tesseract-2x"
    column: str  # of the page: "nano", "blind", "Tesseract"
    identity: Mapping[str, Any]  # of the model, in the header of the results file
    open_answerer: Callable[[str], Answerer]  # for a part
    parts: Sequence[str]
    blind: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """The score of one part in one run."""

    suite: str
    digest: str  # of its items
    part: str
    column: str
    run: str
    metric: str
    score: float
    interval: tuple[float, float]
    chance: float
    num_examples: int
    limit: float | None = None  # of a control: the highest accuracy that guessing explains
    prompt_tokens: float | None = None
    refusals: Mapping[str, Any] | None = field(default=None)
    calibration_error: float | None = None  # of the whole run


def model_runs(suite: Suite, model: str) -> Iterator[SuiteRun]:
    """Return the runs of a model: with its images, and as the blind control."""
    identity = local_identity({"model": model, "adapters": (), "dtype": "auto"})
    loaded: list[Answerer] = []

    def open_answerer(part: str) -> Answerer:
        if not loaded:
            context = context_arguments(resolve_model(model), suite.max_model_len)
            llm = LLM(model, engine=engine_config(), **context)
            loaded.append(EngineAnswerer(llm, suite.max_tokens))
        return loaded[0]

    for blind, parts in ((False, suite.parts), (True, suite.blind_parts)):
        yield SuiteRun(
            name=f"{identity['name']}{'-blind' if blind else ''}",
            column="blind" if blind else identity["name"],
            identity=identity,
            open_answerer=open_answerer,
            parts=parts,
            blind=blind,
        )


def execute(suite: Suite, run: SuiteRun, folder: Path, limit: int | None = None) -> list[Row]:
    """Answer what has no answer yet, and return the scores by part."""
    header = ResultsHeader(
        suite=suite.name,
        digest=suite.digest,
        blind=run.blind,
        model=run.identity,
        settings={"temperature": 0, "max_tokens": suite.max_tokens},
    )
    answered: list[ExampleResult] = []
    missing_parts = False
    with open_results(folder / f"{suite.name}.{run.name}.jsonl", header) as results:
        for part in run.parts:
            try:
                suite.check_part(part)
            except ConfigError as error:
                print(f"{suite.name} {part} is left out: {error}", file=sys.stderr)
                missing_parts = True
                continue
            items = suite.items([part], blind=run.blind)[:limit]
            if num_missing(items, results):
                run_items(suite, items, run.open_answerer(part), results)
                print(f"{suite.name} {run.name} {part}: {len(items)}", file=sys.stderr)
            answered += [results.results[item.id] for item in items]
    scores = score_suite(suite, answered, blind=run.blind)
    calibration = scores.calibration
    return [
        Row(
            suite=suite.name,
            digest=suite.digest[:16],
            part=row.part,
            column=run.column,
            run=run.name,
            metric=row.check.metric,
            score=row.check.score,
            interval=row.check.interval,
            chance=row.chance,
            num_examples=row.results.num_examples,
            limit=row.check.limit if row.check.lower_is_better and is_accuracy(row) else None,
            prompt_tokens=row.prompt_tokens,
            refusals=None if row.refusals is None else asdict(row.refusals),
            calibration_error=None if calibration is None else calibration.error,
        )
        for row in scores.rows
        if row.part != ALL or (run.parts == suite.parts and not missing_parts)
    ]


def is_accuracy(row: PartScore) -> bool:
    """Return whether a part is measured by its accuracy."""
    return row.check.metric == "accuracy"
