"""Prometheus metrics, with vLLM's names after the prefix `qwen2vl:`.

Counters and histograms are observed by the handlers when a request ends; gauges and cache counters
are read from `AsyncLLM.stats()` when /metrics is asked for. The registry is the server's own, so
that several servers in one process, as in tests, do not share series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from qwen2vl.engine import Completion, EngineStats

__all__ = ["CONTENT_TYPE", "COUNTERS", "GAUGES", "REQUEST_TOKENS", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "qwen2vl:"

# Tokens of the request that runs, for the access log, which opens the dict.
REQUEST_TOKENS: ContextVar[dict[str, int] | None] = ContextVar("REQUEST_TOKENS", default=None)

# vLLM's buckets, with finer ones below 10 ms.
LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)

# Attribute of EngineStats -> name and description; all are of vLLM where it has them.
GAUGES = {
    "num_running": ("num_requests_running", "Sequences that the engine runs."),
    "num_waiting": ("num_requests_waiting", "Sequences that wait for the engine."),
    "kv_cache_usage": ("kv_cache_usage_perc", "Used share of the KV cache; 1 is full."),
    "encoder_cache_bytes": ("encoder_cache_bytes", "Bytes of vision embeddings in memory."),
    "item_cache_bytes": ("item_cache_bytes", "Bytes of preprocessed images and videos."),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "encoder_cache_queries": ("mm_cache_queries", "Images and videos looked up."),
    "encoder_cache_hits": ("mm_cache_hits", "Images and videos found in the encoder cache."),
    "num_preemptions": ("num_preemptions", "Preemptions of requests by the scheduler."),
    "num_draft_tokens": ("spec_decode_num_draft_tokens", "Tokens that were drafted."),
    "num_accepted_tokens": ("spec_decode_num_accepted_tokens", "Of them, accepted ones."),
}
PHASES = {
    "queue": ("request_queue_time_seconds", "Time between submission and the first step."),
    "process": ("request_preprocess_time_seconds", "Time of preprocessing."),
    "vision": ("request_encoder_time_seconds", "Time of the vision encoder."),
    "prefill": ("request_prefill_time_seconds", "Time of prefill."),
    "decode": ("request_decode_time_seconds", "Time of decoding."),
}


class ServerMetrics:
    """The metrics of one server."""

    def __init__(
        self, model_name: str = "nano", stats: Callable[[], EngineStats] | None = None
    ) -> None:
        """Create the metrics.

        Args:
            model_name: label `model_name` of all series.
            stats: of the engine; None: no metrics of an engine.
        """
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from the request to its first token."
        )
        self._time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between two tokens of a sample, its first token aside.",
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Time from the request to its last token."
        )
        self._phases = {
            phase: self._histogram(name, text) for phase, (name, text) in PHASES.items()
        }
        self._prompt_size = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS
        )
        self._output_size = self._histogram(
            "request_generation_tokens", "Output tokens of a sample.", TOKEN_BUCKETS
        )
        self._success = self._counter(
            "request_success", "Samples that ended, by reason.", "finished_reason"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all requests.")
        self._generation_tokens = self._counter("generation_tokens", "Output tokens.")
        self._rejected = self._counter("rejected", "Requests refused for load.", "reason")
        self._restarts = self._counter("engine_restarts", "Restarts of an engine that died.")
        self._http_requests = self._counter(
            "http_requests",
            "HTTP requests, by method, route and status.",
            "method",
            "route",
            "status",
        )
        self._http_seconds = self._histogram(
            "http_request_duration_seconds", "Time of an HTTP request, with its response."
        )
        if stats is not None:
            self.registry.register(_EngineCollector(stats, model_name))

    def observe_completions(
        self,
        completions: Sequence[Completion],
        *,
        e2e_seconds: float,
        first_token_seconds: float | None = None,
    ) -> None:
        """Count a finished request.

        Args:
            completions: all samples of one prompt.
            e2e_seconds: from the arrival of the request to its last token.
            first_token_seconds: to its first token; None: not known, estimated by the phases.
        """
        if not completions:
            return
        first = completions[0]
        num_generated = sum(len(completion.token_ids) for completion in completions)
        if (tokens := REQUEST_TOKENS.get()) is not None:
            tokens["prompt_tokens"] = tokens.get("prompt_tokens", 0) + first.prompt_tokens
            tokens["completion_tokens"] = tokens.get("completion_tokens", 0) + num_generated
        for phase, histogram in self._phases.items():
            histogram.observe(getattr(first.seconds, phase))
        if first_token_seconds is None:
            first_token_seconds = max(0.0, e2e_seconds - first.seconds.decode)
        self._time_to_first_token.observe(first_token_seconds)
        self._e2e.observe(e2e_seconds)
        self._prompt_size.observe(first.prompt_tokens)
        self._prompt_tokens.inc(first.prompt_tokens)
        self._generation_tokens.inc(num_generated)
        for completion in completions:
            count = len(completion.token_ids)
            self._output_size.observe(count)
            self._success.labels(finished_reason=completion.finish_reason).inc()
            if count > 1:
                self._time_per_output_token.observe(completion.seconds.decode / (count - 1))

    def observe_prompts(self, prompt_tokens: Sequence[int]) -> None:
        """Count the prompts of a request that generates nothing, by their numbers of tokens."""
        for count in prompt_tokens:
            self._prompt_size.observe(count)
        total = sum(prompt_tokens)
        self._prompt_tokens.inc(total)
        if (tokens := REQUEST_TOKENS.get()) is not None:
            tokens["prompt_tokens"] = tokens.get("prompt_tokens", 0) + total

    def reject(self, reason: str) -> None:
        """Count a request that was refused for load; the reason is one of a fixed set."""
        self._rejected.labels(reason=reason).inc()

    def count_restart(self) -> None:
        """Count a restart of the engine."""
        self._restarts.inc()

    def observe_http(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request; `route` is one of the application's paths, or "other"."""
        known = method if method in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self._http_requests.labels(method=known, route=route, status=str(status)).inc()
        self._http_seconds.observe(seconds)

    def expose(self) -> bytes:
        """Return all series in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> Histogram:
        histogram = Histogram(
            PREFIX + name, text, ["model_name"], buckets=buckets, registry=self.registry
        )
        return histogram.labels(model_name=self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        counter = Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)
        if labels:
            return _Labeled(counter, self._model_name)
        return counter.labels(model_name=self._model_name)


class _Labeled:
    """A counter whose label model_name is set; `labels` sets the others."""

    def __init__(self, counter: Counter, model_name: str) -> None:
        self._counter = counter
        self._model_name = model_name
        self._children: dict[tuple[str, ...], Counter] = {}

    def labels(self, **labels: str) -> Counter:
        """Return the series of these labels; kept, because looking it up takes a lock."""
        key = tuple(labels.values())
        child = self._children.get(key)
        if child is None:
            child = self._counter.labels(model_name=self._model_name, **labels)
            self._children[key] = child
        return child


class _EngineCollector(Collector):
    """Reads the engine's statistics when the metrics are asked for."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def describe(self) -> Iterable[Any]:
        """Return nothing: registration must not read the engine."""
        return ()

    def collect(self) -> Iterator[Any]:
        """Yield a metric for each statistic of the engine."""
        stats = self._stats()
        kinds = ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily))
        for table, family_class in kinds:
            for attribute, (name, text) in table.items():
                family = family_class(PREFIX + name, text, labels=["model_name"])
                family.add_metric([self._model_name], float(getattr(stats, attribute)))
                yield family
