"""FLOP counter: equal to torch.utils.flop_counter for any freezing and checkpointing."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl import flops
from qwen2vl.config import PRESETS
from qwen2vl.flops import (
    BatchCounts,
    UnitCost,
    build_flop_counter,
    inference_flop_counter,
    peak_flops,
)
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.lora.layers import LoraConfig, init_factors, inject_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import apply_activation_checkpointing
from qwen2vl.recipes import nano
from qwen2vl.train.config import Rules
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loss import token_loss
from qwen2vl.train.optim.optimizers import apply_lr_rules
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations


@cache
def batch_of_all_kinds() -> Batch:
    """Return a batch of text, images of several sizes and a video."""
    return pack_batch(conversations(), pad_id=0)


def torch_flops(model: Qwen2VL, batch: Batch) -> tuple[int, dict[str, int]]:
    """Count with torch; with the math backend the matmuls of attention are separate operators."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = token_loss(batch.forward(model), model.lm_head_weight, batch, 1.0).loss
        if loss.requires_grad:
            loss.backward()
    flops_of_batch = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), {str(op): count for op, count in flops_of_batch.items()}


def unfreeze_all(model: nn.Module) -> Qwen2VL:
    assert isinstance(model, Qwen2VL)
    return model.requires_grad_(True)


STAGES: dict[str, Rules] = {
    "words": nano.TRAIN_DECODER,
    "see": nano.TRAIN_VISION,
    "all": nano.TRAIN_ALL,
    "answer": nano.TRAIN_DECODER_AND_MERGER,
    "merger": ((r"visual\.merger\..*", 1.0), (r".*", 0.0)),
    "upper": ((r"model\.layers\.1\..*", 1.0), (r".*", 0.0)),
    "nothing": ((r".*", 0.0),),
}


