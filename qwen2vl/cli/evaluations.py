"""Evaluation during training: held-out loss, and optionally the mini suite.

`build_evaluation` returns the callable that `qwen2vl.train.loop.train` calls every
`evaluation.eval_steps` steps; the train package itself imports neither the engine nor the suites.
The mini suite is answered greedily as by `qwen2vl eval`, with `evaluation.num_questions` questions
of each base part. Parts whose fonts are not installed are skipped with a note.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal
from qwen2vl.errors import ConfigError

if TYPE_CHECKING:
    from qwen2vl.eval.synthetic import SyntheticTask
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.evaluate import EvaluationFunction

__all__ = ["MiniSuite", "build_evaluation"]

MAX_TOKENS = 64  # as in `qwen2vl eval`


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
    """Evaluation on the first questions of each base part of the mini suite."""

    def __init__(self, num_questions: int) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "evaluation.num_questions: the mini suite needs the whole model in one process, "
                "but this run shards it; set evaluation.num_questions=0 and evaluate exported "
                "checkpoints with qwen2vl eval"
            )
        self.num_questions = num_questions
        self._tasks = _base_tasks()

    def __call__(self, model: Qwen2VL, processor: Processor, step: int) -> Mapping[str, Any]:
        """Generate answers with the current weights and return the scores by part."""
        from qwen2vl.engine import LLM, SamplingParams
        from qwen2vl.eval.task import run_task

        was_training = model.training
        model.eval()
        llm = LLM(model, processor)
        params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=MAX_TOKENS)
        scores: dict[str, dict[str, float]] = {}
        for task in self._tasks:
            results = run_task(task, lambda m: llm.chat(m, params)[0], limit=self.num_questions)
            scores[task.name] = {"accuracy": results.accuracy}
            if results.character_error_rate is not None:
                scores[task.name]["character_error_rate"] = results.character_error_rate
        model.train(was_training)
        return {"mini": scores}


def _base_tasks() -> list[SyntheticTask]:
    """Build the parts with unmodified cases, except those whose fonts are not installed."""
    from qwen2vl.eval.mini import PARTS, build_task

    tasks: list[SyntheticTask] = []
    for name in (name for name, part in PARTS.items() if part.section == name):
        task = build_task(name)
        try:
            task.check_fonts()
        except ConfigError as error:
            terminal.note(f"{name} is left out: {error}")
        else:
            tasks.append(task)
    return tasks
