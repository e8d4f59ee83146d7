"""State dict checks: do a folder's tensor names and shapes match the model?

The expected names and shapes are those of the model built on the meta device; all mismatches are
reported in one error, before any tensor is read. Differences without information are accepted: a
flat patch embedding, a copy of a tied head, biases of zeros that GPTQ tools add.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.model import meta_model
from qwen2vl.weights.tensors import TensorFolder, shorten

__all__ = [
    "EMBED_TOKENS_WEIGHT",
    "LM_HEAD_WEIGHT",
    "PATCH_EMBED_WEIGHT",
    "check_state_dict",
    "expected_shapes",
    "nonfinite_tensors",
]

logger = logging.getLogger(__name__)

LM_HEAD_WEIGHT = "lm_head.weight"
EMBED_TOKENS_WEIGHT = "model.embed_tokens.weight"
PATCH_EMBED_WEIGHT = "visual.patch_embed.proj.weight"


def expected_shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of the model that `config` describes."""
    model = meta_model(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_state_dict(tensors: TensorFolder, config: Qwen2VLConfig) -> None:
    """Check that a folder's tensors are exactly the model's.

    Raises:
        CheckpointError: names every missing, unexpected and misshapen tensor in one message.
    """
    expected = expected_shapes(config)
    extra = sorted(set(tensors) - set(expected))
    extra = [name for name in extra if not _is_empty_bias(tensors, name)]
    if config.text.tie_word_embeddings and LM_HEAD_WEIGHT in extra:
        if EMBED_TOKENS_WEIGHT in tensors:  # else it is reported as missing
            _check_tied_copy(tensors)
        extra.remove(LM_HEAD_WEIGHT)
    misshapen = [
        f"{name} is {list(tensors.info(name).shape)}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and not _is_shape(name, tensors.info(name).shape, shape)
    ]
    problems = [
        f"{len(names)} {what}: {shorten(names)}"
        for what, names in (
            ("missing", [name for name in expected if name not in tensors]),
            ("not of this model", extra),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{tensors.folder}: the tensors do not fit config.json: {'; '.join(problems)}"
            + _hint(LM_HEAD_WEIGHT not in tensors and LM_HEAD_WEIGHT in expected)
        )


def nonfinite_tensors(tensors: TensorFolder) -> list[str]:
    """Read every tensor and return the names of those with a NaN or an infinity."""
    names: list[str] = []
    for name in tensors:
        if not _is_finite(tensors[name]):
            names.append(name)
        tensors.release([name])
    return names


def _is_finite(tensor: Tensor) -> bool:
    # A reduction, not a mask as large as the tensor; minimum and maximum cannot overflow.
    low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.sum(), tensor.sum())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _is_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether shapes are equal; a patch embedding may be a matrix (E, P), not a Conv3d."""
    if name == PATCH_EMBED_WEIGHT and len(shape) == 2:
        return shape == (expected[0], expected[1] * expected[2] * expected[3] * expected[4])
    return shape == expected


def _is_empty_bias(tensors: TensorFolder, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == "bias" and layer in tensors.packed_layers and not tensors[name].any()


def _check_tied_copy(tensors: TensorFolder) -> None:
    """Check that the stored head of a tied model equals the embedding."""
    is_equal = torch.equal(tensors[LM_HEAD_WEIGHT], tensors[EMBED_TOKENS_WEIGHT])
    tensors.release([LM_HEAD_WEIGHT, EMBED_TOKENS_WEIGHT])
    if not is_equal:
        raise CheckpointError(
            f"{tensors.folder}: config.json ties the head to the embedding, but {LM_HEAD_WEIGHT} "
            "is stored and differs from it; set tie_word_embeddings to false in config.json, or "
            "remove it"
        )
    logger.debug(
        "%s: %s repeats the tied embedding and is not read", tensors.folder, LM_HEAD_WEIGHT
    )


def _hint(head_is_missing: bool) -> str:
    if not head_is_missing:
        return ""
    return (
        f" (a model without {LM_HEAD_WEIGHT} has tie_word_embeddings true in config.json, "
        "as the 2B)"
    )
