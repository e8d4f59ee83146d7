"""Prompts -> vectors: one packed forward for many prompts, without cache and without answers.

Prompts are packed as they come, up to a budget of tokens; pictures go through the same shelf as
those of questions, so that a picture asked about before costs no vision work. Next room: pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from qwen2vl.engine.plan import Slices
from qwen2vl.engine.pool import Pooling, pool
from qwen2vl.engine.shelf import VisionShelf
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["embed"]


@torch.inference_mode()
def embed(
    model: Qwen2VL,
    shelf: VisionShelf,
    prompts: SequenceOf[ModelInput],
    *,
    pooling: Pooling,
    max_tokens: int,
    max_patches: int,
) -> Tensor:
    """Compute (S, D) float32 on the CPU, each of length one; budgets are of one forward."""
    vectors = [
        pool(_hidden(model, shelf, group, max_patches), [len(p.input_ids) for p in group], pooling)
        for group in _groups(prompts, max_tokens)
    ]
    return torch.cat(vectors).cpu()


def _groups(prompts: SequenceOf[ModelInput], max_tokens: int) -> Iterator[list[ModelInput]]:
    """Cut the prompts into groups of at most `max_tokens`; a longer one is alone."""
    group: list[ModelInput] = []
    total = 0
    for prompt in prompts:
        if group and total + len(prompt.input_ids) > max_tokens:
            yield group
            group, total = [], 0
        group.append(prompt)
        total += len(prompt.input_ids)
    if group:
        yield group


def _hidden(
    model: Qwen2VL, shelf: VisionShelf, prompts: SequenceOf[ModelInput], max_patches: int
) -> Tensor:
    items = [item for prompt in prompts for item in prompt.items]
    for item in items:
        shelf.hold(item)
    try:
        for item in items:
            _encode(shelf, item, max_patches)
        rows = [shelf.rows(item) for item in items]
    finally:
        for item in items:
            shelf.release(item)
    device = model.device
    lengths = [len(prompt.input_ids) for prompt in prompts]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    pads = [prompt.pad_index_M + start for prompt, start in zip(prompts, starts, strict=True)]
    return model(
        torch.tensor([token for prompt in prompts for token in prompt.input_ids], device=device),
        torch.cat([prompt.position_ids_3T for prompt in prompts], dim=1).to(device),
        AttnMeta.build(lengths).to(device),
        vision_MD=torch.cat(rows) if rows else None,
        pad_index_M=torch.cat(pads).to(device) if rows else None,
    )


def _encode(shelf: VisionShelf, item: Item, max_patches: int) -> None:
    """Make an item's rows whole, a few frame pairs at a time."""
    each = max(1, max_patches // (item.grid.h * item.grid.w))
    while (ready := shelf.ready(item)) < item.grid.t:
        shelf.encode([Slices(item, ready, min(ready + each, item.grid.t))])
