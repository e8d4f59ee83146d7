"""Prometheus metrics: names, values, labels and the engine's gauges."""

from __future__ import annotations

from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen2vl.engine.outputs import Completion, Timings
from qwen2vl.engine.stats import EngineStats
from qwen2vl.server.metrics import COUNTERS, GAUGES, REQUEST_TOKENS, ServerMetrics


def samples(metrics: ServerMetrics) -> dict[str, float]:
    """Return name{labels} -> value, without model_name and the times of creation."""
    result = {}
    for family in text_string_to_metric_families(metrics.expose().decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            shown = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            if sample.labels.get("le", "+Inf") == "+Inf":
                result[sample.name + (f"{{{shown}}}" if shown else "")] = sample.value
    return result


def completion(num_tokens: int, reason: str = "stop") -> Completion:
    return Completion(
        text="",
        token_ids=tuple(range(num_tokens)),
        finish_reason=reason,  # type: ignore[arg-type]
        prompt_tokens=100,
        image_tokens=64,
        video_tokens=0,
        seconds=Timings(process=0.01, vision=0.02, prefill=0.03, decode=0.9),
    )


def test_a_request_is_counted() -> None:
    metrics = ServerMetrics("nano")
    metrics.observe_completions(
        [completion(10), completion(4, "length")], e2e_seconds=2.0, first_token_seconds=0.5
    )
    found = samples(metrics)
    assert found["qwen2vl:prompt_tokens_total"] == 100
    assert found["qwen2vl:generation_tokens_total"] == 14
    assert found["qwen2vl:request_success_total{finished_reason=stop}"] == 1
    assert found["qwen2vl:request_success_total{finished_reason=length}"] == 1
    assert found["qwen2vl:time_to_first_token_seconds_sum"] == 0.5
    assert found["qwen2vl:e2e_request_latency_seconds_sum"] == 2.0
    per_token = "qwen2vl:request_time_per_output_token_seconds"  # one mean a sample, as in vLLM
    assert found[f"{per_token}_count"] == 2
    assert found[f"{per_token}_sum"] == pytest.approx(0.9 / 9 + 0.9 / 3)
    assert "qwen2vl:inter_token_latency_seconds_count" not in found  # vLLM's has each gap
    for phase, seconds in {"preprocess": 0.01, "encoder": 0.02, "prefill": 0.03}.items():
        assert found[f"qwen2vl:request_{phase}_time_seconds_sum"] == seconds


def test_the_model_is_a_label() -> None:
    metrics = ServerMetrics("my-model")
    metrics.reject("queue_full")
    text = metrics.expose().decode()
    assert 'qwen2vl:rejected_total{model_name="my-model",reason="queue_full"} 1.0' in text


def test_http_requests_have_labels_of_fixed_sets() -> None:
    metrics = ServerMetrics()
    metrics.observe_http("POST", "/v1/chat/completions", 200, 0.1)
    metrics.observe_http("BREW", "other", 404, 0.1)
    metrics.observe_http("MAKE", "other", 404, 0.1)
    found = samples(metrics)
    route = "{method=POST,route=/v1/chat/completions,status=200}"
    assert found[f"qwen2vl:http_requests_total{route}"] == 1
    assert found["qwen2vl:http_requests_total{method=other,route=other,status=404}"] == 2


def test_the_engine_is_read_when_asked() -> None:
    stats = EngineStats(num_running=3, num_waiting=5, kv_cache_usage=0.25, prefix_cache_hits=7)
    metrics = ServerMetrics("nano", lambda: stats)
    found = samples(metrics)
    assert found["qwen2vl:num_requests_running"] == 3
    assert found["qwen2vl:num_requests_waiting"] == 5
    assert found["qwen2vl:kv_cache_usage_perc"] == 0.25
    assert found["qwen2vl:prefix_cache_hits_total"] == 7
    assert {field.name for field in fields(EngineStats)} == {*GAUGES, *COUNTERS}
    stats = EngineStats(num_running=4)
    assert samples(metrics)["qwen2vl:num_requests_running"] == 4


def test_the_tokens_of_a_request_reach_its_access_log() -> None:
    tokens: dict[str, int] = {}
    REQUEST_TOKENS.set(tokens)
    metrics = ServerMetrics()
    metrics.observe_completions([completion(3)], e2e_seconds=1.0)
    metrics.observe_completions([completion(4)], e2e_seconds=1.0)
    assert tokens == {"prompt_tokens": 200, "completion_tokens": 7}
    REQUEST_TOKENS.set(None)
