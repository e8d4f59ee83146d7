"""EngineAnswerer: answers the items of suites with an LLM in this process, greedily.

A batch runs together (continuous batching), and shares cached prefixes and embeddings with no other
one, by a cache salt of its own: in bfloat16 they change the last digits of what follows, and so a
resumed run would not compute what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.eval.runner.run import BATCH_SIZE, SuiteAnswer
from qwen2vl.eval.task import Messages

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, Delta, EngineConfig, PreparedRequest

__all__ = ["EngineAnswerer", "context_arguments", "engine_config"]

MAX_BATCHED_TOKENS = 4096  # of a step, so that a batch of small images is prefilled together


def engine_config() -> EngineConfig:
    """Return the limits of an engine that runs a whole batch at once."""
    from qwen2vl.engine import EngineConfig

    return EngineConfig(max_num_seqs=BATCH_SIZE, max_num_batched_tokens=MAX_BATCHED_TOKENS)


def context_arguments(folder: Path, max_model_len: int | None) -> dict[str, Any]:
    """Return the arguments of an LLM whose context holds the prompts of a suite.

    An image of many tokens takes few positions (M-RoPE), so a context beyond the model's
    max_position_embeddings is well defined.

    Args:
        folder: of the model.
        max_model_len: tokens that the suite needs; None: no more than any model has.
    """
    from qwen2vl.weights import read_config

    if max_model_len is None:
        return {}
    if max_model_len <= read_config(folder).text.max_position_embeddings:
        return {}
    return {"hf_overrides": {"max_position_embeddings": max_model_len}}


class EngineAnswerer:
    """Answers greedily, without the checkpoint's generation defaults. (Implements Answerer.)"""

    def __init__(self, llm: LLM, max_tokens: int) -> None:
        """Take the model and the limit of an answer, in tokens."""
        from qwen2vl.engine import SamplingParams

        self._llm = llm
        self._salts = count(1)  # one for each batch
        self._params = SamplingParams(
            temperature=0, repetition_penalty=1, max_tokens=max_tokens, logprobs=0
        )

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer a batch.

        Raises:
            Qwen2VLError: as `LLM.prepare` and `LLM.generate_prepared` do.
        """

        def on_delta(delta: Delta) -> None:
            if delta.finish_reason is not None:
                on_answer()

        salt = next(self._salts).to_bytes(8, "big")
        prepared = [self._prepare(messages, salt) for messages in batch]
        completions = self._llm.generate_prepared(prepared, on_delta=on_delta)
        return [
            SuiteAnswer(
                text=completion.text,
                logprob=completion.cumulative_logprob,
                prompt_tokens=completion.prompt_tokens,
            )
            for completion in completions
        ]

    def _prepare(self, messages: Messages, salt: bytes) -> PreparedRequest:
        prepared = self._llm.prepare(messages, self._params)
        return prepared._replace(prompt=replace(prepared.prompt, cache_salt=salt))
