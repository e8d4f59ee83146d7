"""Vision rows of the items in work: whole from the cache, or growing slice by slice.

A slice is a pair of frames; the tower never looks beyond one, so a clip encoded in parts has the
rows of the clip encoded whole. Items that several requests show are held once. Next room:
runner.py, which takes the rows; vision_cache.py keeps them afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.encoder_cache.disk_cache import VisionKey
from qwen2vl.engine.encoder_cache.memory_cache import VisionCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeights
from qwen2vl.engine.scheduler.output import Slices
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.lora.multi import AdapterSwitch
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item

__all__ = ["VisionShelf"]


class VisionShelf:
    """Holds the rows of each item as long as some sequence needs them."""

    def __init__(
        self, model: Qwen2VL, cache: VisionCache, weights: VisionWeights, switch: AdapterSwitch
    ) -> None:
        self.model = model
        self.cache = cache
        self._weights = weights
        self._switch = switch
        self._holds: Counter[bytes] = Counter()
        self._keys: dict[bytes, VisionKey] = {}  # of the weights as they were when first held
        self._rows: dict[bytes, Tensor] = {}  # by digest; rows of slices not yet ready are empty
        self._ready: dict[bytes, int] = {}

    @classmethod
    def of(cls, model: Qwen2VL, config: EngineConfig, switch: AdapterSwitch) -> VisionShelf:
        """Set up shelf and cache as `config` says."""
        cache = VisionCache(
            max_bytes=config.vision_cache_bytes,
            folder=config.vision_cache_dir,
            max_disk_bytes=config.vision_disk_bytes,
            device=model.device,
        )
        weights = VisionWeights(model, lasting=config.vision_cache_dir is not None)
        weights.start()  # a second for the official towers, meanwhile the first prompt is made
        return cls(model, cache, weights, switch)

    def hold(self, item: Item) -> None:
        """Keep the item's rows, or what becomes of them, until it is released as often."""
        self._holds[item.digest] += 1
        if self._holds[item.digest] > 1:
            return
        key = VisionKey(item.digest, self._weights.fingerprint())
        self._keys[item.digest] = key
        self.cache.pin(key)
        rows_MD = self.cache.get(key)
        if rows_MD is not None:
            self._rows[item.digest], self._ready[item.digest] = rows_MD, item.grid.t

    def release(self, item: Item) -> None:
        """Let go of an item; its rows stay in the cache if they are whole."""
        assert self._holds[item.digest] > 0, "released more often than held"
        self._holds[item.digest] -= 1
        if not self._holds[item.digest]:
            del self._holds[item.digest]
            self.cache.unpin(self._keys.pop(item.digest))
            self._rows.pop(item.digest, None)
            self._ready.pop(item.digest, None)

    def ready(self, item: Item) -> int:
        """Count the slices whose rows are there."""
        return self._ready.get(item.digest, 0)

    def rows(self, item: Item) -> Tensor:
        """Give the rows of an item, (num_tokens, D)."""
        return self._rows[item.digest]

    def encode(self, slices: SequenceOf[Slices]) -> None:
        """Run the tower once over slices of any items, and put the rows where they belong."""
        device = self.model.device
        grids = [Grid(s.stop - s.start, s.item.grid.h, s.item.grid.w) for s in slices]
        patches_NP = torch.cat([_patches(s) for s in slices]).to(device)
        meta = VisionMeta.build(grids).to(device)
        with self._switch.at_work("visual", [(s.adapter, s.num_patches) for s in slices]):
            vision_MD = self.model.encode(patches_NP, meta)
        sizes = [s.item.num_tokens // s.item.grid.t * (s.stop - s.start) for s in slices]
        for one, rows_MD in zip(slices, vision_MD.split(sizes), strict=True):
            self._place(one, rows_MD)

    def _place(self, slices: Slices, rows_MD: Tensor) -> None:
        item = slices.item
        if item.digest not in self._holds:
            return  # given up while it was planned
        assert self.ready(item) == slices.start, "slices come in order"
        if slices.stop - slices.start == item.grid.t:
            self._rows[item.digest] = rows_MD
        else:
            if item.digest not in self._rows:
                self._rows[item.digest] = rows_MD.new_empty(item.num_tokens, rows_MD.shape[1])
            each = item.num_tokens // item.grid.t
            self._rows[item.digest][each * slices.start : each * slices.stop] = rows_MD
        self._ready[item.digest] = slices.stop
        key = self._keys[item.digest]
        # Rows of weights that changed on the way belong to no name.
        if slices.stop == item.grid.t and key.fingerprint == self._weights.fingerprint():
            self.cache.put(key, self._rows[item.digest])


def _patches(slices: Slices) -> Tensor:
    area = slices.item.grid.h * slices.item.grid.w
    return slices.item.patches_NP[area * slices.start : area * slices.stop]
