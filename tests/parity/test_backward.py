"""Backward parity in fp32: the loss and the gradient of every single parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests import prompts
from tests.parity.reference import (
    compute_reference_logits,
    pack_prompts,
    random_model,
    reference_name,
    relative_error,
    to_reference,
)
from tests.prompts import Part, image, video
from tests.tiny import tiny_config

TOLERANCE = 1e-5

# Each case is one packed forward; the reference computes one sequence at a time.
CASES: dict[str, list[list[Part]]] = {
    "text": [[19]],
    "image": [[3, image(4, 6), 9]],
    "video": [[2, video(3, 4, 4), 9]],
    "images and video": [[1, image(6, 4), 3, video(2, 4, 4), image(4, 4), 2, image(2, 8), 6]],
    "packed": [[7], [2, image(4, 4), 5], [1, video(5, 2, 4), 1, image(2, 6), 8], [11]],
}


def targets(ids: list[int], placeholder_ids: tuple[int, int]) -> Tensor:
    """Return next-token targets of one sequence; -100 for placeholders and the last token."""
    following = torch.tensor([*ids[1:], -100])
    return following.where(~torch.isin(following, torch.tensor(placeholder_ids)), -100)


def summed_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(case: str, tied: bool) -> None:
    config = tiny_config()
    config = replace(config, text=replace(config.text, tie_word_embeddings=tied))
    model = random_model(config)
    reference = to_reference(model)
    packed_prompts = [prompts.prompt(parts, config, seed) for seed, parts in enumerate(CASES[case])]
    patches = [prompts.patches(prompt, config, seed) for seed, prompt in enumerate(packed_prompts)]
    labels = [targets(prompt.ids, config.placeholder_ids) for prompt in packed_prompts]
    num_valid = sum(int((label >= 0).sum()) for label in labels)

    logits_TV = model.logits(model(**pack_prompts(packed_prompts, patches, config)))
    loss = summed_loss(logits_TV, torch.cat(labels)) / num_valid
    loss.backward()

    expected_loss = torch.zeros(())
    for prompt, patches_NP, label in zip(packed_prompts, patches, labels, strict=True):
        reference_logits_TV = compute_reference_logits(reference, prompt, patches_NP, config)
        expected_loss = expected_loss + summed_loss(reference_logits_TV, label) / num_valid
    expected_loss.backward()

    assert relative_error(loss.detach(), expected_loss.detach()) < TOLERANCE
    expected_parameters = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected_parameters.pop(reference_name(name)).grad
        if gradient is None:  # the vision tower, in a text-only prompt
            assert parameter.grad is None and name.startswith("visual.") and case == "text"
            continue
        assert parameter.grad is not None
        error = relative_error(parameter.grad, gradient)
        assert error < TOLERANCE, f"{name}: {error:.1e}"
    assert not expected_parameters, "parameters of the reference that are missing here"
