"""Backward parity in fp32: the loss and the gradient of every single parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import prompts
from tests.parity.oracle import (
    ask_reference,
    packed,
    random_model,
    reference_name,
    relative_error,
    twin,
)
from tests.prompts import Part, image, video
from tests.tiny import tiny_config

TOLERANCE = 1e-5

# Each case is what lies in one packed call of ours; the reference takes one sequence at a time.
CASES: dict[str, list[list[Part]]] = {
    "text": [[19]],
    "image": [[3, image(4, 6), 9]],
    "video": [[2, video(3, 4, 4), 9]],
    "images and video": [[1, image(6, 4), 3, video(2, 4, 4), image(4, 4), 2, image(2, 8), 6]],
    "packed": [[7], [2, image(4, 4), 5], [1, video(5, 2, 4), 1, image(2, 6), 8], [11]],
}


def targets(ids: list[int], pads: tuple[int, int]) -> Tensor:
    """Next-token targets of one sequence; pads and the last token have none."""
    following = torch.tensor([*ids[1:], -100])
    return following.where(~torch.isin(following, torch.tensor(pads)), -100)


def summed_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(name: str, tied: bool) -> None:
    config = tiny_config()
    config = replace(config, text=replace(config.text, tie_word_embeddings=tied))
    model = random_model(config)
    reference = twin(model)
    drawn = [prompts.prompt(parts, config, seed) for seed, parts in enumerate(CASES[name])]
    patches = [prompts.patches(prompt, config, seed) for seed, prompt in enumerate(drawn)]
    labels = [targets(prompt.ids, config.pad_ids) for prompt in drawn]
    num_valid = sum(int((label >= 0).sum()) for label in labels)

    logits_TV = model.logits(model(**packed(drawn, patches, config)))
    loss = summed_loss(logits_TV, torch.cat(labels)) / num_valid
    loss.backward()

    want = torch.zeros(())
    for prompt, patches_NP, label in zip(drawn, patches, labels, strict=True):
        reference_logits_TV = ask_reference(reference, prompt, patches_NP, config)
        want = want + summed_loss(reference_logits_TV, label) / num_valid
    want.backward()

    assert relative_error(loss.detach(), want.detach()) < TOLERANCE
    expected = dict(reference.named_parameters())
    for own_name, parameter in model.named_parameters():
        gradient = expected.pop(reference_name(own_name)).grad
        if gradient is None:  # the tower, in a prompt of text alone
            assert parameter.grad is None and own_name.startswith("visual.") and name == "text"
            continue
        assert parameter.grad is not None
        error = relative_error(parameter.grad, gradient)
        assert error < TOLERANCE, f"{own_name}: {error:.1e}"
    assert not expected, "parameters of the reference that we lack"
