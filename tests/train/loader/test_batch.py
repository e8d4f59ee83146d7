"""Packing: labels shift inside a conversation, rows find their tokens, packed equals separate."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from qwen2vl.data.preprocess import ROUND, BadSample, Example
from qwen2vl.train.loader.batch import Batch, pack, sent
from qwen2vl.train.loss import token_loss
from tests.tiny import tiny_model, tiny_processor


def conversations() -> list[Example]:
    """Text alone, two sizes of picture, two pictures, a clip; answers of different lengths."""
    rng = np.random.default_rng(0)
    processor = tiny_processor()

    def picture(height: int, width: int) -> dict:
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)}

    clip = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    asked = [
        ([], "hello", "hi"),
        ([picture(112, 56)], "what?", "a long answer"),
        ([picture(56, 84), picture(84, 112)], "same?", "no"),
        ([clip], "where to?", "left"),
        ([picture(56, 84)], "and this?", "x"),
    ]
    return [
        Example(
            processor(
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": answer},
                ],
                for_training=True,
            ),
            f"family{i % 2}",
        )
        for i, (media, question, answer) in enumerate(asked)
    ]


def loss_and_gradients(batch: Batch, divisor: float) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny_model(seed=0)
    model.requires_grad_(True)
    hidden_TD = batch.run(model)
    outcome = token_loss(hidden_TD, model.head_weight, batch, divisor)
    outcome.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outcome.loss.item(), grads


@pytest.mark.parametrize("weighting", ["token", "sample", "root"])
def test_packed_equals_the_sum_of_single_conversations(
    weighting: Literal["token", "sample", "root"],
) -> None:
    examples = conversations()
    packed = pack(examples, pad_id=0, weighting=weighting)
    divisor = float(packed.weights_R.sum())
    loss, grads = loss_and_gradients(packed, divisor)
    singles = [
        loss_and_gradients(pack([e], pad_id=0, weighting=weighting), divisor) for e in examples
    ]
    assert loss == pytest.approx(sum(single for single, _ in singles), rel=1e-6)
    for name, grad in grads.items():
        total = sum(own[name] for _, own in singles if name in own)
        torch.testing.assert_close(grad, total, rtol=0, atol=1e-5 * float(grad.abs().max()))


def test_every_target_is_the_next_supervised_token() -> None:
    examples = conversations()
    batch = pack(examples, pad_id=0)
    ordered = sorted(examples, key=lambda e: len(e.input.input_ids))
    ids = batch.input_ids_T.tolist()
    start = 0
    for owner, (example, length) in enumerate(zip(ordered, batch.meta.lengths_q, strict=True)):
        own = example.input
        assert ids[start : start + len(own.input_ids)] == own.input_ids
        wanted = [i for i, yes in enumerate(own.loss_mask or []) if yes]
        rows = batch.target_index_R[batch.owner_R == owner].tolist()
        assert rows == [start + i - 1 for i in wanted]
        assert batch.targets_R[batch.owner_R == owner].tolist() == [
            own.input_ids[i] for i in wanted
        ]
        assert length % ROUND == 0
        start += length
    assert batch.families == tuple(e.family for e in ordered)


def test_pictures_of_one_area_are_neighbors_and_rows_still_find_their_tokens() -> None:
    batch = pack(conversations(), pad_id=0)
    assert batch.vision_meta is not None
    lengths = batch.vision_meta.frames.lengths_q
    assert list(lengths) == sorted(lengths)
    assert batch.pad_index_M is not None
    processor = tiny_processor()
    pads = processor.config.pad_ids
    assert all(batch.input_ids_T[i].item() in pads for i in batch.pad_index_M.tolist())
    assert len(set(batch.pad_index_M.tolist())) == len(batch.pad_index_M)


def test_without_a_picture_the_tower_runs_on_a_null_item_whose_gradients_are_exact_zeros() -> None:
    batch = pack(conversations()[:1], pad_id=0)
    assert batch.patches_NP.shape == (4, 1176)
    assert batch.vision_meta.frames.lengths_q == (4,)
    assert len(batch.pad_index_M) == 0
    loss, grads = loss_and_gradients(batch, 1.0)
    bare = replace(batch, patches_NP=None, vision_meta=None, pad_index_M=None)  # the tower skipped
    bare_loss, bare_grads = loss_and_gradients(bare, 1.0)
    assert loss == bare_loss
    visual = {name for name in grads if name.startswith("visual.")}
    assert visual == grads.keys() - bare_grads.keys()
    assert len(visual) == len([n for n, _ in tiny_model().named_parameters() if "visual." in n])
    for name, grad in grads.items():
        assert torch.equal(grad, bare_grads.get(name, torch.zeros_like(grad))), name


def test_a_batch_of_bad_samples_is_an_empty_document_that_moves_nothing() -> None:
    bad = BadSample("a.jsonl:7", "a", "missing", "cat.png is missing")
    batch = pack([], pad_id=3, bad=[bad])
    assert batch.bad == (bad,)
    assert batch.families == ()
    assert batch.input_ids_T.tolist() == [3] * ROUND
    assert len(batch.targets_R) == len(batch.weights_R) == 0
    loss, grads = loss_and_gradients(batch, 1.0)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


def test_rows_without_a_placeholder_are_no_null_item() -> None:
    batch = pack(conversations()[1:2], pad_id=0)
    broken = replace(batch, pad_index_M=batch.pad_index_M[:0])
    with pytest.raises(AssertionError, match="8 vision tokens for 0 placeholders"):
        broken.run(tiny_model())


@pytest.mark.parametrize(("weighting", "power"), [("token", 1), ("sample", 0), ("root", 0.5)])
def test_weighting_gives_each_answer_a_power_of_its_length(
    weighting: Literal["token", "sample", "root"], power: float
) -> None:
    batch = pack(conversations(), pad_id=0, weighting=weighting)
    for owner in range(5):
        weights = batch.weights_R[batch.owner_R == owner]
        assert weights.sum().item() == pytest.approx(len(weights) ** power)


def test_a_conversation_without_supervised_tokens_is_our_own_bug() -> None:
    example = tiny_processor()([{"role": "user", "content": "x"}], for_training=True)
    with pytest.raises(AssertionError, match="without supervised tokens"):
        pack([Example(example, "x")], pad_id=0)


def test_a_batch_is_moved_whole() -> None:
    batch = pack(conversations(), pad_id=0)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    tensors = [getattr(moved, name) for name in moved.__slots__]
    found = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    metas = (moved.meta.cu_seqlens_q, moved.vision_meta.positions_N2)
    assert found | {t.device.type for t in metas} == {"meta"}
    assert moved.meta.lengths_q == batch.meta.lengths_q
    assert sent(torch.ones(2), "meta").is_meta
