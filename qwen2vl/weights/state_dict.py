"""Do these tensors belong to this model? All answers at once, before anything is read.

The model itself, built on the meta device, says which tensors it wants; nothing is listed twice.
Differences that carry no information pass: a flat patch embedding, a second copy of a tied head,
biases of zeros that GPTQ's tools give to layers without one.
Next room: save.py.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.weights.tensors import TensorFolder, shorten

__all__ = ["EMBEDDING", "HEAD", "PATCH_EMBED", "check_fit", "expected_shapes", "nonfinite_tensors"]

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
PATCH_EMBED = "visual.patch_embed.proj.weight"


def expected_shapes(config: Qwen2VLConfig) -> dict[str, tuple[int, ...]]:
    """Name every parameter of the model that `config` describes, with its shape."""
    with torch.device("meta"):
        model = Qwen2VL(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_fit(tensors: TensorFolder, config: Qwen2VLConfig) -> None:
    """Refuse a folder whose tensors are not exactly the model's.

    Raises:
        CheckpointError: every missing, extra and misshapen tensor, in one message.
    """
    expected = expected_shapes(config)
    extra = sorted(set(tensors) - set(expected))
    extra = [name for name in extra if not _is_empty_bias(tensors, name)]
    if config.text.tie_word_embeddings and HEAD in extra:
        if EMBEDDING in tensors:  # else it is named as missing, with everything else
            _check_tied_copy(tensors)
        extra.remove(HEAD)
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
            + _hint(HEAD not in tensors and HEAD in expected)
        )


def nonfinite_tensors(tensors: TensorFolder) -> list[str]:
    """Read every tensor and name those that hold a NaN or an infinity."""
    return [name for name in tensors if not _is_finite(tensors[name])]


def _is_finite(tensor: Tensor) -> bool:
    # One reduction in place of a mask as large as the tensor; wide enough not to overflow.
    low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.sum(), tensor.sum())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _is_shape(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Equal, or the patch embedding as a matrix (E, P) in place of a Conv3d kernel."""
    if name == PATCH_EMBED and len(got) == 2:
        return got == (want[0], want[1] * want[2] * want[3] * want[4])
    return got == want


def _is_empty_bias(tensors: TensorFolder, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == "bias" and layer in tensors.packed and not tensors[name].any()


def _check_tied_copy(tensors: TensorFolder) -> None:
    """A tied model that also stores a head must store the embedding in it."""
    if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise CheckpointError(
            f"{tensors.folder}: config.json ties the head to the embedding, but {HEAD} is stored "
            "and differs from it; set tie_word_embeddings to false in config.json, or remove it"
        )
    logger.debug("%s: %s repeats the tied embedding and is not read", tensors.folder, HEAD)


def _hint(head_is_missing: bool) -> str:
    if not head_is_missing:
        return ""
    return f" (a model without {HEAD} has tie_word_embeddings true in config.json, as the 2B)"
