"""The lines that `serve` prints once it listens: what is served, its limits, a command to try.

A server that others can reach also gets a warning if it has no API key, and the option that allows
its host names.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen2vl.server.state import ServerState

__all__ = ["describe_server"]

ALL_ADDRESSES = ("0.0.0.0", "::")


def describe_server(
    state: ServerState, port: int, *, quantize: str | None, key: str, seconds: float
) -> Iterator[str]:
    """Yield the lines of the banner.

    Args:
        state: of the server.
        port: that it listens at.
        quantize: value of --quantize.
        key: what the command to try has as its API key, such as a variable; not the key itself.
        seconds: that the start took.
    """
    from qwen2vl.server.middleware.access_control import is_loopback

    llm, config = state.engine.llm, state.config
    precision = str(llm.model.dtype).removeprefix("torch.")
    quantized = f", {quantize} weights" if quantize else ""
    dtype = "" if llm.kv_cache_dtype == "auto" else f" in {llm.kv_cache_dtype}"
    name = config.served_model_names[0]
    media = ", ".join(_count(number, kind) for kind, number in config.limit_mm_per_prompt.items())
    yield f"serving {name} on {llm.device}, {precision}{quantized}"
    for adapter in config.lora_modules:
        yield f"serving the LoRA adapter {adapter}"
    yield (
        f"context {llm.max_model_len:,} tokens, KV cache {llm.kv_cache_tokens:,} tokens{dtype}, "
        f"{_count(llm.engine_config.max_num_seqs, 'running request')}, "
        f"{_count(config.max_queue, 'waiting request')}, {media} per request"
    )
    url = f"http://{_url_host(config.host)}:{port}"
    yield f"ready after {seconds:.1f} s: {url}/v1"
    if config.page:
        yield f"page: {url}/"
    yield _curl_command(url, name, key if config.api_keys else None)
    if is_loopback(config.host):
        return
    if not config.api_keys:
        yield (
            f"warning: everyone who reaches {config.host} can use this server; set "
            "QWEN2VL_API_KEY to require a key"
        )
    if not config.allowed_hosts:
        own = "an IP address of this machine" if config.host in ALL_ADDRESSES else config.host
        yield (
            f"URLs of clients must have {own} or localhost as their host; for a host name, give "
            "--allowed-hosts NAME"
        )


def _curl_command(url: str, model: str, key: str | None) -> str:
    header = "" if key is None else f' -H "Authorization: Bearer {key}"'
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]})
    data = shlex.quote(body)
    return f"curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {data}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _url_host(host: str) -> str:
    if host in ALL_ADDRESSES:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
