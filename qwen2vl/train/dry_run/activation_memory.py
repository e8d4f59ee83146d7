"""A forward and backward on shapes alone: how many bytes are alive, and when.

One block of each kind runs on tensors without numbers, with the code and the precision of a real
step, while what operators allocate is counted until it is freed. So freezing, adapters and what is
computed twice need no formulas. A stack is then walked through by arithmetic. It must not know
ranks or optimizers. Next room: memory.py, which adds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model import Qwen2VL, rope, vision
from qwen2vl.quantization import nf4
from qwen2vl.train.loader.batch import NULL, Batch
from qwen2vl.train.loss import token_loss

__all__ = ["Alive", "Shape", "Timeline", "rehearse"]


class Shape(NamedTuple):
    """A batch, as far as memory sees it."""

    lengths: tuple[int, ...]  # tokens of each conversation, rounded up
    frames: tuple[int, ...]  # patches of each pair of frames; none where there is no picture
    targets: int

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        """Read the sizes of a batch."""
        frames = batch.vision_meta.frames.lengths_q if len(batch.pad_index_M) else ()
        return cls(batch.meta.lengths_q, frames, len(batch.targets_R))


class Block(NamedTuple):
    """Bytes of one block."""

    inside: int  # alive after its forward, while autocast still holds its short weights
    kept: int  # alive until its backward
    work: int  # in its backward at most, beside what is kept
    gradients: int  # that its backward leaves
    is_live: bool  # whether its output carries a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bytes of a step, part by part, weights and moments apart."""

    visual: Sequence[Block]
    text: Sequence[Block]
    rest: int  # kept outside of blocks: pixels, embeddings, the last norm, the merger
    casts: int  # short weights outside of blocks, which autocast holds until the loss is there
    logits: int  # while the loss is computed, beside what is kept
    head: int  # the head's gradient, which is there from the loss on
    embedding: int  # the embedding's own gradient, before it is added to a tied head's

    @property
    def kept(self) -> int:
        """What the forward leaves for the backward."""
        return self.rest + sum(block.kept for block in (*self.visual, *self.text))

    def peak(self, *, parts: int = 1, before: int = 0) -> int:
        """Walk from the loss back to the pixels, and find the moment with the most bytes.

        Args:
            parts: of each block's gradient one of so many stays on this rank.
            before: bytes of gradients that an earlier batch of the same step has left.
        """
        blocks = (*self.visual, *self.text)
        casts = self.casts + sum(block.inside - block.kept for block in blocks)
        kept, gradients = self.kept, before + self.head
        top = kept + before + casts + self.logits
        for tower, after in ((self.text, self.embedding), (self.visual, 0)):
            for block in reversed(tower):
                top = max(top, kept + gradients + block.work)
                kept -= block.kept
                gradients += 0 if before else block.gradients // parts
            top = max(top, kept + gradients + after)
        return top