@pytest.mark.parametrize(
    ("stage", "tied"), [*((stage, True) for stage in STAGES), ("all", False), ("words", False)]
)
def test_equals_torch_for_every_freezing_rule(stage: str, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    apply_lr_rules(model, STAGES[stage])
    batch = batch_of_all_kinds()
    assert (
        build_flop_counter(model).count(batch.flop_counts(), causal=False).model
        == torch_flops(model, batch)[0]
    )


@pytest.mark.parametrize("seed", range(6))
def test_equals_torch_for_random_trainable_parameters(seed: int) -> None:
    model, rng = tiny_model(), random.Random(seed)
    share = rng.choice([0.02, 0.1, 0.5])
    for parameter in model.parameters():
        parameter.requires_grad_(rng.random() < share)
    batch = batch_of_all_kinds()
    assert (
        build_flop_counter(model).count(batch.flop_counts(), causal=False).model
        == torch_flops(model, batch)[0]
    )


def test_equals_torch_for_text_only() -> None:
    model, batch = unfreeze_all(tiny_model()), pack_batch(conversations()[:1], pad_id=0)
    assert batch.flop_counts().num_patches == 4  # the dummy image is computed too
    assert (
        build_flop_counter(model).count(batch.flop_counts(), causal=False).model
        == torch_flops(model, batch)[0]
    )


@pytest.mark.parametrize(
    ("targets", "quantize"),
    [((r"model\..*",), "none"), ((r".*",), "nf4"), ((r"visual\..*fc2",), "none")],
)
def test_equals_torch_with_lora(targets: tuple[str, ...], quantize: str) -> None:
    model = tiny_model()
    model.requires_grad_(False)
    factors = init_factors(model, LoraConfig(rank=4, target_modules=targets), seed=0)
    inject_lora(model, factors, quantize="nf4" if quantize == "nf4" else "none")
    batch = batch_of_all_kinds()
    assert (
        build_flop_counter(model).count(batch.flop_counts(), causal=False).model
        == torch_flops(model, batch)[0]
    )


@pytest.mark.parametrize(
    ("stage", "every"), [("see", 1), ("all", 1), ("all", 2), ("answer", 1), ("upper", 1)]
)
def test_recompute_flops_equal_the_additional_flops_of_torch(stage: str, every: int) -> None:
    model, batch = tiny_model(), batch_of_all_kinds()
    apply_activation_checkpointing(model, visual="full", text="full", every_n_blocks=every)
    apply_lr_rules(model, STAGES[stage])
    counter = build_flop_counter(model, visual="full", text="full", every_n_blocks=every)
    flops_of_batch = counter.count(batch.flop_counts(), causal=False)
    assert flops_of_batch.recompute > 0
    assert flops_of_batch.model + flops_of_batch.recompute == torch_flops(model, batch)[0]


def test_selective_checkpointing_recomputes_wide_matmuls_only() -> None:
    batch = batch_of_all_kinds()
    plain, model = unfreeze_all(tiny_model()), unfreeze_all(tiny_model())
    apply_activation_checkpointing(model, visual="selective", text="selective")
    without, with_checkpointing = torch_flops(plain, batch)[1], torch_flops(model, batch)[1]
    # Attention is unfused here, and recomputed, so only the other matmuls are compared.
    additional = sum(with_checkpointing[op] - without[op] for op in ("aten.mm", "aten.addmm"))
    counter = build_flop_counter(model, visual="selective", text="selective")
    assert counter.count(batch.flop_counts()).recompute == additional


def test_causal_attention_excludes_the_upper_triangle() -> None:
    model, batch = unfreeze_all(tiny_model()), batch_of_all_kinds()
    counts, counter = batch.flop_counts(), build_flop_counter(model)
    triangle = sum(n * (n - 1) // 2 for n in batch.meta.lengths_q)
    layers, width = 2, 64
    missing = (4 + 8) * width * layers * triangle
    assert counter.count(counts, causal=False).model - counter.count(counts).model == missing


def test_the_2b_model_by_closed_formulas() -> None:
    config = PRESETS["2B"]
    with torch.device("meta"):
        counter = build_flop_counter(unfreeze_all(Qwen2VL(config)))
    e, v, d, f, kv = 1280, 32, 1536, 8960, 256
    patch = 1176 * e + v * (4 * e * e + 2 * e * 4 * e) + (16 * e * e + 4 * e * d) // 4
    token = 28 * (2 * d * d + 2 * d * kv + 3 * d * f)
    assert counter.patch == UnitCost(2 * patch, 4 * patch - 2 * 1176 * e)
    assert counter.token == UnitCost(2 * token, 4 * token)
    assert counter.token_pair == UnitCost(4 * d * 28, 8 * d * 28)
    assert counter.patch_pair == UnitCost(4 * e * v, 8 * e * v)
    assert counter.target == UnitCost(2 * d * 151_936, 4 * d * 151_936)


def test_peak_flops_is_the_given_or_the_published_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 1.5) == 1.5e12
    cuda, device_name = torch.device("cuda", 0), SimpleNamespace(name="")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name.name)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        device_name.name = name
        assert peak_flops(cuda) == peak
    assert peak_flops(cuda, 2.0) == 2e12
    assert {name_part for name_part, _ in flops.PEAK_TFLOPS} >= {"H100", "H200", "A100"}


@settings(deadline=None, max_examples=20)
@given(
    heads=st.integers(1, 3),
    depths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    mlp=st.integers(1, 5),
    sides=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    length=st.integers(1, 40),
)
def test_inference_equals_torch_for_any_config_and_prompt(
    heads: int,
    depths: tuple[int, int],
    mlp: int,
    sides: list[tuple[int, int]],
    length: int,
) -> None:
    config = tiny_config()
    config = replace(
        config,
        vision=replace(config.vision, depth=depths[0], embed_dim=16 * heads, num_heads=heads),
        text=replace(config.text, num_hidden_layers=depths[1], intermediate_size=32 * mlp),
    )
    model, counter = tiny_model(config=config), inference_flop_counter(config)
    grids = [Grid(1, 2 * height, 2 * width) for height, width in sides]
    meta = VisionMeta.build(grids, config.vision.spatial_merge_size)
    frames = meta.attn_meta.lengths_q
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as vision_counter:
            model.encode(torch.zeros(sum(frames), 1176, dtype=torch.uint8), meta)
        with FlopCounterMode(display=False) as text_counter:
            positions_3T = torch.arange(length).expand(3, -1)
            model(torch.zeros(length, dtype=torch.int64), positions_3T, AttnMeta.build([length]))
    vision, text = BatchCounts.from_lengths(frames, []), BatchCounts.from_lengths([], [length])
    assert counter.count(vision).model == vision_counter.get_total_flops()
    assert counter.count(text, causal=False).model == text_counter.get_total_flops()
    # Both towers together cost what each costs alone, and there is no backward.
    together = counter.count(BatchCounts.from_lengths(frames, [length]))
    assert together == (counter.count(vision).model + counter.count(text).model, 0)
