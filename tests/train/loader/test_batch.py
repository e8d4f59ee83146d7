"""Batch: labels shift within a conversation; a packed batch equals separate conversations."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from qwen2vl.data.preprocess import PAD_TO_MULTIPLE_OF, BadSample, TrainingExample
from qwen2vl.train.loader.batch import Batch, copy_to_device, pack_batch
from qwen2vl.train.loss import token_loss
from tests.tiny import tiny_model, tiny_processor


def conversations() -> list[TrainingExample]:
    """Text only, images of two sizes, two images, a video; answers of different lengths."""
    rng = np.random.default_rng(0)
    processor = tiny_processor()

    def image(height: int, width: int) -> dict:
        return {"type": "image", "image": rng.integers(0, 256, (height, width, 3), np.uint8)}

    clip = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    cases = [
        ([], "hello", "hi"),
        ([image(112, 56)], "what?", "a long answer"),
        ([image(56, 84), image(84, 112)], "same?", "no"),
        ([clip], "where to?", "left"),
        ([image(56, 84)], "and this?", "x"),
    ]
    return [
        TrainingExample(
            processor(
                [
                    {"role": "user", "content": [*media, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": answer},
                ],
                for_training=True,
            ),
            f"family{i % 2}",
        )
        for i, (media, question, answer) in enumerate(cases)
    ]


def loss_and_gradients(batch: Batch, divisor: float) -> tuple[float, dict[str, torch.Tensor]]:
    model = tiny_model(seed=0)
    model.requires_grad_(True)
    hidden_TD = batch.forward(model)
    output = token_loss(hidden_TD, model.lm_head_weight, batch, divisor)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), grads


@pytest.mark.parametrize("weighting", ["token", "sample", "root"])
def test_a_packed_batch_equals_the_sum_of_single_conversations(
    weighting: Literal["token", "sample", "root"],
) -> None:
    examples = conversations()
    packed = pack_batch(examples, pad_id=0, weighting=weighting)
    divisor = float(packed.weights_R.sum())
    loss, grads = loss_and_gradients(packed, divisor)
    singles = [
        loss_and_gradients(pack_batch([e], pad_id=0, weighting=weighting), divisor)
        for e in examples
    ]
    assert loss == pytest.approx(sum(single for single, _ in singles), rel=1e-6)
    for name, grad in grads.items():
        total = sum(grads_of_one[name] for _, grads_of_one in singles if name in grads_of_one)
        torch.testing.assert_close(grad, total, rtol=0, atol=1e-5 * float(grad.abs().max()))


def test_every_target_is_the_next_supervised_token() -> None:
    examples = conversations()
    batch = pack_batch(examples, pad_id=0)
    ordered = sorted(examples, key=lambda e: len(e.input.input_ids))
    ids = batch.input_ids_T.tolist()
    start = 0
    for example_index, (example, length) in enumerate(
        zip(ordered, batch.meta.lengths_q, strict=True)
    ):
        model_input = example.input
        assert ids[start : start + len(model_input.input_ids)] == model_input.input_ids
        expected = [i for i, supervised in enumerate(model_input.loss_mask or []) if supervised]
        indices = batch.target_index_R[batch.example_index_R == example_index].tolist()
        assert indices == [start + i - 1 for i in expected]
        assert batch.targets_R[batch.example_index_R == example_index].tolist() == [
            model_input.input_ids[i] for i in expected
        ]
        assert length % PAD_TO_MULTIPLE_OF == 0
        start += length
    assert batch.families == tuple(e.family for e in ordered)


def test_images_are_sorted_by_area_and_keep_their_placeholders() -> None:
    batch = pack_batch(conversations(), pad_id=0)
    assert batch.vision_meta is not None
    lengths = batch.vision_meta.attn_meta.lengths_q
    assert list(lengths) == sorted(lengths)
    assert batch.placeholder_index_M is not None
    processor = tiny_processor()
    pads = processor.config.placeholder_ids
    assert all(batch.input_ids_T[i].item() in pads for i in batch.placeholder_index_M.tolist())
    assert len(set(batch.placeholder_index_M.tolist())) == len(batch.placeholder_index_M)


def test_a_dummy_image_has_exactly_zero_gradients() -> None:
    batch = pack_batch(conversations()[:1], pad_id=0)
    assert batch.patches_NP.shape == (4, 1176)
    assert batch.vision_meta.attn_meta.lengths_q == (4,)
    assert len(batch.placeholder_index_M) == 0
    loss, grads = loss_and_gradients(batch, 1.0)
    bare = replace(
        batch, patches_NP=None, vision_meta=None, placeholder_index_M=None
    )  # skips the vision tower
    bare_loss, bare_grads = loss_and_gradients(bare, 1.0)
    assert loss == bare_loss
    visual = {name for name in grads if name.startswith("visual.")}
    assert visual == grads.keys() - bare_grads.keys()
    assert len(visual) == len([n for n, _ in tiny_model().named_parameters() if "visual." in n])
    for name, grad in grads.items():
        assert torch.equal(grad, bare_grads.get(name, torch.zeros_like(grad))), name


def test_a_batch_of_bad_samples_has_no_gradients() -> None:
    bad = BadSample("a.jsonl:7", "a", "missing", "cat.png is missing")
    batch = pack_batch([], pad_id=3, bad_samples=[bad])
    assert batch.bad_samples == (bad,)
    assert batch.families == ()
    assert batch.input_ids_T.tolist() == [3] * PAD_TO_MULTIPLE_OF
    assert len(batch.targets_R) == len(batch.weights_R) == 0
    loss, grads = loss_and_gradients(batch, 1.0)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())


def test_vision_tokens_without_placeholders_are_refused() -> None:
    batch = pack_batch(conversations()[1:2], pad_id=0)
    broken = replace(batch, placeholder_index_M=batch.placeholder_index_M[:0])
    with pytest.raises(AssertionError, match="8 vision tokens for 0 placeholders"):
        broken.forward(tiny_model())


@pytest.mark.parametrize(("weighting", "exponent"), [("token", 1), ("sample", 0), ("root", 0.5)])
def test_weighting_gives_each_conversation_a_power_of_its_length(
    weighting: Literal["token", "sample", "root"], exponent: float
) -> None:
    batch = pack_batch(conversations(), pad_id=0, weighting=weighting)
    for example_index in range(5):
        weights = batch.weights_R[batch.example_index_R == example_index]
        assert weights.sum().item() == pytest.approx(len(weights) ** exponent)


def test_a_conversation_without_supervised_tokens_fails_an_assertion() -> None:
    example = tiny_processor()([{"role": "user", "content": "x"}], for_training=True)
    with pytest.raises(AssertionError, match="without supervised tokens"):
        pack_batch([TrainingExample(example, "x")], pad_id=0)


def test_to_moves_every_tensor() -> None:
    batch = pack_batch(conversations(), pad_id=0)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    tensors = [getattr(moved, name) for name in moved.__slots__]
    found = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    metas = (moved.meta.cu_seqlens_q, moved.vision_meta.positions_N2)
    assert found | {t.device.type for t in metas} == {"meta"}
    assert moved.meta.lengths_q == batch.meta.lengths_q
    assert copy_to_device(torch.ones(2), "meta").is_meta
