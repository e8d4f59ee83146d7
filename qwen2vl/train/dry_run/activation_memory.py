"""Activation-memory estimator: the bytes of a forward and backward, over time, from shapes alone.

One block of each kind runs on fake tensors, with the code and the precision of a real step, while a
TorchDispatchMode counts what operators allocate until it is freed. So freezing, adapters and
activation checkpointing need no formulas. The timeline of all blocks is then computed from these
measurements. (Compare torch.distributed._tools.mem_tracker.) `memory.py` adds weights, gradients
and optimizer states per rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model import Qwen2VL, rope, vision
from qwen2vl.quantization import nf4
from qwen2vl.train.loader.batch import DUMMY_IMAGE_GRID, Batch
from qwen2vl.train.loss import token_loss

__all__ = ["BatchShape", "MemoryTimeline", "MemoryTracker", "estimate_activation_memory"]


class BatchShape(NamedTuple):
    """The sizes of a batch that determine its memory."""

    lengths: tuple[int, ...]  # tokens of each conversation, with padding
    frames: tuple[int, ...]  # patches of each frame pair; empty without images and videos
    num_targets: int

    @classmethod
    def from_batch(cls, batch: Batch) -> BatchShape:
        """Read the sizes of a batch."""
        frames = batch.vision_meta.attn_meta.lengths_q if len(batch.placeholder_index_M) else ()
        return cls(batch.meta.lengths_q, frames, len(batch.targets_R))


class BlockMemory(NamedTuple):
    """Measured bytes of one block."""

    after_forward: int  # with the bfloat16 weights that autocast caches
    saved: int  # activations saved for its backward
    working: int  # peak of its backward, besides what is saved
    gradients: int  # of its parameters
    output_has_grad: bool  # whether its output requires a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTimeline:
    """Bytes of a step by part, without weights and optimizer states."""

    visual: Sequence[BlockMemory]
    text: Sequence[BlockMemory]
    saved_outside_blocks: int  # pixels, embeddings, last norm, merger
    autocast_weights: int  # bfloat16 weights outside of blocks, cached until the loss
    loss_working: int  # peak of the loss, besides what is saved
    lm_head_gradient: int  # exists from the loss on
    embedding_gradient: int  # exists apart until it is added to a tied head's

    @property
    def saved(self) -> int:
        """Activations saved by the forward for the backward."""
        return self.saved_outside_blocks + sum(block.saved for block in (*self.visual, *self.text))

    def peak(self, *, num_shards: int = 1, existing_gradients: int = 0) -> int:
        """Return the peak bytes of the backward, from the loss to the pixels.

        Args:
            num_shards: ranks over which each block's gradients are sharded.
            existing_gradients: bytes of gradients accumulated by earlier batches of the step.
        """
        blocks = (*self.visual, *self.text)
        autocast_weights = self.autocast_weights + sum(
            block.after_forward - block.saved for block in blocks
        )
        saved, gradients = self.saved, existing_gradients + self.lm_head_gradient
        peak = saved + existing_gradients + autocast_weights + self.loss_working
        for tower, after in ((self.text, self.embedding_gradient), (self.visual, 0)):
            for block in reversed(tower):
                peak = max(peak, saved + gradients + block.working)
                saved -= block.saved
                gradients += 0 if existing_gradients else block.gradients // num_shards
            peak = max(peak, saved + gradients + after)
        return peak


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes allocated by operators, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.peak = 0
        self._tracked: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and track the storages that it allocates."""
        outputs = func(*args, **(kwargs or {}))
        input_storages = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if storage._cdata not in input_storages:  # views allocate nothing
                self._track(storage)
        return outputs

    def reset_peak(self) -> None:
        """Reset the peak to the current bytes."""
        self.peak = self.allocated

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._tracked:
            self._tracked.add(key)
            self.allocated += storage.nbytes()
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._untrack, key, storage.nbytes())

    def _untrack(self, key: int, num_bytes: int) -> None:
        self._tracked.discard(key)
        self.allocated -= num_bytes


