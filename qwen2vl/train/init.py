"""The model a run begins with: a folder's weights, or fresh ones for a new small model.

A fresh model speaks bytes: its tokenizer is written into the run's folder, and the special ids of
its config are taken from there. It must not know stages or steps. Next rooms: adapter.py, run.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import ConfigError
from qwen2vl.loading import load, load_processor
from qwen2vl.lora.layers import LoraFactors, lora_layers, put_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import write_byte_tokenizer
from qwen2vl.quantization.nf4 import Nf4Weight
from qwen2vl.train.adapter import factors_to_train, load_quantized, put_adapter
from qwen2vl.train.config import TrainConfig
from qwen2vl.weights import TensorFolder, check_fit, find, open_tensors

__all__ = [
    "Outline",
    "begin",
    "check_start",
    "drawn_weights",
    "fresh_processor",
    "initialize",
    "outline",
    "with_ids_of",
]

EMBEDDING_STD = 0.05  # with a tied head of width 192, first logits deviate by 0.7

# What writes into the residual stream of either tower.
_WRITERS = ("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")


def begin(config: TrainConfig) -> tuple[Qwen2VL, Processor, Path]:
    """Build what the run trains: the model in float32, its processor, its tokenizer's folder.

    Raises:
        ConfigError: neither `init` nor `model` is given.
        CheckpointError: `init` names no folder with a model, or its adapter does not fit.
    """
    fresh = check_start(config)
    if fresh is None:
        source = find(config.init)
        model, processor = _open(source, config)
        return model, processor, source
    folder = Path(config.folder) / "tokenizer"
    processor = fresh_processor(config, fresh, folder)
    model = Qwen2VL(processor.config)
    initialize(model, config.seed)
    return model.to(config.device), processor, folder


def check_start(config: TrainConfig) -> Qwen2VLConfig | None:
    """Give the model that a run builds fresh; None where it starts from `init`.

    Raises:
        ConfigError: there is neither, or an adapter of a model that knows nothing.
    """
    if config.init:
        return None
    if config.adapter is not None:
        raise ConfigError(
            f"run {config.name}: an adapter needs a model that has learned; give model=FOLDER"
        )
    if config.model is None:
        raise ConfigError(
            f"run {config.name}: nothing to begin from; give init=FOLDER, or a model in the recipe"
        )
    return config.model


def fresh_processor(config: TrainConfig, model: Qwen2VLConfig, folder: Path) -> Processor:
    """Make the processor of a fresh model; its byte tokenizer is written to `folder`, once."""
    _write_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    pixels = PixelLimits(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    return Processor(with_ids_of(model, tokenizer), tokenizer, pixels=pixels)


def with_ids_of(config: Qwen2VLConfig, tokenizer: Tokenizer) -> Qwen2VLConfig:
    """Take the special ids from the tokenizer."""
    return replace(config, **tokenizer.config_ids)


@torch.no_grad()
def initialize(model: Qwen2VL, seed: int) -> None:
    """Draw fresh weights: deviation fan_in ** -0.5, less for what writes into the residual."""
    draw = drawn_weights(model, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(draw(name))


def drawn_weights(model: Qwen2VL, seed: int) -> Callable[[str], Tensor]:
    """Give what draws the weight of a name, each once and in the order of the model's."""
    generator = torch.Generator().manual_seed(seed)
    depth = {"visual": model.config.vision.depth, "model": model.config.text.num_hidden_layers}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        std = prod(shape[1:]) ** -0.5
        if name.endswith(_WRITERS):
            std *= (2 * depth[name.partition(".")[0]]) ** -0.5
        if "embed_tokens" in name or name.startswith("lm_head"):
            std = EMBEDDING_STD
        return torch.randn(shape, generator=generator) * std

    return draw


def _write_tokenizer(folder: Path) -> None:
    """Write the tokenizer, once and whole: other ranks may be reading it."""
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    write_byte_tokenizer(aside, characters="✿")  # the mark of the agent format's keywords
    aside.rename(folder)


def _open(source: Path, config: TrainConfig) -> tuple[Qwen2VL, Processor]:
    """Load a folder, and put the run's adapter on it."""
    adapter = config.adapter
    if adapter is not None and adapter.quantize_base != "none":
        processor = load_processor(source)
        model = load_quantized(
            source, processor.config, adapter, device=config.device, seed=config.seed
        )
        _own_copy(model)
        return model, processor
    model, processor = load(source, device=config.device, dtype="float32")
    _own_copy(model)
    if adapter is not None:
        put_adapter(model, adapter, config.seed)
    return model, processor


def _own_copy(model: Qwen2VL) -> None:
    """Loaded weights may be mapped from the file, read-only: training needs its own."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


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
