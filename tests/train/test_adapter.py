"""Runs that train an adapter: what moves, what is exported, how they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load
from qwen2vl.lora.layers import LoraLinear, lora_layers
from qwen2vl.quantization.nf4 import Nf4Weight
from qwen2vl.recipes import lora, qlora
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.export import export
from qwen2vl.train.init import begin
from qwen2vl.train.loop import train
from tests.folders import write_tiny

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write conversations, every second one about a picture."""
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "noise.png")
    picture = {"type": "image", "image": "noise.png"}
    lines: list[dict[str, Any]] = []
    for number in range(24):
        words = {"type": "text", "text": f"say {number}"}
        asked = [picture, words] if number % 2 else [words]
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": str(number)},
                ]
            }
        )
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def config(recipe: TrainConfig, base: Path, *words: str, data: Path | None = None) -> TrainConfig:
    short = [
        f"model={base}",
        f"data={data or 'none.jsonl'}",
        f"data.cache={base.parent / 'cache'}",
        f"out={base.parent / 'run'}",
        *("data.max_tokens=512", "stages.0.steps=3", "optim.warmup=1", "optim.lr=1e-2"),
        *("device=cpu", "workers=0", "threads=1", "log_every=1", "dtype=float32"),
    ]
    return override(recipe, [*short, *words])


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, processor = load(folder, dtype="float32", **options)
    ready = processor([{"role": "user", "content": "say 3"}])
    ids = torch.tensor(ready.input_ids)
    with torch.no_grad():
        return model.logits(model(ids, ready.position_ids_3T, AttnMeta.build([len(ids)])))


def test_a_run_exports_a_merged_model_and_a_folder_of_peft_s(base: Path, data: Path) -> None:
    run = config(lora.recipe(), base, data=data)
    merged = train(run)
    adapter = base.parent / "run" / "adapter-000003"
    assert merged == base.parent / "run" / "model-000003"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["r"] == 16 and settings["lora_alpha"] == 32
    assert settings["base_model_name_or_path"] == str(base)
    assert sorted(settings["target_modules"]) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    moved = {name for name, old in before.items() if not torch.equal(after[name], old.bfloat16())}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    # Merged by the run, or put on the base by the loader: the same, as bfloat16 rounds.
    plain, together = logits(merged), logits(base, adapter=adapter)
    torch.testing.assert_close(plain, together, rtol=0.1, atol=0.1)
    assert (together - logits(base)).abs().max() > 0.2


def test_only_the_factors_move(base: Path, data: Path) -> None:
    model, _, _ = begin(config(lora.recipe(), base))
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = config(lora.recipe(), base, "adapter.dropout=0", data=data)
    train(run)
    state = load_state(base.parent / "run")
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) != ("lora_" in name), name


def load_state(run: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a run's last checkpoint, as one process wrote them."""
    (last,) = sorted(run.glob("step-*"))[-1:]
    state: dict[str, torch.Tensor] = {}
    for path in last.glob("*.safetensors"):
        state |= load_file(path)
    return state


@pytest.mark.parametrize("recipe", [lora.recipe, qlora.recipe])
def test_resumed_equals_uninterrupted_bit_for_bit(base: Path, data: Path, recipe: Any) -> None:
    whole = train(config(recipe(), base, f"out={base.parent / 'whole'}", data=data))
    words = (f"out={base.parent / 'parts'}", "save_every=1")

    class KilledError(Exception):
        pass

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(config(recipe(), base, *words, data=data), report=kill)
    assert (base.parent / "parts" / "step-000001").is_dir()
    parts = train(config(recipe(), base, *words, data=data))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    adapters = [folder.with_name("adapter-000003") for folder in (whole, parts)]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_a_quantized_base_merges_into_what_was_trained_beside(
    base: Path, data: Path, quantize: str
) -> None:
    merged = train(config(lora.recipe(), base, f"adapter.quantize_base={quantize}", data=data))
    state = load_state(base.parent / "run")
    assert state[f"{Q}.nf4.codes"].dtype == torch.uint8
    assert f"{Q}.weight" not in state
    before = load_file(base / "model.safetensors")[f"{Q}.weight"]
    widened = Nf4Weight(before, double=quantize == "nf4_double").dequantized()
    change = 2.0 * state[f"{Q}.lora_B"] @ state[f"{Q}.lora_A"]
    after = load_file(merged / "model.safetensors")[f"{Q}.weight"]
    torch.testing.assert_close(after, (widened + change).bfloat16())
    assert logits(merged).isfinite().all()


def test_a_quantized_model_is_filled_as_a_whole_one_would_be(base: Path) -> None:
    run = config(qlora.recipe(), base)
    model, _, _ = begin(run)
    assert run.adapter is not None
    plain, _, _ = begin(replace(run, adapter=replace(run.adapter, quantize_base="none")))
    assert all(p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    whole = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name]), name
    for name, layer in lora_layers(model):
        want = Nf4Weight(whole[f"{name}.weight"], double=True)
        assert layer.nf4 is not None
        assert torch.equal(layer.nf4.dequantized(), want.dequantized())


def test_a_run_goes_on_from_an_adapter(base: Path, data: Path) -> None:
    train(config(lora.recipe(), base, data=data))
    first = base.parent / "run" / "adapter-000003"
    model, _, _ = begin(config(lora.recipe(), base, f"adapter.init={first}"))
    stored = load_file(first / "adapter_model.safetensors")
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(layer.lora_B, stored[key])
    with pytest.raises(ConfigError, match=r"has rank 16 and scale 2, adapter\.rank 8 and adapter"):
        begin(config(lora.recipe(), base, f"adapter.init={first}", "adapter.rank=8"))
    words = (f"adapter.init={first}", 'adapter.targets=["model.*q_proj"]')
    with pytest.raises(ConfigError, match=r"differ in \d+ layers, such as model.*; give"):
        begin(config(lora.recipe(), base, *words))


def test_any_checkpoint_can_be_exported(base: Path, data: Path) -> None:
    merged = train(config(lora.recipe(), base, data=data))
    export(base.parent / "run" / "step-000003", base.parent / "again")
    one, two = (load_file(f / "model.safetensors") for f in (merged, base.parent / "again"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_another_adapter_does_not_go_on_from_a_checkpoint(base: Path, data: Path) -> None:
    train(config(lora.recipe(), base, data=data))
    told = r"made with other values of adapter.alpha \(32.0, now 8.0\); resume with"
    with pytest.raises(CheckpointError, match=told):
        train(config(lora.recipe(), base, "adapter.alpha=8", data=data))


def test_an_adapter_needs_a_model_that_has_learned(base: Path) -> None:
    with pytest.raises(ConfigError, match="an adapter needs a model that has learned; give model="):
        begin(replace(config(lora.recipe(), base), init=""))


def test_a_pattern_that_matches_nothing_is_named(base: Path) -> None:
    words = 'adapter.targets=["visual.*qvk"]'
    with pytest.raises(ConfigError, match=r"adapter\.targets: 'visual\.\*qvk' matches no linear"):
        begin(config(lora.recipe(), base, words))