def estimate_activation_memory(
    model: Qwen2VL, shape: BatchShape, *, device: torch.device, use_autocast: bool
) -> MemoryTimeline:
    """Measure the parts of `model` in a forward and backward on a batch of sizes `shape`.

    Args:
        model: on the meta device, with requires_grad set as in training; it is modified.
        shape: of the batch.
        device: whose kernels are dispatched to; nothing is allocated on it.
        use_autocast: whether matmuls run in bfloat16 under autocast, with float32 weights.
    """
    visual, text = list(model.visual.blocks), list(model.model.layers)
    model.visual.blocks, model.model.layers = nn.ModuleList(visual[:1]), nn.ModuleList(text[:1])
    with _fake_tensors(), torch.device(device):
        model.to_empty(device=device)
        batch = _fake_batch(shape, model.config.vision.patch_dim)
        block_inputs: dict[nn.Module, tuple[Any, ...]] = {}
        for block in (visual[0], text[0]):
            block.register_forward_pre_hook(
                lambda block, inputs: block_inputs.update({block: inputs})
            )
        model_memory = _measure_model(model, batch, use_autocast)
        towers = [
            _measure_tower(blocks, block_inputs[blocks[0]], use_autocast)
            for blocks in (visual, text)
        ]
    embedding_weight = model.model.embed_tokens.weight
    first_blocks = [tower[0] for tower in towers]
    return MemoryTimeline(
        visual=towers[0],
        text=towers[1],
        saved_outside_blocks=model_memory.saved - sum(block.saved for block in first_blocks),
        autocast_weights=model_memory.after_forward
        - model_memory.saved
        - sum(block.after_forward - block.saved for block in first_blocks),
        loss_working=model_memory.working,
        lm_head_gradient=model_memory.gradients,
        embedding_gradient=embedding_weight.nbytes if embedding_weight.requires_grad else 0,
    )


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, Tensor)]


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Create fake tensors inside the block.

    Tables cached per device are cleared before and after: real ones cannot be mixed with fake
    tensors, and fake ones must not be used by a real step.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # private: only where it is needed

    _clear_table_caches()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _clear_table_caches()


def _clear_table_caches() -> None:
    for table in (
        *(rope._inv_freq, vision._channel_constants),
        *(nf4._levels, nf4._pairs, nf4._dynamic_levels),
    ):
        table.cache_clear()


def _fake_batch(shape: BatchShape, patch_dim: int) -> Batch:
    """Build a batch of the given sizes; without images it has the dummy image of training."""
    frames = shape.frames or (DUMMY_IMAGE_GRID.h * DUMMY_IMAGE_GRID.w,)
    num_tokens, num_patches = sum(shape.lengths), sum(frames)
    num_placeholders = num_patches // 4 if shape.frames else 0

    def index(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    return Batch(
        input_ids_T=index(num_tokens),
        position_ids_3T=index(3, num_tokens),
        meta=AttnMeta.build(shape.lengths),
        patches_NP=torch.empty(num_patches, patch_dim, dtype=torch.uint8),
        vision_meta=VisionMeta(index(num_patches, 2), AttnMeta.build(frames)),
        placeholder_index_M=index(num_placeholders),
        target_index_R=index(shape.num_targets),
        targets_R=index(shape.num_targets),
        weights_R=torch.empty(shape.num_targets),
        example_index_R=index(shape.num_targets),
        families=(),
    )


def _measure_model(model: Qwen2VL, batch: Batch, use_autocast: bool) -> BlockMemory:
    """Run a model of one block per tower up to its loss; `working` is the peak of the loss."""
    lm_head_weight = model.lm_head_weight
    with MemoryTracker() as tracker:
        with torch.autocast(lm_head_weight.device.type, torch.bfloat16, enabled=use_autocast):
            hidden_TD = batch.forward(model)
            after_forward = tracker.allocated
            tracker.reset_peak()
            output = token_loss(hidden_TD, lm_head_weight, batch, 1.0)
            working = tracker.peak - after_forward
            loss_outputs = tracker.allocated - after_forward
        saved = tracker.allocated - loss_outputs
    weight_gradient = lm_head_weight.nbytes if lm_head_weight.requires_grad else 0
    return BlockMemory(after_forward, saved, working, weight_gradient, output.loss.requires_grad)


def _measure_tower(
    blocks: Sequence[nn.Module], inputs: tuple[Any, ...], use_autocast: bool
) -> list[BlockMemory]:
    """Return the memory of each block of a tower; each kind is measured once."""
    memory_by_signature: dict[Any, BlockMemory] = {}
    tower: list[BlockMemory] = []
    input_has_grad = inputs[0].requires_grad
    for block in blocks:
        key = (input_has_grad, "forward" in vars(block), *_block_signature(block))
        if key not in memory_by_signature:
            memory_by_signature[key] = _measure_block(block, inputs, input_has_grad, use_autocast)
        tower.append(memory_by_signature[key])
        input_has_grad = tower[-1].output_has_grad
    return tower


def _block_signature(block: nn.Module) -> list[Any]:
    return [(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]


def _measure_block(
    block: nn.Module, inputs: tuple[Any, ...], input_has_grad: bool, use_autocast: bool
) -> BlockMemory:
    """Measure one block in forward and backward."""
    hidden, *other_inputs = inputs
    if any(p.device.type == "meta" for p in block.parameters()):
        block.to_empty(device=hidden.device)
    input_leaf = torch.empty_like(hidden).requires_grad_(input_has_grad)
    with MemoryTracker() as tracker:
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=use_autocast):
            block_input = input_leaf * 1  # as the output of another block: freed unless saved
            result = block(block_input, *other_inputs)
            del block_input
            after_forward = tracker.allocated - result.nbytes
        saved = tracker.allocated - result.nbytes
        working = 0
        if result.requires_grad:
            tracker.reset_peak()
            result.backward(torch.empty_like(result))
            working = tracker.peak - saved - result.nbytes
    gradients = sum(p.grad.nbytes for p in block.parameters() if p.grad is not None)
    return BlockMemory(after_forward, saved, working, gradients, result.requires_grad)
