"""Answers requests: a prompt and SamplingParams in, a Completion out.

Read params.py (what is asked, what comes back), sequence.py (one request's life), sampler.py
(logits -> one id), llm.py (the walk). Pictures and words arrive as a ModelInput; this floor never
opens a file or renders a message itself.
"""

from qwen2vl.engine.llm import LLM
from qwen2vl.engine.params import Completion, Delta, SamplingParams

__all__ = ["LLM", "Completion", "Delta", "SamplingParams"]
