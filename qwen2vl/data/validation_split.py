"""Validation split: conversations of a training file that are held out, chosen by their content.

    samples of a source -> digest of each -> the `validation_size` smallest digests are held out

Digests leave out where a sample stands and its own id, so that all copies of a conversation are on
one side, in whichever sources of the stage they are, and rows may be added or moved without moving
others to the other side. Stages that read the same sources hold the same conversations out. Neither
seed nor step has an influence.
Synthetic sources take no part: their validation samples have another seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from qwen2vl.data.formats import Conversation, Document, Sample, SampleError
from qwen2vl.data.sources.source import SampleSource
from qwen2vl.data.sources.synthetic import SyntheticSource
from qwen2vl.errors import ConfigError

__all__ = ["held_out_samples", "interleave", "sample_digest"]

MAX_SHARE = 0.5  # of a source's usable samples


def held_out_samples(
    sources: Sequence[SampleSource],
    labels: Sequence[str],
    usable: Sequence[np.ndarray],
    validation_size: float,
) -> list[np.ndarray]:
    """Choose the held-out samples of each source, in an order that depends on their content only.

    Args:
        sources: of a stage.
        labels: their names, for errors.
        usable: (number of samples,) bool for each source; bad samples are not held out.
        validation_size: of each source: a share below 1, which is rounded to one sample at least,
            or a number of samples. Copies of a held-out sample are added, of all sources.

    Returns:
        The indices of the held-out samples, for each source.

    Raises:
        ConfigError: no more than half of the samples of a source may be held out.
    """
    indices = [
        np.empty(0, np.int64) if isinstance(source, SyntheticSource) else np.flatnonzero(is_usable)
        for source, is_usable in zip(sources, usable, strict=True)
    ]
    digests = [
        # In the order of the file, since a source reads neighbors faster.
        np.array([_read_digest(source, index) for index in own.tolist()], "S16")
        for source, own in zip(sources, indices, strict=True)
    ]
    chosen = np.concatenate(
        [
            _smallest_digests(own, label, validation_size)
            for source, label, own in zip(sources, labels, digests, strict=True)
            if not isinstance(source, SyntheticSource)
        ]
        or [np.empty(0, "S16")]
    )
    held_out: list[np.ndarray] = []
    for label, own_indices, own in zip(labels, indices, digests, strict=True):
        order = np.argsort(own, kind="stable")
        order = order[np.isin(own[order], chosen)]
        _check_rest(len(order), len(own), label, validation_size)
        held_out.append(own_indices[order])
    return held_out


def _smallest_digests(digests: np.ndarray, label: str, validation_size: float) -> np.ndarray:
    """Return the digests to hold out of one source, by its own size."""
    limit = int(MAX_SHARE * len(digests))
    size = validation_size if validation_size >= 1 else round(validation_size * len(digests))
    if max(1, size) > limit:
        raise ConfigError(
            f"validation={validation_size:g}: {label} has {len(digests):,} usable conversations, "
            f"of which at most {limit:,} may be held out; give fewer, or validation=FILE with "
            "others"
        )
    return np.sort(digests)[: max(1, int(size))]


def _check_rest(num_held_out: int, num_usable: int, label: str, validation_size: float) -> None:
    """Check that copies of held-out conversations leave enough of a source to train on."""
    limit = int(MAX_SHARE * num_usable)
    if num_held_out > limit:
        raise ConfigError(
            f"validation={validation_size:g}: with their copies {num_held_out:,} of the "
            f"{num_usable:,} usable conversations of {label} would be held out, at most "
            f"{limit:,} may be; remove the copies, or give validation=FILE with others"
        )


def _read_digest(source: SampleSource, index: int) -> bytes:
    try:
        return sample_digest(source.read(index, pixels=False))
    except SampleError:  # readable when it was measured, and bad since: reported when it is used
        return b"\xff" * 16


def interleave(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Merge lists so that every prefix of the result has about the same share of each of them."""
    positions = [(np.arange(len(group)) + 0.5) / max(1, len(group)) for group in groups]
    order = np.argsort(np.concatenate(positions), kind="stable")
    return np.concatenate(groups)[order]


def sample_digest(sample: Sample) -> bytes:
    """Return a digest of what a sample teaches, without its id; equal ones have equal content."""
    if isinstance(sample, Conversation):
        # Without such messages, the digest is that of versions that had none.
        context = [sample.unsupervised] if sample.unsupervised else []
        content: Any = [sample.messages, sample.tools, *context]
    elif isinstance(sample, Document):
        prompt = [sample.num_prompt_parts] if sample.num_prompt_parts else []
        content = [*sample.parts, *prompt]
    else:
        content = sample.ids.tolist()
    text = json.dumps(content, sort_keys=True, default=_digest_media)
    return blake2b(text.encode(), digest_size=16).digest()


def _digest_media(value: Any) -> str:
    """Digest embedded media, which JSON has no type for."""
    if isinstance(value, np.ndarray):  # whose repr leaves most of the pixels out
        data = f"{value.dtype} {value.shape}".encode() + value.tobytes()
    else:
        data = value if isinstance(value, bytes | bytearray) else repr(value).encode()
    return blake2b(data, digest_size=16).hexdigest()
