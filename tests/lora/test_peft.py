"""PEFT adapters: parsing, merging by the formula, and what is refused by name.

Merges are compared with PEFT's own in tests/parity/test_lora.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.lora.layers import merge_lora
from qwen2vl.lora.peft import parse_peft_adapter
from qwen2vl.model import Qwen2VL
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

Q = "model.layers.1.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
QKV = "visual.blocks.0.attn.qkv"
SHAPES = {Q: (64, 64), UP: (128, 64), QKV: (96, 32), "lm_head": (len(tiny_tokenizer()), 64)}


def settings(**changes: Any) -> dict[str, Any]:
    """Return adapter_config.json as PEFT writes it, with all default options."""
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj", "up_proj", "qkv"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "lora_bias": False,
        "layer_replication": None,
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.05,
        "inference_mode": True,
        "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
        **changes,
    }


def factors(name: str, rank: int = 4, prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), key = SHAPES[name], f"base_model.model.{prefix}{name}"
    return {
        f"{key}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{key}.lora_B.weight": torch.randn(rows, rank, generator=generator),
    }


def flat_tensors() -> dict[str, Tensor]:
    return factors(Q) | factors(UP, seed=1) | factors(QKV, seed=2)


def model(**options: Any) -> Qwen2VL:
    return tiny_model(config=tiny_config(**options))


def merge(settings: dict[str, Any], tensors: dict[str, Tensor], base: Qwen2VL) -> Qwen2VL:
    merge_lora(base, parse_peft_adapter(settings, tensors, base, where="adapter"))
    return base


def delta(name: str, tensors: dict[str, Tensor]) -> Tensor:
    a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return (b.double() @ a.double()).float()


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_merge_equals_the_formula(use_rslora: bool, scale: float) -> None:
    plain, tensors = model(), flat_tensors()
    adapted = merge(settings(use_rslora=use_rslora), tensors, model())
    for name, parameter in plain.named_parameters():
        merged_weight = adapted.get_parameter(name)
        module = name.removesuffix(".weight")
        if module in SHAPES and name.endswith("weight"):
            torch.testing.assert_close(merged_weight, parameter + scale * delta(module, tensors))
        else:
            assert torch.equal(merged_weight, parameter), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.visual.", "visual."),
        ("model.language_model.", "model."),
        ("language_model.", "model."),  # of Qwen2VLModel, without the head
    ],
)
def test_both_key_layouts_give_the_same(old: str, new: str) -> None:
    nested = {
        key.replace(f"base_model.model.{new}", f"base_model.model.{old}"): tensor
        for key, tensor in flat_tensors().items()
    }
    assert nested.keys() != flat_tensors().keys()
    want, got = merge(settings(), flat_tensors(), model()), merge(settings(), nested, model())
    assert all(map(torch.equal, got.state_dict().values(), want.state_dict().values()))


def test_names_of_memory_are_those_of_files() -> None:
    named = {
        key.replace(".weight", ".default.weight"): tensor for key, tensor in flat_tensors().items()
    }
    want, got = merge(settings(), flat_tensors(), model()), merge(settings(), named, model())
    assert all(map(torch.equal, got.state_dict().values(), want.state_dict().values()))
    with pytest.raises(CheckpointError, match=f"adapter: {Q} is there twice, once as 'default'"):
        merge(settings(), flat_tensors() | named, model())


def test_untied_head_may_be_adapted() -> None:
    base = model(tie_word_embeddings=False)
    before = base.lm_head_weight.clone()
    tensors = factors("lm_head")
    merge(settings(target_modules=["lm_head"]), tensors, base)
    torch.testing.assert_close(base.lm_head_weight, before + 1.5 * delta("lm_head", tensors))


def test_patterns_override_rank_and_alpha_of_single_modules() -> None:
    tensors = factors(Q, rank=2) | factors(UP)
    options = settings(
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"mlp.up_proj": 1, "up_proj": 100},
    )
    plain, adapted = model(), merge(options, tensors, model())
    for name, scale in ((Q, 6 / 2), (UP, 1 / 4)):
        want = plain.get_parameter(f"{name}.weight") + scale * delta(name, tensors)
        torch.testing.assert_close(adapted.get_parameter(f"{name}.weight"), want)


def test_bfloat16_weights_are_rounded_once() -> None:
    base = model().to(torch.bfloat16)
    before = base.get_parameter(f"{UP}.weight").float()
    tensors = {key: tensor.bfloat16() for key, tensor in flat_tensors().items()}
    merge(settings(), tensors, base)
    want = (before + 1.5 * delta(UP, tensors)).bfloat16()
    assert torch.equal(base.get_parameter(f"{UP}.weight"), want)


def test_merging_nothing_changes_nothing() -> None:
    base = model()
    before = {name: (p.data_ptr(), p._version) for name, p in base.named_parameters()}
    merge_lora(base, {})
    assert {name: (p.data_ptr(), p._version) for name, p in base.named_parameters()} == before


def test_gemv_layers_can_be_merged() -> None:
    base = model()
    use_kernels(base)
    adapted = merge(settings(), flat_tensors(), base)
    assert torch.equal(
        adapted.get_parameter(f"{Q}.weight"),
        merge(settings(), flat_tensors(), model()).get_parameter(f"{Q}.weight"),
    )


def test_adapter_is_parsed_with_a_meta_model() -> None:
    with torch.device("meta"):
        base = Qwen2VL(tiny_config())
    assert set(parse_peft_adapter(settings(), flat_tensors(), base, where="adapter")) == {
        Q,
        UP,
        QKV,
    }


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA adapters"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "uses use_dora True, which is not supported; merge it"),
        ({"bias": "all"}, "says bias 'all', but the folder holds no biases"),
        ({"bias": "some"}, "uses bias 'some'"),
        ({"lora_bias": True}, "uses lora_bias True"),
        ({"modules_to_save": ["score"]}, "modules_to_save names 'score', which is no module of"),
        ({"modules_to_save": "norm"}, "modules_to_save is 'norm', expected a list of names"),
        (
            {"modules_to_save": ["merger"]},
            "modules_to_save names 'merger', but the folder lacks 6 tensors of visual.merger.*",
        ),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out True"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights 'pissa'"),
        ({"init_lora_weights": "loftq"}, "uses init_lora_weights 'loftq'"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication [[0, 2]]"),
        ({"trainable_token_indices": [5]}, "uses trainable_token_indices [5]"),
        ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens [1, 2]"),
        ({"kasa_config": {"beta": 1}}, "uses kasa_config {'beta': 1}"),
        ({"invented_in_2031": 0}, "uses invented_in_2031 0"),
        ({"use_dora": True, "lora_bias": True}, "uses lora_bias True, use_dora True"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"r": 8}, "has factors of rank 4, adapter_config.json says 8"),
        ({"alpha_pattern": {"up_proj": "x"}}, "alpha_pattern of up_proj is 'x', expected a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], expected names and numbers"),
        ({"rank_pattern": {".*q_proj": 2}}, "rank_pattern holds the regular expression '.*q_proj'"),
        ({"target_modules": ["q_proj", "up_proj"]}, f"adapts {QKV}, which target_modules does not"),
        (
            {"target_modules": ["q_proj", "up_proj", "qkv", "o_proj", "fc1"]},
            "target_modules names o_proj, fc1, of which the file holds no tensors",
        ),
        (
            {
                "target_modules": ["q_proj", "up_proj", "qkv", "o_proj", "query_key_value"],
                "exclude_modules": [],
            },
            "target_modules names o_proj, of which the file holds no tensors",
        ),
        ({"target_modules": None}, "target_modules is None, expected names"),
    ],
)
def test_unsupported_options_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        parse_peft_adapter(settings(**changes), flat_tensors(), model(), where="some/adapter")
    assert str(caught.value).startswith("some/adapter: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"^(?!.*visual).*(q_proj|v_proj)"},
        {
            "target_modules": [
                "layers.1.self_attn.q_proj",
                "mlp.up_proj",
                "visual.blocks.0.attn.qkv",
            ]
        },
        {"init_lora_weights": "gaussian", "modules_to_save": [], "loftq_config": {}},
        {"kasa_config": None, "use_bdlora": None, "invented_in_2031": None},
    ],
)
def test_inert_options_are_accepted(changes: dict[str, Any]) -> None:
    assert (
        len(parse_peft_adapter(settings(**changes), flat_tensors(), model(), where="adapter")) == 3
    )


@pytest.mark.parametrize(
    ("unused", "options"),
    [
        (["query_key_value", "c_attn"], {}),
        (["o_proj", "fc1"], {"exclude_modules": r".*(o_proj|fc1)"}),
        (["v_proj", "mlp.0"], {"layers_to_transform": [1]}),
    ],
)
def test_targets_without_modules_are_logged(
    unused: list[str], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT records the names that were asked for, also those of no module or of excluded ones."""
    caplog.set_level("DEBUG", "qwen2vl")
    level = "DEBUG" if options else "INFO"  # what was excluded on purpose is no news
    options |= {"target_modules": ["q_proj", "up_proj", "qkv", *unused]}
    assert set(parse_peft_adapter(settings(**options), flat_tensors(), model(), where="a")) == {
        Q,
        UP,
        QKV,
    }
    text = f"a: no module is adapted as {', '.join(unused)} of target_modules"
    assert [record.levelname for record in caplog.records if record.message == text] == [level]


