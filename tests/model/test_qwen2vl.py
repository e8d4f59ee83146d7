"""The complete model: parameter names and sizes, scatter of vision embeddings, KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.config import PRESETS
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from tests import prompts
from tests.parity.reference import compute_logits, pack_prompts, random_model
from tests.prompts import image, video
from tests.tiny import tiny_config

CONFIG = tiny_config()

VISION_BLOCK_PARAMETERS = [
    f"{part}.{kind}"
    for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
TEXT_LAYER_PARAMETERS = [
    *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


@pytest.mark.parametrize(
    ("size", "count"), [("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)]
)
def test_official_numbers_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        model = Qwen2VL(PRESETS[size])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_are_those_of_the_checkpoints(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    expected = {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.norm.weight"}
    expected |= {f"visual.blocks.{i}.{name}" for i in range(2) for name in VISION_BLOCK_PARAMETERS}
    expected |= {
        f"visual.merger.{p}.{k}" for p in ("ln_q", "mlp.0", "mlp.2") for k in ("weight", "bias")
    }
    expected |= {f"model.layers.{i}.{name}" for i in range(2) for name in TEXT_LAYER_PARAMETERS}
    if not tied:
        expected.add("lm_head.weight")
    model = Qwen2VL(config)
    assert set(model.state_dict()) == expected
    assert not list(model.buffers())


def test_a_tied_lm_head_is_the_embedding() -> None:
    model = random_model(CONFIG)
    assert model.lm_head_weight is model.model.embed_tokens.weight
    hidden_TD = torch.randn(2, 64)
    torch.testing.assert_close(model.logits(hidden_TD), hidden_TD @ model.lm_head_weight.T)


def test_an_untied_lm_head_is_a_parameter() -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    assert model.lm_head is not None and model.lm_head_weight is model.lm_head.weight


def multimodal_inputs() -> dict[str, Any]:
    prompt = prompts.prompt([2, image(4, 4), 3, video(2, 2, 4), 4], CONFIG)
    return pack_prompts([prompt], [prompts.patches(prompt, CONFIG)], CONFIG)


@torch.inference_mode()
def test_embed_overwrites_placeholders_only() -> None:
    model = random_model(CONFIG)
    ids = torch.tensor([5, 6, 7, 8])
    vision_MD = torch.randn(2, 64)
    embeds_TD = model.embed(ids, vision_MD, torch.tensor([1, 3]))
    assert torch.equal(embeds_TD[[1, 3]], vision_MD)
    embedding_weight = model.model.embed_tokens.weight
    assert torch.equal(embeds_TD[[0, 2]], embedding_weight[[5, 7]])
    assert torch.equal(
        model.embed(ids, None, torch.tensor([], dtype=torch.int64)), embedding_weight[ids]
    )


@torch.inference_mode()
def test_precomputed_vision_embeddings_equal_patches() -> None:
    model, inputs = random_model(CONFIG), multimodal_inputs()
    expected = model(**inputs)
    vision_MD = model.encode(inputs.pop("patches_NP"), inputs.pop("vision_meta"))
    assert torch.equal(model(**inputs, vision_MD=vision_MD), expected)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


@torch.inference_mode()
def test_patches_and_vision_embeddings_are_mutually_exclusive() -> None:
    model, inputs = random_model(CONFIG), multimodal_inputs()
    zeros_MD = torch.zeros(8, 64)
    with pytest.raises(AssertionError):
        model(**inputs, vision_MD=zeros_MD)
    with pytest.raises(AssertionError):
        model(**without(inputs, "vision_meta"))
    with pytest.raises(AssertionError, match="vision tokens need placeholder_index_M"):
        model(**without(inputs, "placeholder_index_M"))
    with pytest.raises(AssertionError, match="7 vision tokens for 8 placeholders"):
        model(**without(inputs, "patches_NP", "vision_meta"), vision_MD=zeros_MD[:7])
    with pytest.raises(AssertionError, match="0 vision tokens for 8 placeholders"):
        model(**without(inputs, "patches_NP", "vision_meta"))


@torch.inference_mode()
def test_a_failed_forward_leaves_the_cache_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = random_model(CONFIG), multimodal_inputs()
    tokens = len(inputs["input_ids_T"])
    cache = KVCache.allocate(CONFIG.text, tokens, torch.float32, "cpu")

    caches = SequenceKVCaches([cache], inputs["meta"])

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", fail)
        with pytest.raises(MemoryError):
            model(**inputs, caches=caches)
    assert cache.length == 0
    assert torch.equal(model(**inputs, caches=caches), model(**inputs))
    assert cache.length == tokens


def test_every_parameter_gets_a_gradient_from_images_and_videos() -> None:
    model = random_model(CONFIG)
    model.logits(model(**multimodal_inputs())).logsumexp(-1).sum().backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert not without_gradient


def test_training_works_after_inference() -> None:
    # The cached constants of the rotary and pixel code must not be inference tensors.
    model, inputs = random_model(CONFIG), multimodal_inputs()
    inputs["patches_NP"] = torch.randint(0, 256, inputs["patches_NP"].shape, dtype=torch.uint8)
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).sum().backward()


@torch.inference_mode()
def test_a_model_cast_to_bfloat16_has_the_same_rotary_angles() -> None:
    model, inputs = random_model(CONFIG), multimodal_inputs()
    inputs["position_ids_3T"] += 30_000

    def rotary_angles() -> list[Tensor]:
        angles_seen: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: angles_seen.extend(args[1]))
            for block in (model.visual.blocks[0], model.model.layers[0])
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        return angles_seen

    exact = rotary_angles()
    model.to(torch.bfloat16)
    for before, after in zip(exact, rotary_angles(), strict=True):
        assert torch.equal(before.to(after.dtype), after)  # computed in float32, then rounded


@torch.inference_mode()
def test_bfloat16_logits_are_close_to_float32() -> None:
    model = random_model(CONFIG)
    prompt = prompts.prompt([9, image(4, 6), 9], CONFIG)
    patches_NP = prompts.patches(prompt, CONFIG)
    expected = compute_logits(model, prompt, patches_NP)
    got = compute_logits(model.to(torch.bfloat16), prompt, patches_NP)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03
