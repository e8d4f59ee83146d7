"""Evaluation: held-out loss and vision gain, and that evaluation changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.data.preprocess import TrainingExample
from qwen2vl.recipes import tiny
from qwen2vl.synth import Mixture
from qwen2vl.train.config import EvaluationConfig, TrainConfig
from qwen2vl.train.evaluate import Evaluator, held_out_batches, swap_images
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loader.dataloader import iterate_batches, open_dataset
from qwen2vl.train.loss import token_loss
from tests.data.rows import (
    conversation,
    create_data_config,
    create_run_config,
    good_rows,
    write_media,
    write_rows,
)
from tests.tiny import tiny_model, tiny_processor

WIDE, TALL, VIDEO = "wide", "tall", "video"


def build_example(number: int, kinds: list[str]) -> TrainingExample:
    """Return an example with unique pixels and a prompt of unique length."""
    rng = np.random.default_rng(number)

    def media(kind: str) -> dict[str, Any]:
        if kind == VIDEO:
            return {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
        size = (56, 84, 3) if kind == WIDE else (84, 56, 3)
        return {"type": "image", "image": rng.integers(0, 256, size, np.uint8)}

    content = [*map(media, kinds), {"type": "text", "text": "?" * (1 + 99 * number)}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x" * 3}]
    return TrainingExample(tiny_processor()(messages, for_training=True), f"family{number % 2}")


@cache
def cached_example(number: int, kinds: tuple[str, ...]) -> TrainingExample:
    return build_example(number, list(kinds))


def pack_examples(*all_kinds: list[str]) -> Batch:
    # Prompts grow, so that the conversations of the batch keep this order.
    return pack_batch(
        [cached_example(i, tuple(kinds)) for i, kinds in enumerate(all_kinds)], pad_id=0
    )


def losses(batch: Batch) -> torch.Tensor:
    model = tiny_model()
    with torch.no_grad():
        return token_loss(batch.forward(model), model.lm_head_weight, batch, 1.0).losses_R.double()


def test_the_swapped_batch_equals_one_packed_from_swapped_images() -> None:
    examples = [
        build_example(i, kinds) for i, kinds in enumerate([[WIDE], [WIDE], [VIDEO], [VIDEO]])
    ]
    swapped, swapped_examples = swap_images(pack_batch(examples, pad_id=0))
    partner = [1, 0, 3, 2]
    expected_examples = [
        e._replace(input=replace(e.input, items=examples[partner[i]].input.items))
        for i, e in enumerate(examples)
    ]
    expected = pack_batch(expected_examples, pad_id=0)
    assert swapped_examples == {0, 1, 2, 3}
    assert torch.equal(swapped.patches_NP, expected.patches_NP)
    assert torch.equal(swapped.placeholder_index_M, expected.placeholder_index_M)
    assert torch.equal(swapped.input_ids_T, expected.input_ids_T)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.sampled_from([WIDE, TALL, VIDEO]), max_size=3), min_size=1, max_size=5),
)
def test_every_swapped_conversation_has_only_images_of_others(kinds: list[list[str]]) -> None:
    batch = pack_examples(*kinds)
    swapped, swapped_examples = swap_images(batch)
    before, after = batch.patches_NP, swapped.patches_NP
    if not any(kinds):
        assert not swapped_examples
        return
    assert sorted(map(bytes, before.numpy())) == sorted(map(bytes, after.numpy()))
    ends = torch.tensor(batch.meta.lengths_q).cumsum(0)
    example_index_N = torch.bucketize(
        batch.placeholder_index_M, ends, right=True
    ).repeat_interleave(4)
    for example_index, own_kinds in enumerate(kinds):
        patches_before = {bytes(row) for row in before[example_index_N == example_index].numpy()}
        patches_after = {bytes(row) for row in after[example_index_N == example_index].numpy()}
        if example_index in swapped_examples:
            assert own_kinds and not patches_before & patches_after
        else:
            assert (
                not own_kinds
                or any(  # one conversation has more than half of the items of a grid
                    2 * max(k.count(kind) for k in kinds) > sum(k.count(kind) for k in kinds)
                    for kind in own_kinds
                )
            )


def test_an_image_without_a_partner_stays_and_is_not_compared() -> None:
    batch = pack_examples([WIDE], [TALL], [WIDE], [])
    swapped, swapped_examples = swap_images(batch)
    assert swapped_examples == {0, 2}
    ends = torch.tensor(batch.meta.lengths_q).cumsum(0)
    example_index_N = torch.bucketize(
        batch.placeholder_index_M, ends, right=True
    ).repeat_interleave(4)
    assert torch.equal(
        batch.patches_NP[example_index_N == 1], swapped.patches_NP[example_index_N == 1]
    )


def test_images_are_exchanged_between_conversations_of_different_text_only() -> None:
    def example(text: str, answer: str, number: int) -> TrainingExample:
        image = np.random.default_rng(number).integers(0, 256, (56, 84, 3), np.uint8)
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return TrainingExample(tiny_processor()(messages, for_training=True), "family")

    equal = [example("?", "x", 0), example("?", "x", 1), example("?", "x", 2)]
    # The sum of the losses of equal texts is the same after any exchange of their images.
    assert not swap_images(pack_batch(equal, pad_id=0)).swapped_examples
    for others in ([example("!", "x", 3)], [example("?", "y", 4)]):
        assert not swap_images(pack_batch([*equal, *others], pad_id=0)).swapped_examples
        # Their images are exchanged with both of the equal ones, and never among these.
        batch = pack_batch([*equal[:2], *others, example("?", "z", 5)], pad_id=0)
        swapped = swap_images(batch)
        assert swapped.swapped_examples == {0, 1, 2, 3}
        before, after = (x.patches_NP.reshape(4, -1) for x in (batch, swapped.batch))
        texts = batch.input_ids_T.reshape(4, -1)
        for i, image in enumerate(after):
            (source,) = (j for j, own in enumerate(before) if torch.equal(own, image))
            assert not torch.equal(texts[i], texts[source])


def config(folder: Path, **fields: Any) -> TrainConfig:
    base = tiny.recipe()
    stage = replace(base.stages[0], default_system=0.0)
    return replace(base, output_dir=str(folder), stages=(stage,) * 2, dtype="float32", **fields)


def test_loss_and_vision_gain_are_means_over_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [pack_examples([WIDE], [TALL], [WIDE], []), pack_examples([VIDEO], [VIDEO, WIDE])]
    monkeypatch.setattr("qwen2vl.train.evaluate.held_out_batches", lambda *_: batches)
    metrics = Evaluator(config(tmp_path))(tiny_model(), tiny_processor(), 1)["held_out"]
    matched_losses = [losses(batch) for batch in batches]
    assert metrics["loss"] == pytest.approx(torch.cat(matched_losses).mean().item(), rel=1e-6)
    swapped = [losses(swap_images(batch).batch) for batch in batches]
    # In the second batch the first video gets the other's; the other's image has no partner.
    swapped_examples = [
        torch.isin(b.example_index_R, torch.tensor(example_indices))
        for b, example_indices in zip(batches, [[0, 2], [0]], strict=True)
    ]
    increases = [
        (w - r)[c] for w, r, c in zip(swapped, matched_losses, swapped_examples, strict=True)
    ]
    expected_gain = torch.cat(increases).mean().item()
    assert abs(expected_gain) > 1e-4  # the output of this model depends on the images
    assert metrics["vision_gain"] == pytest.approx(expected_gain, rel=1e-4)
    assert metrics["compared"] == 3
    assert set(metrics["families"]) == {"family0", "family1"}
    assert metrics["families"]["family0"]["vision_gain"] == pytest.approx(expected_gain, rel=1e-4)
    assert "vision_gain" not in metrics["families"]["family1"]


def test_a_model_that_ignores_images_has_no_vision_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen2vl.train.evaluate.held_out_batches", lambda *_: [pack_examples([WIDE], [WIDE])]
    )
    model = tiny_model()
    for parameter in model.visual.merger.mlp[2].parameters():
        torch.nn.init.zeros_(parameter)
    metrics = Evaluator(config(tmp_path))(model, tiny_processor(), 1)["held_out"]
    assert metrics["vision_gain"] == 0


def test_evaluation_does_not_change_the_model(tmp_path: Path) -> None:
    model = tiny_model().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator = Evaluator(config(tmp_path, evaluation=EvaluationConfig(num_examples=4)))
    first, repeated = (evaluator(model, tiny_processor(), step) for step in (1, 2))
    assert first == repeated
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_synthetic_held_out_samples_differ_from_those_of_training(tmp_path: Path) -> None:
    run_config = config(tmp_path, evaluation=EvaluationConfig(num_examples=20), num_workers=0)
    held_out = held_out_batches(run_config, 0, tiny_processor())
    assert [len(batch.families) for batch in held_out] == [16, 16]
    trained = {
        bytes(b.patches_NP.numpy()) for b in iterate_batches(run_config, tiny_processor(), 0)
    }
    assert not trained & {bytes(batch.patches_NP.numpy()) for batch in held_out}
    repeated = held_out_batches(run_config, 0, tiny_processor())
    assert all(
        torch.equal(a.patches_NP, b.patches_NP) for a, b in zip(held_out, repeated, strict=True)
    )


def test_each_stage_has_its_own_held_out_data(tmp_path: Path) -> None:
    run_config = config(tmp_path, evaluation=EvaluationConfig(num_examples=4))
    text_stage = replace(run_config.stages[1], mixture=Mixture(weights={"text_only": 1.0}))
    run_config = replace(run_config, stages=(run_config.stages[0], text_stage))
    evaluator, model = Evaluator(run_config), tiny_model()
    first = evaluator(model, tiny_processor(), run_config.stages[0].steps)["held_out"]
    second = evaluator(model, tiny_processor(), run_config.stages[0].steps + 1)["held_out"]
    assert set(first["families"]) == {"shapes"}
    assert set(second["families"]) == {"text_only"}
    assert not {"vision_gain", "compared"} & set(second)


def split_config(folder: Path, **fields: Any) -> TrainConfig:
    """Return a run of two sources, whose stage holds a fifth of each out."""
    write_media(folder)
    paths = [
        write_rows(folder / "media.jsonl", good_rows()[:20]),
        write_rows(folder / "text.jsonl", [conversation(f"q{i}", "x" * i) for i in range(1, 31)]),
    ]
    data = create_data_config(folder, *paths, validation_size=0.2)
    config = create_run_config(folder, data, steps=30)
    return replace(config, evaluation=EvaluationConfig(**{"num_examples": 256, **fields}))


def conversations(batches: Iterable[Batch]) -> list[tuple[int, ...]]:
    """Return the token ids of every conversation, without padding, and the bytes of its images."""
    found: list[tuple[int, ...]] = []
    for batch in batches:
        for ids_T in batch.input_ids_T.split(batch.meta.lengths_q):
            ids = ids_T.tolist()
            while ids[-1] == tiny_processor().config.bos_token_id:
                ids.pop()
            found.append(tuple(ids))
    return found


def test_a_validation_split_is_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    config = split_config(tmp_path)
    processor = tiny_processor()
    held_out = conversations(held_out_batches(config, 0, processor))
    assert len(held_out) == 10
    trained = conversations(iterate_batches(config, processor, 0))
    dataset = open_dataset(config, 0, processor)
    assert dataset.epochs(config.steps) > 3  # also not in a later epoch
    assert len(set(trained)) == 40
    assert not set(trained) & set(held_out)
    # The same after a resume, in another process, at another batch size of the packing.
    assert conversations(held_out_batches(config, 0, processor)) == held_out
    assert not set(conversations(iterate_batches(config, processor, 17))) & set(held_out)


def test_a_prefix_of_the_split_has_conversations_of_every_source(tmp_path: Path) -> None:
    batches = held_out_batches(split_config(tmp_path, num_examples=5), 0, tiny_processor())
    assert sorted(f for batch in batches for f in batch.families) == ["media"] * 2 + ["text"] * 3
    metrics = Evaluator(split_config(tmp_path))(tiny_model(), tiny_processor(), 1)["held_out"]
    assert set(metrics["families"]) == {"media", "text"}


def test_batches_of_a_split_are_no_larger_than_bins(tmp_path: Path) -> None:
    config = split_config(tmp_path)
    batches = held_out_batches(config, 0, tiny_processor())
    assert 1 < len(batches) < 10
    assert all(len(batch.input_ids_T) <= 512 for batch in batches)


def test_a_file_of_others_takes_the_place_of_a_split(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "others.jsonl", [conversation("other", "rows")])
    config = split_config(tmp_path, path=str(path))
    (batch,) = held_out_batches(config, 0, tiny_processor())
    assert batch.families == ("others",)
