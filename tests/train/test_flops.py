"""FLOPs: equal to torch's own counter, whoever is frozen and whatever is computed twice."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl.config import PRESETS
from qwen2vl.lora.layers import LoraConfig, fresh_factors, put_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.activation_checkpointing import recompute
from qwen2vl.recipes import nano
from qwen2vl.train import flops
from qwen2vl.train.config import RecomputeConfig, Rules
from qwen2vl.train.flops import Price, Work, costs, peak_of
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loss import token_loss
from qwen2vl.train.optim.optimizers import apply_rules
from tests.tiny import tiny_config, tiny_model
from tests.train.loader.test_batch import conversations


@cache
def batch_of_all_kinds() -> Batch:
    """Text alone, pictures of several sizes, a clip."""
    return pack(conversations(), pad_id=0)


def measured(model: Qwen2VL, batch: Batch) -> tuple[int, dict[str, int]]:
    """Count with torch, where every product of attention is written out."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = token_loss(batch.run(model), model.head_weight, batch, 1.0).loss
        if loss.requires_grad:
            loss.backward()
    found = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), {str(op): count for op, count in found.items()}


def free_all(model: nn.Module) -> Qwen2VL:
    assert isinstance(model, Qwen2VL)
    return model.requires_grad_(True)


STAGES: dict[str, Rules] = {
    "words": nano.WORDS,
    "see": nano.SEE,
    "all": nano.ALL,
    "answer": nano.ANSWER,
    "merger": ((r"visual\.merger\..*", 1.0), (r".*", 0.0)),
    "upper": ((r"model\.layers\.1\..*", 1.0), (r".*", 0.0)),
    "nothing": ((r".*", 0.0),),
}


@pytest.mark.parametrize(
    ("stage", "tied"), [*((stage, True) for stage in STAGES), ("all", False), ("words", False)]
)
def test_equal_to_the_counter_in_every_freezing(stage: str, tied: bool) -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    apply_rules(model, STAGES[stage])
    batch = batch_of_all_kinds()
    assert costs(model).of(Work.of(batch), causal=False).model == measured(model, batch)[0]


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_the_counter_whatever_single_parameters_learn(seed: int) -> None:
    model, draw = tiny_model(), random.Random(seed)
    share = draw.choice([0.02, 0.1, 0.5])
    for parameter in model.parameters():
        parameter.requires_grad_(draw.random() < share)
    batch = batch_of_all_kinds()
    assert costs(model).of(Work.of(batch), causal=False).model == measured(model, batch)[0]


def test_equal_to_the_counter_for_text_alone() -> None:
    model, batch = free_all(tiny_model()), pack(conversations()[:1], pad_id=0)
    assert Work.of(batch).patches == 4  # a null item is computed too
    assert costs(model).of(Work.of(batch), causal=False).model == measured(model, batch)[0]


@pytest.mark.parametrize(
    ("targets", "quantize"),
    [((r"model\..*",), "none"), ((r".*",), "nf4"), ((r"visual\..*fc2",), "none")],
)
def test_equal_to_the_counter_with_adapters(targets: tuple[str, ...], quantize: str) -> None:
    model = tiny_model()
    model.requires_grad_(False)
    factors = fresh_factors(model, LoraConfig(rank=4, targets=targets), seed=0)
    put_lora(model, factors, quantize="nf4" if quantize == "nf4" else "none")
    batch = batch_of_all_kinds()
    assert costs(model).of(Work.of(batch), causal=False).model == measured(model, batch)[0]


@pytest.mark.parametrize(
    ("stage", "every"), [("see", 1), ("all", 1), ("all", 2), ("answer", 1), ("upper", 1)]
)
def test_what_is_computed_again_is_what_the_counter_sees_more(stage: str, every: int) -> None:
    config = RecomputeConfig(visual="block", text="block", every=every)
    model, batch = tiny_model(), batch_of_all_kinds()
    recompute(model, visual="block", text="block", every=every)
    apply_rules(model, STAGES[stage])
    found = costs(model, config).of(Work.of(batch), causal=False)
    assert found.again > 0
    assert found.model + found.again == measured(model, batch)[0]


def test_selective_recomputing_repeats_wide_products_only() -> None:
    config = RecomputeConfig(visual="selective", text="selective")
    batch = batch_of_all_kinds()
    plain, model = free_all(tiny_model()), free_all(tiny_model())
    recompute(model, visual="selective", text="selective")
    once, twice = measured(plain, batch)[1], measured(model, batch)[1]
    # Attention is written out in this measurement, so only its products are what is repeated.
    more = sum(twice[op] - once[op] for op in ("aten.mm", "aten.addmm"))
    assert costs(model, config).of(Work.of(batch)).again == more


def test_causal_is_the_square_without_its_upper_triangle() -> None:
    model, batch = free_all(tiny_model()), batch_of_all_kinds()
    work, price = Work.of(batch), costs(model)
    triangle = sum(n * (n - 1) // 2 for n in batch.meta.lengths_q)
    layers, width = 2, 64
    missing = (4 + 8) * width * layers * triangle
    assert price.of(work, causal=False).model - price.of(work).model == missing


def test_the_2b_shape_by_the_formulas_of_the_books() -> None:
    config = PRESETS["2B"]
    with torch.device("meta"):
        price = costs(free_all(Qwen2VL(config)))
    e, v, d, f, kv = 1280, 32, 1536, 8960, 256
    patch = 1176 * e + v * (4 * e * e + 2 * e * 4 * e) + (16 * e * e + 4 * e * d) // 4
    token = 28 * (2 * d * d + 2 * d * kv + 3 * d * f)
    assert price.patch == Price(2 * patch, 4 * patch - 2 * 1176 * e)
    assert price.token == Price(2 * token, 4 * token)
    assert price.token_pair == Price(4 * d * 28, 8 * d * 28)
    assert price.patch_pair == Price(4 * e * v, 8 * e * v)
    assert price.target == Price(2 * d * 151_936, 4 * d * 151_936)


def test_the_peak_is_what_one_says_or_what_the_table_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of(torch.device("cpu")) is None
    assert peak_of(torch.device("cpu"), 1.5) == 1.5e12
    cuda, seen = torch.device("cuda", 0), SimpleNamespace(name="")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: seen.name)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ):
        seen.name = name
        assert peak_of(cuda) == peak
    assert peak_of(cuda, 2.0) == 2e12
    assert {part for part, _ in flops.PEAKS} >= {"H100", "H200", "A100"}
