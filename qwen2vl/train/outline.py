"""What a run of several processes begins with: a model without numbers, and where each comes from.

    meta device --shard--> parts --allocate--> empty parts --fill--> read, one tensor at a time

No process ever holds the model: each reads a tensor, keeps its rows, and lets go of the rest, so
that a model needs no more memory than its parts and its largest tensor. What is read are the bits
that begin.py would load or draw. It must not know meshes. Next room: parallel/shard.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.adapt.lora import LoraFactors, lora_layers, put_lora
from qwen2vl.adapt.nf4 import Nf4Weight
from qwen2vl.load import load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor
from qwen2vl.train.adapter import factors_to_train
from qwen2vl.train.begin import check_start, drawn_weights, fresh_processor
from qwen2vl.train.config import TrainConfig
from qwen2vl.weights import TensorFolder, check_fit, find, open_tensors

__all__ = ["Outline", "outline"]

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model to be, its processor, its tokenizer's folder, and its tensors by name."""

    model: Qwen2VL  # on the meta device
    processor: Processor
    tokenizer: Path
    read: Read  # gives a whole tensor on the CPU; asked in the order of the state dict


def outline(config: TrainConfig) -> Outline:
    """Find what the run trains, as `begin` does, without reading it.

    Raises:
        ConfigError: neither `init` nor `model` is given, or the adapter is impossible.
        CheckpointError: `init` names no folder with a model, or its adapter does not fit.
    """
    fresh = check_start(config)
    if fresh is not None:
        folder = Path(config.folder) / "tokenizer"
        processor = fresh_processor(config, fresh, folder)
        model = _empty(processor)
        drawn = drawn_weights(model, config.seed)
        return Outline(model=model, processor=processor, tokenizer=folder, read=drawn)
    source = find(config.init)
    processor = load_processor(source)
    tensors = open_tensors(source)
    check_fit(tensors, processor.config)
    model = _empty(processor)
    factors: dict[str, LoraFactors] = {}
    if config.adapter is not None:
        factors = factors_to_train(model, config.adapter, config.seed)
        quantize = config.adapter.quantize_base
        put_lora(model, factors, dropout=config.adapter.dropout, quantize=quantize)
        model.train()  # only the factors' dropout asks
    read = _Reader(model, tensors, factors)
    return Outline(model=model, processor=processor, tokenizer=source, read=read)


def _empty(processor: Processor) -> Qwen2VL:
    with torch.device("meta"):
        return Qwen2VL(processor.config)


class _Reader:
    """Finds the tensors of an adapted model: in the folder, among the factors, or as codes."""

    def __init__(
        self, model: Qwen2VL, tensors: TensorFolder, factors: dict[str, LoraFactors]
    ) -> None:
        self.tensors, self.factors = tensors, factors
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        coded = ((name, layer.nf4) for name, layer in lora_layers(model))
        self.is_double = {name: nf4.is_double for name, nf4 in coded if nf4 is not None}
        self.codes = lru_cache(maxsize=1)(self._codes)  # of the layer that is asked for now

    def __call__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".nf4"):
            return self.codes(layer.removesuffix(".nf4")).get_buffer(leaf)
        if leaf in ("lora_A", "lora_B"):
            found = self.factors[layer]
            return found.a_RX if leaf == "lora_A" else found.b_YR
        # A patch embedding stored as a matrix takes the Conv3d shape here.
        return self.tensors[name].view(self.shapes[name])

    def _codes(self, layer: str) -> Nf4Weight:
        return Nf4Weight(self.tensors[f"{layer}.weight"], double=self.is_double[layer])
