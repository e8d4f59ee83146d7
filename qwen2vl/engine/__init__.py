"""Answers requests: a prompt and SamplingParams in, a Completion out.

Read params.py (what is asked, what comes back), sequence.py (one request's life), blocks.py,
plan.py and scheduler.py (who runs now, and where), runner.py (a plan becomes tensors), sampler.py
(logits -> one id), grammar.py and matcher.py (answers of a given form), llm.py (the wheel).
Pictures and words arrive as a ModelInput; this floor never opens a file or renders a message.
"""

from qwen2vl.engine.async_llm import AsyncLLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.llm import LLM
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.params import SamplingParams

__all__ = ["LLM", "AsyncLLM", "Completion", "Delta", "EngineConfig", "Grammar", "SamplingParams"]
