"""Inference engine: continuous batching, prefix caching, speculative decoding, multi-LoRA.

Inputs are prompts (ModelInput) and SamplingParams, outputs are Completions. Entry points: llm.py
(offline), async_llm.py (asyncio). A request (request.py) is validated (validation.py), scheduled
(scheduler/) and run (runner.py, decode/) over its KV cache (kv_cache/) and vision embeddings
(encoder_cache/); sampling/ selects tokens, also under a grammar (structured output). Files are read
and messages are rendered by the processor, not here.
"""

from qwen2vl.engine.async_engine.async_stream import AsyncDeltaStream
from qwen2vl.engine.async_llm import AsyncLLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.llm import LLM
from qwen2vl.engine.llm_engine import DeltaStream
from qwen2vl.engine.outputs import Completion, Delta, ItemReport, TokenLogprob
from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.stats import EngineStats
from qwen2vl.engine.validation import PreparedRequest

__all__ = [
    "LLM",
    "AsyncDeltaStream",
    "AsyncLLM",
    "Completion",
    "Delta",
    "DeltaStream",
    "EngineConfig",
    "EngineStats",
    "Grammar",
    "ItemReport",
    "PreparedRequest",
    "SamplingParams",
    "TokenLogprob",
]
