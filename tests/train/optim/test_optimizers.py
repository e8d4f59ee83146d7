"""Rules match every parameter once; a stage freezes what it says; moments survive a save."""

from collections.abc import Callable

import pytest
import torch

from qwen2vl.errors import ConfigError
from qwen2vl.model import Qwen2VL
from qwen2vl.recipes.nano import ALL, ANSWER, SEE, WORDS
from qwen2vl.train.config import OptimConfig, Rules
from qwen2vl.train.optim.optimizers import Optimizers, apply_rules
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("rules", "moves"),
    [
        (WORDS, lambda name: not name.startswith("visual.")),
        (SEE, lambda name: name.startswith("visual.")),
        (ALL, lambda name: True),
        (ANSWER, lambda name: not name.startswith("visual.") or ".merger." in name),
    ],
)
def test_a_stage_moves_what_it_says_and_keeps_the_rest_to_the_bit(
    rules: Rules, moves: Callable[[str], bool]
) -> None:
    model = tiny_model(seed=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = Optimizers(model, apply_rules(model, rules), OptimConfig(weight_decay=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.01)
    optimizers.step(1.0)
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == moves(name), name
        assert parameter.grad is None


def test_the_first_full_match_wins_and_multiplies_the_rate() -> None:
    model = tiny_model(seed=0)
    scales = apply_rules(model, ((r"visual\.merger\..*", 0.5), (r"visual\..*", 2.0), (r".*", 1.0)))
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
def test_idle_rules_and_loose_parameters_are_refused(rules: Rules, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        apply_rules(tiny_model(seed=0), rules)


def test_muon_takes_block_matrices_only() -> None:
    model = tiny_model(seed=0)
    muon, adam = Optimizers(model, apply_rules(model, ALL), OptimConfig()).optimizers
    names = {p: n for n, p in model.named_parameters()}
    own = [names[p] for group in muon.param_groups for p in group["params"]]
    rest = [names[p] for group in adam.param_groups for p in group["params"]]
    assert "visual.blocks.0.attn.qkv.weight" in own
    assert "model.layers.1.mlp.down_proj.weight" in own
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= set(rest)
    assert len(own) + len(rest) == len(names)


def test_moments_come_back_by_name() -> None:
    def run(model: Qwen2VL, optimizers: Optimizers, steps: int) -> None:
        draw = torch.Generator().manual_seed(7)
        for _ in range(steps):
            for parameter in optimizers.named.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizers.step(1.0)

    model = tiny_model(seed=0)
    optimizers = Optimizers(model, apply_rules(model, ALL), OptimConfig())
    run(model, optimizers, 2)
    twin = tiny_model(seed=0)
    twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    again = Optimizers(twin, apply_rules(twin, ALL), OptimConfig())
    saved = {name: tensor.clone() for name, tensor in optimizers.state().items()}
    room = again.room_for({name: tensor.shape for name, tensor in saved.items()})
    assert room.keys() == saved.keys()
    for name, tensor in room.items():
        tensor.copy_(saved[name])
    run(model, optimizers, 2)
    run(twin, again, 2)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
