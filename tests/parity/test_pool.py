"""Embeddings equal pooled last hidden states of transformers, padded and masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.engine.embed import pool
from qwen2vl.geometry import mrope_positions
from tests import prompts
from tests.parity.reference import (
    pack_prompts,
    random_model,
    relative_error,
    split_by_kind,
    to_reference,
)
from tests.prompts import Part, Prompt, image, video
from tests.tiny import tiny_config

CASES: list[list[Part]] = [[23], [3, image(4, 6), 4], [2, video(3, 4, 6), 5], [1, image(4, 4), 9]]


def reference_states(reference: Any, prompt: Prompt, patches_NP: Tensor, config: Any) -> Tensor:
    """Compute hidden_TD after the final norm of one sequence with the reference."""
    position_ids_3T, _ = mrope_positions(prompt.ids, prompt.grids, config)
    return reference.model(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        position_ids=position_ids_3T[:, None],
        **split_by_kind(patches_NP, prompt),
    ).last_hidden_state[0]


@torch.inference_mode()
def test_pooled_states_equal_transformers() -> None:
    config = tiny_config()
    model = random_model(config)
    reference = to_reference(model)
    packed_prompts = [prompts.prompt(parts, config, seed) for seed, parts in enumerate(CASES)]
    patches = [prompts.patches(prompt, config, seed) for seed, prompt in enumerate(packed_prompts)]
    hidden_TD = model(**pack_prompts(packed_prompts, patches, config))
    lengths = [len(prompt.ids) for prompt in packed_prompts]

    # As usual with transformers: a padded batch and an attention mask.
    states = [
        reference_states(reference, prompt, patches_NP, config)
        for prompt, patches_NP in zip(packed_prompts, patches, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=7.0)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    last = padded[torch.arange(len(states)), mask.sum(1) - 1]
    mean = (padded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    assert relative_error(pool(hidden_TD, lengths, "last"), F.normalize(last)) < 1e-5
    assert relative_error(pool(hidden_TD, lengths, "mean"), F.normalize(mean)) < 1e-5
    assert pool(hidden_TD, lengths, "last") @ pool(hidden_TD, lengths, "last").T == pytest.approx(
        F.normalize(last) @ F.normalize(last).T, abs=1e-5
    )
