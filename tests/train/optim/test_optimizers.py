"""Optimizers: rules match every parameter, stages freeze by rule, optimizer state is restored."""

from collections.abc import Callable

import pytest
import torch

from qwen2vl.errors import ConfigError
from qwen2vl.model import Qwen2VL
from qwen2vl.recipes.nano import TRAIN_ALL, TRAIN_DECODER, TRAIN_DECODER_AND_MERGER, TRAIN_VISION
from qwen2vl.train.config import OptimConfig, Rules
from qwen2vl.train.optim.optimizers import Optimizers, apply_lr_rules
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("rules", "is_trainable"),
    [
        (TRAIN_DECODER, lambda name: not name.startswith("visual.")),
        (TRAIN_VISION, lambda name: name.startswith("visual.")),
        (TRAIN_ALL, lambda name: True),
        (
            TRAIN_DECODER_AND_MERGER,
            lambda name: not name.startswith("visual.") or ".merger." in name,
        ),
    ],
)
def test_a_stage_trains_what_its_rules_say_and_nothing_else(
    rules: Rules, is_trainable: Callable[[str], bool]
) -> None:
    model = tiny_model(seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = Optimizers(model, apply_lr_rules(model, rules), OptimConfig(weight_decay=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.01)
    optimizers.step(1.0)
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == is_trainable(name), name
        assert parameter.grad is None


def test_the_first_full_match_is_the_lr_factor() -> None:
    model = tiny_model(seed=0)
    scales = apply_lr_rules(
        model, ((r"visual\.merger\..*", 0.5), (r"visual\..*", 2.0), (r".*", 1.0))
    )
    assert scales["visual.merger.mlp.0.weight"] == 0.5
    assert scales["visual.blocks.0.attn.qkv.weight"] == 2.0
    assert scales["model.norm.weight"] == 1.0


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (((r"visual\..*", 1.0),), "no rule matches parameter model.embed_tokens.weight"),
        (((r".*", 1.0), (r"visual\..*", 0.0)), r"match no parameter: visual"),
        (((r"vision\..*", 0.0), (r".*", 1.0)), r"match no parameter: vision"),
    ],
)
def test_unused_rules_and_unmatched_parameters_are_refused(rules: Rules, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        apply_lr_rules(tiny_model(seed=0), rules)


def test_muon_takes_block_matrices_only() -> None:
    model = tiny_model(seed=0)
    muon, adam = Optimizers(model, apply_lr_rules(model, TRAIN_ALL), OptimConfig()).optimizers
    names = {p: n for n, p in model.named_parameters()}
    muon_names = [names[p] for group in muon.param_groups for p in group["params"]]
    adam_names = [names[p] for group in adam.param_groups for p in group["params"]]
    assert "visual.blocks.0.attn.qkv.weight" in muon_names
    assert "model.layers.1.mlp.down_proj.weight" in muon_names
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= set(adam_names)
    assert len(muon_names) + len(adam_names) == len(names)


def test_optimizer_state_is_restored_by_name() -> None:
    def run(model: Qwen2VL, optimizers: Optimizers, steps: int) -> None:
        generator = torch.Generator().manual_seed(7)
        for _ in range(steps):
            for parameter in optimizers.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizers.step(1.0)

    model = tiny_model(seed=0)
    optimizers = Optimizers(model, apply_lr_rules(model, TRAIN_ALL), OptimConfig())
    run(model, optimizers, 2)
    restored_model = tiny_model(seed=0)
    restored_model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    restored = Optimizers(restored_model, apply_lr_rules(restored_model, TRAIN_ALL), OptimConfig())
    saved = {name: tensor.clone() for name, tensor in optimizers.state_dict().items()}
    allocated = restored.allocate_state({name: tensor.shape for name, tensor in saved.items()})
    assert allocated.keys() == saved.keys()
    for name, tensor in allocated.items():
        tensor.copy_(saved[name])
    run(model, optimizers, 2)
    run(restored_model, restored, 2)
    for (name, a), b in zip(model.named_parameters(), restored_model.parameters(), strict=True):
        assert torch.equal(a, b), name