def test_modules_without_factors_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """PEFT warns of missing keys: an adapter of one layer of two may be half a download."""
    changes: dict[str, Any] = {"target_modules": ["q_proj"]}
    parse_peft_adapter(settings(**changes), factors(Q), model(), where="a")
    text = (
        "a: 1 of 2 modules of target_modules have no factors in the file, such as "
        "model.layers.0.self_attn.q_proj"
    )
    assert [(r.levelname, r.message) for r in caplog.records] == [("WARNING", text)]


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r".*1.*q_proj"},
    ],
)
def test_modules_that_are_left_out_on_purpose_are_not_told(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = settings(**{"target_modules": ["q_proj"], **changes})
    parse_peft_adapter(options, factors(Q), model(), where="a")
    assert not caplog.records


def test_layer_zero_alone_may_be_transformed() -> None:
    """0 is a layer, not an option that is off."""
    options = settings(target_modules=["up_proj", "mlp.0"], layers_to_transform=0)
    assert set(parse_peft_adapter(options, factors(UP), model(), where="a")) == {UP}


def renamed_tensors(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in flat_tensors().items()}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "the adapter holds no tensors"),
        (renamed_tensors("base_model.model.", ""), "is no LoRA factor of a linear layer"),
        (
            renamed_tensors("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector"),
            "_vector is no LoRA",
        ),
        (
            renamed_tensors("lora_A.weight", "lora_embedding_A"),
            "lora_embedding_A is no LoRA factor",
        ),
        (
            renamed_tensors("q_proj.lora_B.weight", "q_proj.base_layer.weight"),
            "base_layer.weight is [64, 4], this model asks for [64, 64]; it belongs to another",
        ),
        (
            flat_tensors() | {"base_model.model.lm_head.weight": torch.ones(1)},
            "lm_head.weight was trained apart from the other of embed_tokens and lm_head",
        ),
        (
            flat_tensors() | {"base_model.model.model.embed_tokens.weight": torch.ones(9, 64)},
            "embed_tokens.weight is [9, 64], this model asks for [286, 64]; tokens were added to",
        ),
        (
            {k: t for k, t in flat_tensors().items() if "q_proj.lora_B" not in k},
            f"{Q} has lora_A alone (1 such modules)",
        ),
        (renamed_tensors("layers.1", "layers.7"), "layers.7.self_attn.q_proj is not in this model"),
        (renamed_tensors(UP, "model.layers.0.mlp"), "model.layers.0.mlp is a TextMLP; only linear"),
        (renamed_tensors(QKV, "visual.patch_embed.proj"), "visual.patch_embed.proj is a Conv3d"),
        (renamed_tensors(Q, "model.embed_tokens"), "model.embed_tokens is a Embedding"),
        (renamed_tensors(Q, "lm_head"), "lm_head is not in this model"),
        (
            renamed_tensors(Q, "model.layers.0.mlp.down_proj"),
            "is [4, 64], this model asks for [4, 128]",
        ),
        (
            flat_tensors() | {f"base_model.model.{UP}.lora_B.weight": torch.ones(128, 3)},
            f"lora_B of {UP} is [128, 3], this model asks for [128, 4]",
        ),
        (
            flat_tensors() | {f"base_model.model.{UP}.lora_A.weight": torch.tensor(1.0)},
            "is [], this model",
        ),
        (
            flat_tensors()
            | {f"base_model.model.{UP}.lora_A.weight": torch.full((4, 64), math.nan)},
            f"lora_A of {UP} holds no finite numbers",
        ),
        (
            flat_tensors()
            | {f"base_model.model.{UP}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)},
            f"lora_A of {UP} holds no finite numbers",
        ),
        (
            flat_tensors() | factors(QKV, prefix="model."),
            f"{QKV} is there twice, in both key layouts",
        ),
    ],
)
def test_unsupported_tensors_are_refused(tensors: dict[str, Tensor], text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        parse_peft_adapter(settings(target_modules="all-linear"), tensors, model(), where="adapter")
