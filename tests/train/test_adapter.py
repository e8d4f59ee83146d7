"""LoRA and QLoRA runs: trainable parameters, export, resuming."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine import LLM
from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load
from qwen2vl.lora.layers import LoraConfig, LoraLinear, init_factors, named_lora_layers
from qwen2vl.lora.peft import to_peft_config, to_peft_state_dict
from qwen2vl.model import meta_model
from qwen2vl.quantization.nf4 import Nf4Weight
from qwen2vl.recipes import lora, qlora
from qwen2vl.train.adapter import initial_factors
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.dry_run.report import check_config
from qwen2vl.train.export import export_model
from qwen2vl.train.init import build_meta_model, build_model, build_processor
from qwen2vl.train.loop import train
from qwen2vl.weights import save_adapter
from tests.folders import write_tiny

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write conversations, every second one with an image."""
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "noise.png")
    image = {"type": "image", "image": "noise.png"}
    rows: list[dict[str, Any]] = []
    for number in range(24):
        text = {"type": "text", "text": f"say {number}"}
        content = [image, text] if number % 2 else [text]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": str(number)},
                ]
            }
        )
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config(
    recipe: TrainConfig, base: Path, *overrides: str, data: Path | None = None
) -> TrainConfig:
    base_overrides = [
        f"model={base}",
        f"data={data or 'none.jsonl'}",
        f"data.cache_dir={base.parent / 'cache'}",
        f"output_dir={base.parent / 'run'}",
        *("data.max_tokens=512", "stages.0.steps=3", "optim.warmup_steps=1", "optim.lr=1e-2"),
        *("device=cpu", "num_workers=0", "num_threads=1", "logging_steps=1", "dtype=float32"),
    ]
    return override(recipe, [*base_overrides, *overrides])


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model, processor = load(folder, dtype="float32", **options)
    inputs = processor([{"role": "user", "content": "say 3"}])
    ids = torch.tensor(inputs.input_ids)
    with torch.no_grad():
        return model.logits(model(ids, inputs.position_ids_3T, AttnMeta.build([len(ids)])))


def test_a_run_exports_a_merged_model_and_a_peft_adapter(base: Path, data: Path) -> None:
    run_config = config(lora.recipe(), base, data=data)
    merged = train(run_config)
    adapter = base.parent / "run" / "adapter-000003"
    assert merged == base.parent / "run" / "model-000003"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["r"] == 16 and settings["lora_alpha"] == 32
    assert settings["base_model_name_or_path"] == str(base)
    assert sorted(settings["target_modules"]) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name, old in before.items() if not torch.equal(after[name], old.bfloat16())}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    # Merged by the export or applied by the loader: equal within bfloat16 rounding.
    merged_logits, adapter_logits = logits(merged), logits(base, adapter=adapter)
    torch.testing.assert_close(merged_logits, adapter_logits, rtol=0.1, atol=0.1)
    assert (adapter_logits - logits(base)).abs().max() > 0.2


def test_an_adapter_is_not_applied_to_the_model_that_contains_it(base: Path, data: Path) -> None:
    merged = train(config(lora.recipe(), base, data=data))
    adapter = base.parent / "run" / "adapter-000003"
    message = rf"is merged into this model already, .* it was trained on \({base}\)"
    with pytest.raises(CheckpointError, match=message):
        load(merged, adapter=adapter)
    with pytest.raises(CheckpointError, match=message):
        LLM(merged, adapters={"again": adapter})
    with pytest.raises(CheckpointError, match=message):
        build_model(config(lora.recipe(), merged, f"adapter.init={adapter}"))
    load(base, adapter=adapter)
    # The record survives another export, and another adapter of the model is accepted.
    (merged.parent / "adapter-000003").rename(base.parent / "first")
    merged.rename(base.parent / "once")
    shutil.rmtree(base.parent / "run")
    twice = train(config(lora.recipe(), base.parent / "once", "seed=5", data=data))
    load(base.parent / "once", adapter=base.parent / "run" / "adapter-000003")
    with pytest.raises(CheckpointError, match="is merged into this model already"):
        load(twice, adapter=base.parent / "first")


@pytest.mark.parametrize("recipe", [lora.recipe(), qlora.recipe()], ids=["lora", "qlora"])
def test_an_adapter_with_tokens_that_the_model_lacks_is_refused(
    base: Path, data: Path, recipe: TrainConfig
) -> None:
    adapter = base.parent / "run" / "adapter-000003"
    train(config(recipe, base, data=data))
    again = config(recipe, base, f"adapter.init={adapter}")
    build_model(again)
    tokens = {"added_tokens_decoder": {"999": {"content": "<|polygon_start|>", "special": True}}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(tokens))
    for build in (build_model, build_meta_model, build_processor):
        with pytest.raises(
            CheckpointError, match=r"trained with the added token '<\|polygon_start"
        ):
            build(again)


def test_only_the_factors_are_trained(base: Path, data: Path) -> None:
    model, _, _ = build_model(config(lora.recipe(), base))
    before = {name: p.clone() for name, p in model.named_parameters()}
    run_config = config(lora.recipe(), base, "adapter.dropout=0", data=data)
    train(run_config)
    state = load_state(base.parent / "run")
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) != ("lora_" in name), name


