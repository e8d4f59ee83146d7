"""What a run is asked between its steps: held-out conversations, and the mini suite on request.

The trainer must not know evaluations or the engine; here they meet it, as a callable that it
calls with its model. The suite answers as `qwen2vl eval` does, greedily, with fewer questions of
its plain parts. Parts whose fonts are not installed are left out, and it is said.
Back up: train.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal
from qwen2vl.errors import ConfigError

if TYPE_CHECKING:
    from qwen2vl.eval.drawn import DrawnTask
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.evaluate import Probe

__all__ = ["MiniSuite", "probe_of"]

MAX_TOKENS = 64  # as in `qwen2vl eval`


def probe_of(config: TrainConfig) -> Probe:
    """Join what `config.probe` asks for.

    Raises:
        ConfigError: the suite is asked for in a run of several processes.
    """
    from qwen2vl.train.evaluate import HeldOut

    parts: list[Probe] = [HeldOut(config)] if config.probe.examples else []
    if config.probe.questions:
        parts.append(MiniSuite(config.probe.questions))

    def probe(model: Qwen2VL, processor: Processor, step: int) -> dict[str, Any]:
        return {k: v for part in parts for k, v in part(model, processor, step).items()}

    return probe


class MiniSuite:
    """A few questions of each plain part of the mini suite."""

    def __init__(self, questions: int) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "probe.questions: the mini suite needs the whole model in one process, this run "
                "shards it; set probe.questions=0 and ask exports with qwen2vl eval"
            )
        self.questions = questions
        self._tasks = _plain_tasks()

    def __call__(self, model: Qwen2VL, processor: Processor, step: int) -> Mapping[str, Any]:
        """Let `model` answer as it stands."""
        from qwen2vl.engine import LLM, SamplingParams
        from qwen2vl.eval.task import run_task

        was_training = model.training
        model.eval()
        llm = LLM.of(model, processor)
        params = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=MAX_TOKENS)
        scores: dict[str, dict[str, float]] = {}
        for task in self._tasks:
            found = run_task(task, lambda m: llm.chat(m, params)[0], limit=self.questions)
            scores[task.name] = {"share_right": found.mean}
            if found.error_rate is not None:
                scores[task.name]["character_errors"] = found.error_rate
        model.train(was_training)
        return {"mini": scores}


def _plain_tasks() -> list[DrawnTask]:
    """Build the parts that no twist has been put on, as far as their pictures can be drawn."""
    from qwen2vl.eval.mini import PARTS, build

    tasks: list[DrawnTask] = []
    for name in (name for name, part in PARTS.items() if part.section == name):
        task = build(name)
        try:
            task.check_fonts()
        except ConfigError as error:
            terminal.note(f"{name} is left out: {error}")
        else:
            tasks.append(task)
    return tasks
