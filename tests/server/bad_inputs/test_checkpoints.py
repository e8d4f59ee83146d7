"""Broken checkpoints: the server refuses to start, and says what is wrong with which file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.errors import EngineError, Qwen2VLError
from qwen2vl.weights import resolve_model
from tests.server.bad_inputs.suite import covers

WEIGHTS = "model.safetensors"
NANO = resolve_model("nano")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a copy of nano to damage."""
    target = tmp_path / "broken"
    shutil.copytree(NANO, target)
    return target


def refused(folder: Path) -> str:
    """Return why the folder cannot be served; `qwen2vl serve` loads it in the same way."""
    with pytest.raises(Qwen2VLError) as caught:
        LLM(str(folder), device="cpu")
    assert caught.value.exit_code == 2
    return str(caught.value)


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@covers("truncated safetensors shard")
@pytest.mark.parametrize("cut", [1, 1_000_000])
def test_truncated(folder: Path, cut: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-cut])
    text = refused(folder)
    assert WEIGHTS in text and f"{cut:,}" in text


@covers("safetensors header huge / garbage / overlapping offsets / trailing bytes")
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 100 + data[108:],
        lambda data: data + b"trailing",
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        lambda data: b"",
        lambda data: b"PK\x03\x04" + bytes(1000),
    ],
)
def test_damaged_header(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    assert WEIGHTS in refused(folder)


@covers("missing shard or index entry")
def test_missing_files_and_tensors(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index["weight_map"].update(dict.fromkeys(part, file))
    (folder / WEIGHTS).unlink()
    path = folder / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "hidden")
    assert "model-00002-of-00002.safetensors" in refused(folder)
    (folder / "hidden").rename(folder / "model-00002-of-00002.safetensors")
    del index["weight_map"][names[0]], index["weight_map"][names[3]]
    path.write_text(json.dumps(index), encoding="utf-8")
    text = refused(folder)
    assert names[0] in text and names[3] in text


@covers("wrong shape / dtype / extra key")
def test_wrong_tensors(folder: Path) -> None:
    changed: list[str] = []

    def change(tensors: dict[str, Any]) -> None:
        first, second = sorted(tensors)[:2]
        tensors[first] = torch.zeros(3, 5)
        tensors[second] = torch.zeros(2, 2)
        tensors["model.unknown.weight"] = torch.zeros(1)
        changed.extend((first, second))

    change_tensors(folder, change)
    text = refused(folder)
    assert all(name in text for name in changed)

    shutil.copy(NANO / WEIGHTS, folder / WEIGHTS)
    change_tensors(folder, lambda t: t.update({"model.unknown.weight": torch.zeros(1)}))
    assert "model.unknown.weight" in refused(folder)


@covers("NaN/Inf weights")
def test_weights_that_are_not_finite(folder: Path) -> None:
    """The request fails, with the command that names the tensors; nothing else does."""

    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if "mlp.down_proj" in name)
        tensors[name][0, 0] = float("nan")

    change_tensors(folder, change)
    llm = LLM(str(folder), device="cpu")
    with pytest.raises(EngineError, match=r"not finite .* doctor --check-weights"):
        llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=1))


@covers("tokenizer mismatch (vocab size, special ids)")
def test_wrong_tokenizer(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        tokens = {token["content"]: token for token in content["added_tokens"]}
        pad, end = tokens["<|image_pad|>"], tokens["<|im_end|>"]
        pad["id"], end["id"] = end["id"], pad["id"]

    change_json(folder, "tokenizer.json", swap)
    text = refused(folder)
    assert "image_pad" in text or "im_end" in text


@covers("config mismatch (heads, mrope_section sum, merge size)")
@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(num_attention_heads=7),
        lambda config: config.update(num_key_value_heads=3),
        lambda config: config["rope_scaling"].update(mrope_section=[1, 2, 3]),
        lambda config: config["vision_config"].update(spatial_merge_size=3),
        lambda config: config.update(model_type="llama"),
        lambda config: config.update(hidden_size="big"),
        lambda config: config.update(image_token_id=5),
        lambda config: config.update(vocab_size=7),
    ],
)
def test_wrong_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    change_json(folder, "config.json", change)
    assert len(refused(folder)) > 20


@covers("truncated safetensors shard")
def test_serve_does_not_start(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])
    result = subprocess.run(
        [sys.executable, "-m", "qwen2vl", "serve", "--model", str(folder), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 2
    assert WEIGHTS in result.stderr and "Traceback" not in result.stderr
