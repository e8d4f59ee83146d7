"""Eyes and words joined: names, sizes, the scatter, the cache and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.config import PRESETS
from qwen2vl.model import KVCache, Qwen2VL
from tests import prompts
from tests.parity.oracle import ask, packed, random_model
from tests.prompts import image, video
from tests.tiny import tiny_config

CONFIG = tiny_config()

BLOCK = [
    f"{part}.{kind}"
    for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
LAYER = [
    *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
]


@pytest.mark.parametrize(
    ("size", "count"), [("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)]
)
def test_official_sizes(size: str, count: int) -> None:
    with torch.device("meta"):
        model = Qwen2VL(PRESETS[size])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_carry_the_names_of_the_checkpoints(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    want = {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "model.norm.weight"}
    want |= {f"visual.blocks.{i}.{name}" for i in range(2) for name in BLOCK}
    want |= {
        f"visual.merger.{p}.{k}" for p in ("ln_q", "mlp.0", "mlp.2") for k in ("weight", "bias")
    }
    want |= {f"model.layers.{i}.{name}" for i in range(2) for name in LAYER}
    if not tied:
        want.add("lm_head.weight")
    model = Qwen2VL(config)
    assert set(model.state_dict()) == want
    assert not list(model.buffers())


def test_a_tied_head_is_the_embedding() -> None:
    model = random_model(CONFIG)
    assert model.head_weight is model.model.embed_tokens.weight
    hidden_TD = torch.randn(2, 64)
    torch.testing.assert_close(model.logits(hidden_TD), hidden_TD @ model.head_weight.T)


def test_an_untied_head_is_its_own() -> None:
    model = random_model(tiny_config(tie_word_embeddings=False))
    assert model.lm_head is not None and model.head_weight is model.lm_head.weight


def mixed() -> dict[str, Any]:
    prompt = prompts.prompt([2, image(4, 4), 3, video(2, 2, 4), 4], CONFIG)
    return packed([prompt], [prompts.patches(prompt, CONFIG)], CONFIG)


@torch.inference_mode()
def test_embed_overwrites_pads_and_nothing_else() -> None:
    model = random_model(CONFIG)
    ids = torch.tensor([5, 6, 7, 8])
    vision_MD = torch.randn(2, 64)
    embeds_TD = model.embed(ids, vision_MD, torch.tensor([1, 3]))
    assert torch.equal(embeds_TD[[1, 3]], vision_MD)
    table = model.model.embed_tokens.weight
    assert torch.equal(embeds_TD[[0, 2]], table[[5, 7]])
    assert torch.equal(model.embed(ids, None, torch.tensor([], dtype=torch.int64)), table[ids])


@torch.inference_mode()
def test_rows_encoded_before_equal_patches() -> None:
    model, inputs = random_model(CONFIG), mixed()
    want = model(**inputs)
    vision_MD = model.encode(inputs.pop("patches_NP"), inputs.pop("vision_meta"))
    assert torch.equal(model(**inputs, vision_MD=vision_MD), want)


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


@torch.inference_mode()
def test_pictures_come_in_one_way_only() -> None:
    model, inputs = random_model(CONFIG), mixed()
    rows = torch.zeros(8, 64)
    with pytest.raises(AssertionError):
        model(**inputs, vision_MD=rows)
    with pytest.raises(AssertionError):
        model(**without(inputs, "vision_meta"))
    with pytest.raises(AssertionError, match="vision tokens need pad_index_M"):
        model(**without(inputs, "pad_index_M"))
    with pytest.raises(AssertionError, match="7 vision tokens for 8 placeholders"):
        model(**without(inputs, "patches_NP", "vision_meta"), vision_MD=rows[:7])
    with pytest.raises(AssertionError, match="0 vision tokens for 8 placeholders"):
        model(**without(inputs, "patches_NP", "vision_meta"))


@torch.inference_mode()
def test_a_failed_forward_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = random_model(CONFIG), mixed()
    tokens = len(inputs["input_ids_T"])
    cache = KVCache.allocate(CONFIG.text, tokens, torch.float32, "cpu")

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", fail)
        with pytest.raises(MemoryError):
            model(**inputs, caches=[cache])
    assert cache.length == 0
    assert torch.equal(model(**inputs, caches=[cache]), model(**inputs))
    assert cache.length == tokens


def test_every_parameter_learns_from_a_picture_and_a_clip() -> None:
    model = random_model(CONFIG)
    model.logits(model(**mixed())).logsumexp(-1).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_training_works_after_answering() -> None:
    # Constants are cached by the rotary and pixel code; they must not remember inference mode.
    model, inputs = random_model(CONFIG), mixed()
    inputs["patches_NP"] = torch.randint(0, 256, inputs["patches_NP"].shape, dtype=torch.uint8)
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).sum().backward()


@torch.inference_mode()
def test_a_model_cast_to_bfloat16_keeps_exact_angles() -> None:
    model, inputs = random_model(CONFIG), mixed()
    inputs["position_ids_3T"] += 30_000

    def angles() -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
            for block in (model.visual.blocks[0], model.model.layers[0])
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        return seen

    exact = angles()
    model.to(torch.bfloat16)
    for before, after in zip(exact, angles(), strict=True):
        assert after.dtype == torch.float32 and torch.equal(before, after)


@torch.inference_mode()
def test_bfloat16_stays_near_float32() -> None:
    model = random_model(CONFIG)
    prompt = prompts.prompt([9, image(4, 6), 9], CONFIG)
    patches_NP = prompts.patches(prompt, CONFIG)
    want = ask(model, prompt, patches_NP)
    got = ask(model.to(torch.bfloat16), prompt, patches_NP)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.03
