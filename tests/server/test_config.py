"""ServerConfig: every limit is checked, and an API key is never shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.server.config import ServerConfig


def test_the_defaults_are_those_of_a_closed_server() -> None:
    config = ServerConfig()
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.allowed_local_media_path is None
    assert not (config.allowed_media_domains or config.allowed_origins or config.allowed_hosts)
    assert config.max_body_bytes == 30_000_000
    base64_bytes = -(-config.max_image_bytes // 3) * 4
    assert base64_bytes + 1_000_000 < config.max_body_bytes < 32_000_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000),
        ("port", -1),
        ("port", "8000"),
        ("port", True),
        ("host", ""),
        ("host", "a" * 300),
        ("api_keys", ("",)),
        ("api_keys", (" key",)),
        ("api_keys", ("k\n",)),
        ("api_keys", ("kéy",)),
        ("api_keys", "key"),
        ("api_keys", ["key"]),
        ("served_model_names", ()),
        ("served_model_names", ("a b",)),
        ("served_model_names", ("a", "a")),
        ("lora_modules", {"nano": "folder"}),
        ("max_model_len", 0),
        ("limit_mm_per_prompt", {"imgae": 1}),
        ("limit_mm_per_prompt", {"image": -1}),
        ("limit_mm_per_prompt", {"image": 1.5}),
        ("allowed_origins", ("example.com",)),
        ("allowed_origins", ("https://example.com/path",)),
        ("allowed_hosts", ("a/b",)),
        ("allowed_hosts", ("example.com:80",)),
        ("allowed_local_media_path", Path("missing")),
        ("max_body_bytes", 0),
        ("max_body_bytes", 1.5),
        ("body_timeout", 0),
        ("body_timeout", float("nan")),
        ("max_json_depth", 1000),
        ("shutdown_timeout", -1),
        ("log_format", "xml"),
        ("num_media_workers", 0),
        ("metrics_port", 8000),
    ],
)
def test_wrong_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_origins", ("https://example.com", "http://localhost:3000", "null", "*")),
        ("allowed_hosts", ("example.com", "10.0.0.1", "::1", "[::1]", "*")),
        ("limit_mm_per_prompt", {"image": 0, "video": 1}),
        ("max_model_len", None),
        ("metrics_port", 0),
        ("shutdown_timeout", 0),
        ("served_model_names", ("Qwen/Qwen2-VL-2B-Instruct", "gpt-4o")),
    ],
)
def test_right_values_are_accepted(field: str, value: Any) -> None:
    assert getattr(ServerConfig(**{field: value}), field) == value


def test_a_misspelled_kind_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean image"):
        ServerConfig(limit_mm_per_prompt={"imgae": 1})


def test_a_key_is_never_shown() -> None:
    assert "hunter2" not in repr(ServerConfig(api_keys=("hunter2",)))
    with pytest.raises(ConfigError) as caught:
        ServerConfig(api_keys=(" hunter2",))
    assert "hunter2" not in str(caught.value)
    assert {field.name for field in fields(ServerConfig) if not field.repr} == {"api_keys"}


def test_a_kind_of_media_without_a_limit_keeps_its_default() -> None:
    assert ServerConfig(limit_mm_per_prompt={"image": 3}).limit_mm_per_prompt == {
        "image": 3,
        "video": 2,
    }
