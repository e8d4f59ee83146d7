"""What `serve` prints once it listens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from qwen2vl.cli.serve.banner import describe_server
from qwen2vl.server.config import ServerConfig


def banner(
    max_num_seqs: int = 16, key: str = "KEY", kv_cache_dtype: str = "auto", **config: Any
) -> str:
    llm = SimpleNamespace(
        model=SimpleNamespace(dtype="torch.bfloat16"),
        device="cuda",
        max_model_len=4096,
        kv_cache_tokens=8192,
        kv_cache_dtype=kv_cache_dtype,
        engine_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )
    state: Any = SimpleNamespace(
        engine=SimpleNamespace(llm=llm), config=ServerConfig(**config), connector=None
    )
    return "\n".join(describe_server(state, 8000, quantize="int8", key=key, seconds=1.0))


def test_the_model_and_its_limits() -> None:
    assert "serving nano on cuda, bfloat16, int8 weights" in banner()
    text = "16 running requests, 128 waiting requests, 16 images, 2 videos per request"
    assert text in banner()
    assert "KV cache 8,192 tokens, 16 running" in banner()
    assert "KV cache 8,192 tokens in int8, 16 running" in banner(kv_cache_dtype="int8")
    one = banner(max_num_seqs=1, max_queue=1, limit_mm_per_prompt={"image": 1, "video": 1})
    assert "1 running request, 1 waiting request, 1 image, 1 video per request" in one
    assert "serving the LoRA adapter forms" in banner(lora_modules={"forms": "folder"})


def test_the_address_of_the_page() -> None:
    assert "page: http://127.0.0.1:8000/" in banner().splitlines()
    assert "page: http://[fd00::1]:8000/" in banner(host="fd00::1").splitlines()
    assert "page:" not in banner(page=False)


def test_the_command_to_try_has_a_key_if_one_is_needed() -> None:
    assert "Authorization" not in banner()
    shown = banner(api_keys=("hunter2",), key="$QWEN2VL_API_KEY")
    assert '-H "Authorization: Bearer $QWEN2VL_API_KEY"' in shown
    assert "hunter2" not in shown


def test_the_url_of_an_address_of_version_6() -> None:
    assert "curl http://[fd00::1]:8000/v1/chat" in banner(host="fd00::1")
    assert "curl http://127.0.0.1:8000/v1/chat" in banner(host="::")


def test_it_warns_of_an_open_server() -> None:
    assert "warning" not in banner()
    assert "warning: everyone who reaches 0.0.0.0" in banner(host="0.0.0.0")
    assert "warning" not in banner(host="0.0.0.0", api_keys=("key",))


def test_it_names_allowed_hosts_when_others_can_reach_it() -> None:
    assert "--allowed-hosts" not in banner()
    shown = banner(host="0.0.0.0")
    assert "must have an IP address of this machine or localhost as their host" in shown
    assert "give --allowed-hosts NAME" in shown
    assert "must have 10.0.0.5 or localhost" in banner(host="10.0.0.5")
    assert "--allowed-hosts" not in banner(host="0.0.0.0", allowed_hosts=("gpu",))
