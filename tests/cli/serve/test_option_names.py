"""Errors of the configuration name the option that was given."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from qwen2vl.cli.commands.serve import serve
from qwen2vl.cli.serve.option_names import name_options


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("port: got 1", "--port: got 1"),
        ("max_queue: got 1", "max-queue of --config server.toml: got 1"),
        ("api_keys: empty", "QWEN2VL_API_KEY: empty"),
        ("served_model_names, lora_modules: x", "--served-model-name, --lora-modules: x"),
        ("min_pixels 4 and max_pixels 2: x", "--min-pixels 4 and --max-pixels 2: x"),
        ("model 'a_b': no such folder", "model 'a_b': no such folder"),
        ("max_image_bytes: is no option", "max_image_bytes: is no option"),
        ("the max_queue is full", "the max_queue is full"),
        ("--config a.toml: max_queue: x", "--config a.toml: max_queue: x"),
    ],
)
def test_fields_become_options(
    message: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN2VL_API_KEY", "key")
    Path("server.toml").write_text("max-queue = 1")
    context: click.Context = serve.make_context("serve", ["--config", "server.toml", "--port", "1"])
    assert name_options(message, context, "server.toml") == named
