"""Weights that an adapter holds in full: names, checks, and what is refused.

What they compute is compared with PEFT in tests/parity/test_adapter_full_weights.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.config import MERGED_ADAPTERS
from qwen2vl.errors import CheckpointError
from qwen2vl.lora.full_weights import describe_parameters, parse_full_weights
from qwen2vl.lora.peft import adapter_digest, parse_mergeable_adapter, parse_peft_adapter
from tests.lora.test_peft import flat_tensors, model, settings

BIAS = "visual.merger.mlp.2.bias"
NORM = "model.norm.weight"
SHAPE = (64,)


def parse(tensors: dict[str, Tensor], **options: Any) -> dict[str, str]:
    return parse_full_weights(tensors, options, model(), where="adapter")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"base_model.model.{NORM}", NORM),
        ("base_model.model.model.language_model.norm.weight", NORM),
        ("base_model.model.model.norm.modules_to_save.weight", NORM),
        ("base_model.model.model.norm.modules_to_save.default.weight", NORM),
        ("module._orig_mod.base_model.model.model.norm.weight", NORM),
        ("_fsdp_wrapped_module.base_model.model.model.norm.weight", NORM),
        ("base_model.model.model.visual.merger.mlp.2.base_layer.bias", BIAS),
        ("base_model.model.visual.merger.modules_to_save.default.mlp.2.bias", BIAS),
        (BIAS, BIAS),
        (f"model.{BIAS}", BIAS),
    ],
)
def test_names(key: str, name: str) -> None:
    assert parse({key: torch.ones(SHAPE)}) == {name: key}


def test_copies_that_peft_keeps_are_left_out() -> None:
    key = "base_model.model.model.norm.original_module.weight"
    assert parse({key: torch.zeros(1)}) == {}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"v_head.summary.weight": torch.ones(1)}, "v_head.summary.weight is no LoRA factor of"),
        ({"mlp.0.weight": torch.ones(4)}, "and no parameter of this model (mlp.0.weight)"),
        ({NORM: torch.ones(0)}, f"{NORM} is [0], this model asks for [64]; it belongs to another"),
        ({NORM: torch.ones(SHAPE, dtype=torch.int8)}, f"{NORM} holds no finite numbers"),
        ({NORM: torch.full(SHAPE, math.nan)}, f"{NORM} holds no finite numbers"),
        ({NORM: torch.full(SHAPE, -math.inf)}, f"{NORM} holds no finite numbers"),
        (
            {NORM: torch.ones(SHAPE), f"base_model.model.{NORM}": torch.zeros(SHAPE)},
            f"{NORM} is there twice, as {NORM} and as base_model.model.{NORM}, which differ",
        ),
    ],
)
def test_unfit_tensors_are_refused(tensors: dict[str, Tensor], text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        parse(tensors)


def test_equal_copies_are_one() -> None:
    tensors = {NORM: torch.ones(SHAPE), f"base_model.model.{NORM}": torch.ones(SHAPE)}
    assert list(parse(tensors)) == [NORM]


def test_flat_patch_embedding() -> None:
    name = "visual.patch_embed.proj.weight"
    weight = model().get_parameter(name).detach()
    assert parse({name: weight.flatten(1)}) == {name: name}
    with pytest.raises(CheckpointError, match="this model asks for"):
        parse({name: weight.flatten()})


def test_a_tied_head_that_repeats_the_embedding_is_left_out() -> None:
    embedding = torch.ones_like(model().model.embed_tokens.weight)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    options = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert list(parse(tensors, **options)) == ["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight was trained apart from"):
        parse(tensors | {"lm_head.weight": embedding + 1}, **options)


def test_unmerged_adapters_hold_factors_alone() -> None:
    tensors = flat_tensors() | {f"base_model.model.{NORM}": torch.ones(SHAPE)}
    adapter = parse_mergeable_adapter(settings(), tensors, model(), where="a")
    assert len(adapter.factors) == 3
    assert adapter.full_weights == {NORM: f"base_model.model.{NORM}"}
    with pytest.raises(CheckpointError, match=r"holds weights in full \(model\.norm\.weight\)"):
        parse_peft_adapter(settings(), tensors, model(), where="a")


def test_digest_covers_full_weights() -> None:
    factors = parse_peft_adapter(settings(), flat_tensors(), model(), where="a")
    plain = adapter_digest(factors)
    ones, twos = (adapter_digest(factors, {NORM: torch.full(SHAPE, x)}) for x in (1.0, 2.0))
    assert len({plain, ones, twos, adapter_digest(factors, {BIAS: torch.ones(SHAPE)})}) == 4
    assert adapter_digest(factors, {}) == plain


@pytest.mark.parametrize("with_full_weights", [True, False])
def test_merged_adapters_are_refused(with_full_weights: bool) -> None:
    """Also where the model has only the factors: they would be applied twice."""
    tensors = flat_tensors() | {NORM: torch.ones(SHAPE)}
    base = model()
    adapter = parse_mergeable_adapter(settings(), tensors, base, where="a")
    in_full = {NORM: tensors[NORM]} if with_full_weights else {}
    digest = adapter_digest(adapter.factors, in_full)
    base.config = replace(base.config, extra={MERGED_ADAPTERS: [digest]})
    with pytest.raises(CheckpointError, match="is merged into this model already"):
        parse_mergeable_adapter(settings(), tensors, base, where="a")
    parse_mergeable_adapter(settings(lora_alpha=6), tensors, model(), where="a")


def test_descriptions() -> None:
    names = ["visual.merger.mlp.0.bias", "visual.merger.mlp.2.bias", NORM]
    assert describe_parameters(names) == f"2 tensors of visual.merger.mlp.*, {NORM}"