class Alive(TorchDispatchMode):
    """Counts the bytes that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it gave."""
        found = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(found):
            if storage._cdata not in given:  # a view of what was there before is nothing new
                self._note(storage)
        return found

    def forget_peak(self) -> None:
        """Measure the peak from now on."""
        self.peak = self.now

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def rehearse(model: Qwen2VL, shape: Shape, *, device: torch.device, casts: bool) -> Timeline:
    """Run the parts of `model` forward and backward on a batch of sizes `shape`.

    Args:
        model: on the meta device; it is used up. Its parameters say by requires_grad who learns.
        shape: of the batch.
        device: whose kernels are meant; nothing is allocated on it.
        casts: whether products are in bfloat16 beside float32 weights, by autocast.
    """
    visual, text = list(model.visual.blocks), list(model.model.layers)
    model.visual.blocks, model.model.layers = nn.ModuleList(visual[:1]), nn.ModuleList(text[:1])
    with _without_numbers(), torch.device(device):
        model.to_empty(device=device)
        batch = _batch(shape, model.config.vision.patch_dim)
        called: dict[nn.Module, tuple[Any, ...]] = {}
        for block in (visual[0], text[0]):
            block.register_forward_pre_hook(lambda block, given: called.update({block: given}))
        whole = _whole(model, batch, casts)
        stacks = [_stack(blocks, called[blocks[0]], casts) for blocks in (visual, text)]
    embedding = model.model.embed_tokens.weight
    first = [stack[0] for stack in stacks]
    return Timeline(
        visual=stacks[0],
        text=stacks[1],
        rest=whole.kept - sum(block.kept for block in first),
        casts=whole.inside - whole.kept - sum(block.inside - block.kept for block in first),
        logits=whole.work,
        head=whole.gradients,
        embedding=embedding.nbytes if embedding.requires_grad else 0,
    )


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, Tensor)]


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Let tensors be shapes only.

    Tables that are drawn once for each device are forgotten before and after: those with numbers
    cannot be mixed with shapes, and shapes must not be found by a real step.
    """
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _forget_tables()


def _forget_tables() -> None:
    for table in (
        *(rope._frequencies, vision._channel_constants),
        *(nf4._levels, nf4._pairs, nf4._dynamic_levels),
    ):
        table.cache_clear()


def _batch(shape: Shape, patch_dim: int) -> Batch:
    """Make a batch of sizes alone; without pictures it has the null item."""
    frames = shape.frames or (NULL.h * NULL.w,)
    num_tokens, num_patches = sum(shape.lengths), sum(frames)
    num_pads = num_patches // 4 if shape.frames else 0

    def index(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    return Batch(
        input_ids_T=index(num_tokens),
        position_ids_3T=index(3, num_tokens),
        meta=AttnMeta.build(shape.lengths),
        patches_NP=torch.empty(num_patches, patch_dim, dtype=torch.uint8),
        vision_meta=VisionMeta(index(num_patches, 2), AttnMeta.build(frames)),
        pad_index_M=index(num_pads),
        target_index_R=index(shape.targets),
        targets_R=index(shape.targets),
        weights_R=torch.empty(shape.targets),
        owner_R=index(shape.targets),
        families=(),
    )


def _whole(model: Qwen2VL, batch: Batch, casts: bool) -> Block:
    """Run a model of one block a tower up to its loss; `work` is what the loss takes."""
    head = model.head_weight
    with Alive() as alive:
        with torch.autocast(head.device.type, torch.bfloat16, enabled=casts):
            hidden_TD = batch.run(model)
            inside = alive.now
            alive.forget_peak()
            outcome = token_loss(hidden_TD, head, batch, 1.0)
            work = alive.peak - inside
            left = alive.now - inside
        kept = alive.now - left
    gradient = head.nbytes if head.requires_grad else 0
    return Block(inside, kept, work, gradient, outcome.loss.requires_grad)


def _stack(blocks: Sequence[nn.Module], given: tuple[Any, ...], casts: bool) -> list[Block]:
    """Measure a tower's blocks, each kind once."""
    found: dict[Any, Block] = {}
    stack: list[Block] = []
    is_live = given[0].requires_grad
    for block in blocks:
        key = (is_live, "forward" in vars(block), *_kind(block))
        if key not in found:
            found[key] = _one(block, given, is_live, casts)
        stack.append(found[key])
        is_live = stack[-1].is_live
    return stack


def _kind(block: nn.Module) -> list[Any]:
    return [(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]


def _one(block: nn.Module, given: tuple[Any, ...], is_live: bool, casts: bool) -> Block:
    """Run one block forward and backward."""
    hidden, *others = given
    if any(p.device.type == "meta" for p in block.parameters()):
        block.to_empty(device=hidden.device)
    leaf = torch.empty_like(hidden).requires_grad_(is_live)
    with Alive() as alive:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=casts):
            stream = leaf * 1  # as another block's output: kept only if this one needs it
            result = block(stream, *others)
            del stream
            inside = alive.now - result.nbytes
        kept = alive.now - result.nbytes
        work = 0
        if result.requires_grad:
            alive.forget_peak()
            result.backward(torch.empty_like(result))
            work = alive.peak - kept - result.nbytes
    gradients = sum(p.grad.nbytes for p in block.parameters() if p.grad is not None)
    return Block(inside, kept, work, gradients, result.requires_grad)