def load_state(run_folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a run's last checkpoint, written by a single process."""
    (last,) = sorted(run_folder.glob("step-*"))[-1:]
    state: dict[str, torch.Tensor] = {}
    for path in last.glob("*.safetensors"):
        state |= load_file(path)
    return state


@pytest.mark.parametrize("recipe", [lora.recipe, qlora.recipe])
def test_resumed_equals_uninterrupted_bit_for_bit(base: Path, data: Path, recipe: Any) -> None:
    uninterrupted = train(config(recipe(), base, f"output_dir={base.parent / 'whole'}", data=data))
    overrides = (f"output_dir={base.parent / 'parts'}", "save_steps=1")

    class KilledError(Exception):
        pass

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(config(recipe(), base, *overrides, data=data), report=kill)
    assert (base.parent / "parts" / "step-000001").is_dir()
    resumed = train(config(recipe(), base, *overrides, data=data))
    expected, actual = (
        load_file(folder / "model.safetensors") for folder in (uninterrupted, resumed)
    )
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    adapters = [folder.with_name("adapter-000003") for folder in (uninterrupted, resumed)]
    expected, actual = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("quantize", ["nf4", "nf4_double"])
def test_the_merged_weight_is_the_dequantized_base_plus_the_lora_delta(
    base: Path, data: Path, quantize: str
) -> None:
    merged = train(config(lora.recipe(), base, f"adapter.quantize_base={quantize}", data=data))
    state = load_state(base.parent / "run")
    assert state[f"{Q}.nf4.codes"].dtype == torch.uint8
    assert f"{Q}.weight" not in state
    before = load_file(base / "model.safetensors")[f"{Q}.weight"]
    dequantized = Nf4Weight(before, double=quantize == "nf4_double").dequantize()
    delta = 2.0 * state[f"{Q}.lora_B"] @ state[f"{Q}.lora_A"]
    after = load_file(merged / "model.safetensors")[f"{Q}.weight"]
    torch.testing.assert_close(after, (dequantized + delta).bfloat16())
    assert logits(merged).isfinite().all()


def test_a_qlora_model_has_the_quantized_weights_of_the_full_model(base: Path) -> None:
    run_config = config(qlora.recipe(), base)
    model, _, _ = build_model(run_config)
    assert run_config.adapter is not None
    full_model, _, _ = build_model(
        replace(run_config, adapter=replace(run_config.adapter, quantize_base="none"))
    )
    assert all(p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    full_parameters = dict(full_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, full_parameters[name]), name
    for name, layer in named_lora_layers(model):
        nf4_weight = Nf4Weight(full_parameters[f"{name}.weight"], double=True)
        assert layer.nf4 is not None
        assert torch.equal(layer.nf4.dequantize(), nf4_weight.dequantize())


def test_a_run_starts_from_an_existing_adapter(base: Path, data: Path) -> None:
    train(config(lora.recipe(), base, data=data))
    adapter = base.parent / "run" / "adapter-000003"
    model, _, _ = build_model(config(lora.recipe(), base, f"adapter.init={adapter}"))
    stored = load_file(adapter / "adapter_model.safetensors")
    layer = model.get_submodule(Q)
    assert isinstance(layer, LoraLinear)
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight"
    assert torch.equal(layer.lora_B, stored[key])
    overrides = (f"adapter.init={adapter}", 'adapter.target_modules=["model.*q_proj"]')
    for change, message in (
        (
            "adapter.rank=8",
            r"has rank 16 and scale 2, adapter\.rank 8 and .*; write adapter.rank=16 adapter.al",
        ),
        (overrides[1], r"differ in \d+ layers, such as model.*; write 'adapter.target_modules="),
    ):
        refused = config(lora.recipe(), base, overrides[0], change)
        for check in (build_model, lambda run: check_config(run, build_processor(run))):
            with pytest.raises(ConfigError, match=message):
                check(refused)


@pytest.mark.parametrize("pattern", ["model.*q_proj", ".*[.]1[.].*(v_proj|qkv)", "visual.*"])
def test_the_remedy_for_other_target_modules_can_be_pasted(base: Path, pattern: str) -> None:
    model = meta_model(Qwen2VLConfig.from_dict(json.loads((base / "config.json").read_text())))
    adapter = LoraConfig(rank=2, target_modules=(pattern,))
    factors = init_factors(model, adapter, 0)
    folder = base.parent / "given"
    settings = to_peft_config(adapter, factors, model, base="")
    save_adapter(folder, settings, to_peft_state_dict(factors))
    other = replace(adapter, init=str(folder), target_modules=("model.*down_proj",))
    with pytest.raises(ConfigError, match="write ") as caught:
        initial_factors(model, other, 0)
    given = re.search(r"write '(.*)'", str(caught.value))
    assert given is not None
    run = override(lora.recipe(), [given[1]])
    assert run.adapter is not None
    pasted = replace(other, target_modules=run.adapter.target_modules)
    assert initial_factors(model, pasted, 0).keys() == factors.keys()


def test_any_checkpoint_can_be_exported(base: Path, data: Path) -> None:
    merged = train(config(lora.recipe(), base, data=data))
    export_model(base.parent / "run" / "step-000003", base.parent / "again")
    expected, actual = (load_file(f / "model.safetensors") for f in (merged, base.parent / "again"))
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_a_checkpoint_of_another_adapter_is_refused(base: Path, data: Path) -> None:
    train(config(lora.recipe(), base, data=data))
    text = r"made with other values of adapter.alpha \(32.0, now 8.0\); resume with"
    with pytest.raises(CheckpointError, match=text):
        train(config(lora.recipe(), base, "adapter.alpha=8", data=data))


def test_an_adapter_needs_a_pretrained_model(base: Path) -> None:
    with pytest.raises(ConfigError, match="an adapter needs a pretrained model; give model="):
        build_model(replace(config(lora.recipe(), base), init=""))


def test_a_target_module_that_matches_nothing_is_named(base: Path) -> None:
    overrides = 'adapter.target_modules=["visual.*qvk"]'
    with pytest.raises(
        ConfigError, match=r"adapter\.target_modules: 'visual\.\*qvk' matches no linear"
    ):
        build_model(config(lora.recipe(), base, overrides))
