"""Statistics of a running engine: `EngineStats`, a snapshot, and `EngineCounters`, its totals.

The scheduler and the encoder cache add to the counters, which outlive an engine core, so they never
decrease. Only the thread that runs the engine writes them; any thread may read them.
(vLLM: SchedulerStats, PrefixCacheStats.)
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineCounters", "EngineStats"]


@dataclass(slots=True, kw_only=True)
class EngineCounters:
    """Totals since the engine was created; of all its cores."""

    prefix_cache_queries: int = 0  # prompt tokens of requests when they were first scheduled
    prefix_cache_hits: int = 0  # of them, found in the prefix cache
    encoder_cache_queries: int = 0  # images and videos whose embeddings were needed
    encoder_cache_hits: int = 0  # of them, found encoded: in memory, on disk, or in use
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # of speculative decoding
    num_accepted_tokens: int = 0  # of them, equal to the token that was sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The state of an engine at one moment, and its totals, which never decrease."""

    num_running: int = 0  # requests
    num_waiting: int = 0  # requests that were submitted and are not running
    kv_cache_usage: float = 0.0  # fraction of the KV cache that running requests occupy
    encoder_cache_bytes: int = 0  # vision embeddings in memory
    item_cache_bytes: int = 0  # preprocessed images and videos in memory
    prefix_cache_queries: int = 0  # this and the following as in EngineCounters
    prefix_cache_hits: int = 0
    encoder_cache_queries: int = 0
    encoder_cache_hits: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
