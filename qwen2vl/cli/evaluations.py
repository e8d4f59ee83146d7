"""Evaluation during training: held-out loss, and optionally the mini suite.

`build_evaluation` returns the callable that `qwen2vl.train.loop.train` calls every
`evaluation.eval_steps` steps; the train package itself imports neither the engine nor the suites.
The suite `synthetic`, `mini` in the metrics, is answered as by `qwen2vl eval`, with
`evaluation.num_questions` questions of each base part. Parts whose fonts are not installed are
skipped with a note.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal
from qwen2vl.errors import ConfigError

if TYPE_CHECKING:
    from qwen2vl.eval.suites.suite import Suite, SuiteItem
    from qwen2vl.eval.task import TaskResults
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.evaluate import EvaluationFunction

__all__ = ["MiniSuite", "build_evaluation"]


def build_evaluation(config: TrainConfig) -> EvaluationFunction:
    """Combine the evaluations that `config.evaluation` enables.

    Raises:
        ConfigError: the suite is enabled in a run of several processes.
    """
    from qwen2vl.train.evaluate import Evaluator

    parts: list[EvaluationFunction] = [Evaluator(config)] if config.evaluation.num_examples else []
    if config.evaluation.num_questions:
        parts.append(MiniSuite(config.evaluation.num_questions))

    def evaluate(model: Qwen2VL, processor: Processor, step: int) -> dict[str, Any]:
        return {k: v for part in parts for k, v in part(model, processor, step).items()}

    return evaluate


class MiniSuite:
    """Evaluation on the first questions of each base part of the suite `synthetic`."""

    def __init__(self, num_questions: int) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "evaluation.num_questions: the mini suite needs the whole model in one process, "
                "but this run shards it; set evaluation.num_questions=0 and evaluate exported "
                "checkpoints with qwen2vl eval"
            )
        from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite

        self._suite = SyntheticSuite()
        self._items = _first_items(self._suite, _base_parts(self._suite), num_questions)

    def __call__(self, model: Qwen2VL, processor: Processor, step: int) -> Mapping[str, Any]:
        """Generate answers with the current weights and return the scores by part."""
        from qwen2vl.cli.evaluation.engine_answers import EngineAnswerer, engine_config
        from qwen2vl.engine import LLM
        from qwen2vl.eval.runner.results_file import ResultsFile
        from qwen2vl.eval.runner.run import run_items
        from qwen2vl.eval.runner.scores import ALL, score_suite

        was_training = model.training
        model.eval()
        answerer = EngineAnswerer(
            LLM(model, processor, engine=engine_config()), self._suite.max_tokens
        )
        results = ResultsFile()
        run_items(self._suite, self._items, answerer, results)
        model.train(was_training)
        rows = score_suite(self._suite, results.results.values(), blind=False).rows
        return {"mini": {row.part: _to_metrics(row.results) for row in rows if row.part != ALL}}


def _to_metrics(results: TaskResults) -> dict[str, float]:
    error_rate = results.character_error_rate
    metrics = {"accuracy": results.accuracy}
    return metrics if error_rate is None else {**metrics, "character_error_rate": error_rate}


def _first_items(suite: Suite, parts: Sequence[str], count: int) -> list[SuiteItem]:
    return [item for part in parts for item in suite.items([part])[:count]]


def _base_parts(suite: Suite) -> list[str]:
    """Return the parts with unmodified cases, except those whose fonts are not installed."""
    from qwen2vl.eval.mini import PARTS

    parts: list[str] = []
    for name in (name for name, part in PARTS.items() if part.section == name):
        try:
            suite.check_part(name)
        except ConfigError as error:
            terminal.note(f"{name} is left out: {error}")
        else:
            parts.append(name)
    return parts
