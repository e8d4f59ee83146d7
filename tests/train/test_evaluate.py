"""Held-out loss and vision gain: what they compare, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.data.preprocess import Example
from qwen2vl.recipes import tiny
from qwen2vl.synth import Mixture
from qwen2vl.train.config import ProbeConfig, TrainConfig
from qwen2vl.train.evaluate import HeldOut, held_out_batches, with_wrong_pictures
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loader.dataloader import batches
from qwen2vl.train.loss import token_loss
from tests.tiny import tiny_model, tiny_processor

WIDE, TALL, CLIP = "wide", "tall", "clip"


def conversation(number: int, kinds: list[str]) -> Example:
    """Show pictures whose pixels nobody else has, and ask something of a length of its own."""
    rng = np.random.default_rng(number)

    def media(kind: str) -> dict[str, Any]:
        if kind == CLIP:
            return {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
        size = (56, 84, 3) if kind == WIDE else (84, 56, 3)
        return {"type": "image", "image": rng.integers(0, 256, size, np.uint8)}

    content = [*map(media, kinds), {"type": "text", "text": "?" * (1 + 99 * number)}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x" * 3}]
    return Example(tiny_processor()(turns, for_training=True), f"family{number % 2}")


@cache
def made(number: int, kinds: tuple[str, ...]) -> Example:
    return conversation(number, list(kinds))


def packed(*all_kinds: list[str]) -> Batch:
    # Questions grow, so that conversations stand in the batch as they are given here.
    return pack([made(i, tuple(kinds)) for i, kinds in enumerate(all_kinds)], pad_id=0)


def losses(batch: Batch) -> torch.Tensor:
    model = tiny_model()
    with torch.no_grad():
        return token_loss(batch.run(model), model.head_weight, batch, 1.0).losses_R.double()


def test_the_wrong_batch_is_the_one_packed_from_exchanged_pictures() -> None:
    examples = [conversation(i, kinds) for i, kinds in enumerate([[WIDE], [WIDE], [CLIP], [CLIP]])]
    wrong, changed = with_wrong_pictures(pack(examples, pad_id=0))
    partner = [1, 0, 3, 2]
    swapped = [
        e._replace(input=replace(e.input, items=examples[partner[i]].input.items))
        for i, e in enumerate(examples)
    ]
    wanted = pack(swapped, pad_id=0)
    assert changed == {0, 1, 2, 3}
    assert torch.equal(wrong.patches_NP, wanted.patches_NP)
    assert torch.equal(wrong.pad_index_M, wanted.pad_index_M)
    assert torch.equal(wrong.input_ids_T, wanted.input_ids_T)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from([WIDE, TALL, CLIP]), max_size=3), min_size=1, max_size=5),
)
def test_every_changed_conversation_shows_only_pictures_of_others(kinds: list[list[str]]) -> None:
    batch = packed(*kinds)
    wrong, changed = with_wrong_pictures(batch)
    before, after = batch.patches_NP, wrong.patches_NP
    if not any(kinds):
        assert not changed
        return
    assert sorted(map(bytes, before.numpy())) == sorted(map(bytes, after.numpy()))
    ends = torch.tensor(batch.meta.lengths_q).cumsum(0)
    owner_N = torch.bucketize(batch.pad_index_M, ends, right=True).repeat_interleave(4)
    for owner, shown in enumerate(kinds):
        own_before = {bytes(row) for row in before[owner_N == owner].numpy()}
        own_after = {bytes(row) for row in after[owner_N == owner].numpy()}
        if owner in changed:
            assert shown and not own_before & own_after
        else:
            assert not shown or any(  # of some grid, one conversation has more than half
                2 * max(k.count(kind) for k in kinds) > sum(k.count(kind) for k in kinds)
                for kind in shown
            )


def test_a_picture_without_a_partner_stays_and_is_not_compared() -> None:
    batch = packed([WIDE], [TALL], [WIDE], [])
    wrong, changed = with_wrong_pictures(batch)
    assert changed == {0, 2}
    ends = torch.tensor(batch.meta.lengths_q).cumsum(0)
    owner_N = torch.bucketize(batch.pad_index_M, ends, right=True).repeat_interleave(4)
    assert torch.equal(batch.patches_NP[owner_N == 1], wrong.patches_NP[owner_N == 1])


def config(folder: Path, **words: Any) -> TrainConfig:
    base = tiny.recipe()
    stage = replace(base.stages[0], default_system=0.0)
    return replace(base, out=str(folder), stages=(stage,) * 2, dtype="float32", **words)


def test_loss_and_gain_are_means_over_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [packed([WIDE], [TALL], [WIDE], []), packed([CLIP], [CLIP, WIDE])]
    monkeypatch.setattr("qwen2vl.train.evaluate.held_out_batches", lambda *_: shown)
    found = HeldOut(config(tmp_path))(tiny_model(), tiny_processor(), 1)["held_out"]
    right = [losses(batch) for batch in shown]
    assert found["loss"] == pytest.approx(torch.cat(right).mean().item(), rel=1e-6)
    wrong = [losses(with_wrong_pictures(batch).batch) for batch in shown]
    # In the second batch the first clip gets the other's; the other's picture has no partner.
    changed = [
        torch.isin(b.owner_R, torch.tensor(own))
        for b, own in zip(shown, [[0, 2], [0]], strict=True)
    ]
    worse = [(w - r)[c] for w, r, c in zip(wrong, right, changed, strict=True)]
    gain = torch.cat(worse).mean().item()
    assert abs(gain) > 1e-4  # this model does look
    assert found["vision_gain"] == pytest.approx(gain, rel=1e-4)
    assert found["compared"] == 3
    assert set(found["families"]) == {"family0", "family1"}
    assert found["families"]["family0"]["vision_gain"] == pytest.approx(gain, rel=1e-4)
    assert "vision_gain" not in found["families"]["family1"]


def test_a_model_that_does_not_look_gains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen2vl.train.evaluate.held_out_batches", lambda *_: [packed([WIDE], [WIDE])]
    )
    model = tiny_model()
    for parameter in model.visual.merger.mlp[2].parameters():
        torch.nn.init.zeros_(parameter)
    found = HeldOut(config(tmp_path))(model, tiny_processor(), 1)["held_out"]
    assert found["vision_gain"] == 0


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    look = HeldOut(config(tmp_path, probe=ProbeConfig(examples=4)))
    first, again = (look(model, tiny_processor(), step) for step in (1, 2))
    assert first == again
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_held_out_samples_of_the_world_are_not_those_of_training(tmp_path: Path) -> None:
    run = config(tmp_path, probe=ProbeConfig(examples=20), workers=0)
    held = held_out_batches(run, 0, tiny_processor())
    assert [len(batch.families) for batch in held] == [16, 16]
    shown = {bytes(b.patches_NP.numpy()) for b in batches(run, tiny_processor(), 0)}
    assert not shown & {bytes(batch.patches_NP.numpy()) for batch in held}
    again = held_out_batches(run, 0, tiny_processor())
    assert all(torch.equal(a.patches_NP, b.patches_NP) for a, b in zip(held, again, strict=True))


def test_each_stage_has_its_own(tmp_path: Path) -> None:
    run = config(tmp_path, probe=ProbeConfig(examples=4))
    texts = replace(run.stages[1], mixture=Mixture(weights={"text_only": 1.0}))
    run = replace(run, stages=(run.stages[0], texts))
    look, model = HeldOut(run), tiny_model()
    first = look(model, tiny_processor(), run.stages[0].steps)["held_out"]
    second = look(model, tiny_processor(), run.stages[0].steps + 1)["held_out"]
    assert set(first["families"]) == {"shapes"}
    assert set(second["families"]) == {"text_only"}
    assert "vision_gain" not in second and second["compared"] == 0
