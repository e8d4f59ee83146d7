"""Model initialization of a run: pretrained weights from a folder, or random ones; also on meta.

`build_model` returns the whole model on one device. `build_meta_model` returns it on the meta
device, with a function that reads or draws one tensor at a time, for FSDP to shard before anything
is loaded (meta-device initialization). A model initialized at random has a byte tokenizer, which is
written into the run's folder and determines the special token ids of its config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import ConfigError
from qwen2vl.files import atomic_folder
from qwen2vl.loading import load, load_processor
from qwen2vl.lora.layers import LoraConfig, LoraFactors, inject_lora, named_lora_layers
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import write_bpe_tokenizer, write_byte_tokenizer
from qwen2vl.quantization.nf4 import Nf4Weight
from qwen2vl.synth import sample
from qwen2vl.synth.strings import LETTERS_OF_EUROPE
from qwen2vl.synth.world import check_resources
from qwen2vl.train.adapter import initial_factors, inject_adapter, load_qlora_model
from qwen2vl.train.config import TrainConfig
from qwen2vl.weights import TensorFolder, check_state_dict, open_tensors, resolve_model

__all__ = [
    "MetaModel",
    "build_meta_model",
    "build_model",
    "build_processor",
    "fresh_model_config",
    "fresh_processor",
    "init_weights",
    "weight_initializer",
    "with_special_token_ids",
]

# Conversations of the synthetic data from which merges are learned, with a seed of their own.
_CORPUS_SIZE, _CORPUS_SEED = 8_000, -1
_corpora: dict[str, list[str]] = {}  # by the mixtures of a run
_KEYWORD_CHARACTER = "✿"  # of the agent format's keywords, as ✿FUNCTION✿

EMBEDDING_STD = 0.05  # with a tied head of width 192 the initial logits have a deviation of 0.7

# Layers whose output is added to the residual stream, of both towers.
_RESIDUAL_PROJECTIONS = ("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaModel:
    """A model on the meta device, its processor, and a function that reads its tensors."""

    model: Qwen2VL
    processor: Processor
    tokenizer_folder: Path
    read_tensor: ReadTensor  # name -> full tensor on the CPU; call in the order of the state dict


def build_model(config: TrainConfig) -> tuple[Qwen2VL, Processor, Path]:
    """Build the model in float32, its processor and the path of its tokenizer's folder.

    Raises:
        ConfigError: neither `init` nor `model` is given.
        CheckpointError: `init` names no folder with a model, or its adapter does not fit.
    """
    model_config = fresh_model_config(config)
    if model_config is None:
        source = resolve_model(config.init)
        model, processor = _load_pretrained(source, config)
        return model, processor, source
    folder = Path(config.folder) / "tokenizer"
    processor = fresh_processor(config, model_config, folder)
    model = Qwen2VL(processor.config)
    init_weights(model, config.seed)
    return model.to(config.device), processor, folder


def build_processor(config: TrainConfig) -> Processor:
    """Build the processor of the run, without its model; writes nothing into the run's folder.

    Raises:
        ConfigError: the config has neither `init` nor `model`.
        CheckpointError: `init` names no folder with a model, or lacks tokens of `adapter.init`.
    """
    model_config = fresh_model_config(config)
    if model_config is None:
        return _load_processor(resolve_model(config.init), config)
    with tempfile.TemporaryDirectory() as folder:
        return fresh_processor(config, model_config, Path(folder) / "tokenizer")


def build_meta_model(config: TrainConfig) -> MetaModel:
    """Build the same model as `build_model`, on the meta device, without reading its weights.

    Raises:
        ConfigError: neither `init` nor `model` is given, or the adapter is impossible.
        CheckpointError: `init` names no folder with a model, or its adapter does not fit.
    """
    model_config = fresh_model_config(config)
    if model_config is not None:
        folder = Path(config.folder) / "tokenizer"
        processor = fresh_processor(config, model_config, folder)
        model = _empty_meta_model(processor)
        draw_weight = weight_initializer(model, config.seed)
        return MetaModel(
            model=model, processor=processor, tokenizer_folder=folder, read_tensor=draw_weight
        )
    source = resolve_model(config.init)
    processor = _load_processor(source, config)
    tensors = open_tensors(source)
    check_state_dict(tensors, processor.config)
    model = _empty_meta_model(processor)
    factors: dict[str, LoraFactors] = {}
    if config.adapter is not None:
        factors = initial_factors(model, config.adapter, config.seed)
        quantize = config.adapter.quantize_base
        inject_lora(model, factors, dropout=config.adapter.dropout, quantize=quantize)
        model.train()  # enables LoRA dropout, and changes nothing else
    read_tensor = _TensorReader(model, tensors, factors)
    return MetaModel(
        model=model, processor=processor, tokenizer_folder=source, read_tensor=read_tensor
    )


def fresh_model_config(config: TrainConfig) -> Qwen2VLConfig | None:
    """Return the config of a model to initialize at random; None with pretrained weights (`init`).

    Raises:
        ConfigError: there is neither `init` nor `model`, or an adapter without `init`.
    """
    if config.init:
        return None
    if config.adapter is not None:
        raise ConfigError(
            f"run {config.name}: an adapter needs a pretrained model; give model=FOLDER"
        )
    if config.model is None:
        raise ConfigError(
            f"run {config.name}: no model to start from; give init=FOLDER, or a model in the recipe"
        )
    return config.model


def fresh_processor(config: TrainConfig, model: Qwen2VLConfig, folder: Path) -> Processor:
    """Build the processor of a randomly initialized model; writes its tokenizer to `folder`.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
    """
    _write_tokenizer(folder, config)
    tokenizer = Tokenizer.from_folder(folder)
    if len(tokenizer) > model.text.vocab_size:
        raise ConfigError(
            f"run {config.name}: the tokenizer has {len(tokenizer):,} tokens and the model "
            f"{model.text.vocab_size:,}; lower num_merges ({config.num_merges:,}), or raise "
            "model.text.vocab_size"
        )
    pixels = PixelLimits(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    return Processor(with_special_token_ids(model, tokenizer), tokenizer, pixels=pixels)


def with_special_token_ids(config: Qwen2VLConfig, tokenizer: Tokenizer) -> Qwen2VLConfig:
    """Return `config` with the special token ids of `tokenizer`."""
    return replace(config, **tokenizer.config_ids)


@torch.no_grad()
def init_weights(model: Qwen2VL, seed: int) -> None:
    """Draw weights: deviation fan_in ** -0.5, less for projections into the residual stream."""
    draw_weight = weight_initializer(model, seed)
    for name, parameter in model.named_parameters():
        parameter.copy_(draw_weight(name))


def weight_initializer(model: Qwen2VL, seed: int) -> Callable[[str], Tensor]:
    """Return a function name -> random tensor; call it once per name, in the model's order."""
    generator = torch.Generator().manual_seed(seed)
    depth = {"visual": model.config.vision.depth, "model": model.config.text.num_hidden_layers}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def draw_weight(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        std = prod(shape[1:]) ** -0.5
        if name.endswith(_RESIDUAL_PROJECTIONS):
            std *= (2 * depth[name.partition(".")[0]]) ** -0.5
        if "embed_tokens" in name or name.startswith("lm_head"):
            std = EMBEDDING_STD
        return torch.randn(shape, generator=generator) * std

    return draw_weight


def _load_pretrained(source: Path, config: TrainConfig) -> tuple[Qwen2VL, Processor]:
    """Load a model folder, and inject the run's adapter."""
    adapter = config.adapter
    if adapter is not None and adapter.quantize_base != "none":
        processor = _load_processor(source, config)
        model = load_qlora_model(
            source, processor.config, adapter, device=config.device, seed=config.seed
        )
        _clone_parameters(model)
        return model, processor
    model, processor = load(source, device=config.device, dtype="float32")
    _clone_parameters(model)
    if adapter is not None:
        _check_adapter_tokens(processor, adapter)
        inject_adapter(model, adapter, config.seed)
    return model, processor


def _load_processor(source: Path, config: TrainConfig) -> Processor:
    processor = load_processor(source)
    if config.adapter is not None:
        _check_adapter_tokens(processor, config.adapter)
    return processor


def _check_adapter_tokens(processor: Processor, adapter: LoraConfig) -> None:
    """Refuse an adapter to start from whose folder has tokens that the model lacks."""
    if adapter.init:
        processor.tokenizer.check_adapter(adapter.init)


def _clone_parameters(model: Qwen2VL) -> None:
    """Copy the weights: loaded ones may be memory-mapped from a file, read-only."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _empty_meta_model(processor: Processor) -> Qwen2VL:
    return meta_model(processor.config)


def _write_tokenizer(folder: Path, config: TrainConfig) -> None:
    """Write the tokenizer once, atomically: other ranks may be reading it."""
    if folder.is_dir():
        return
    with atomic_folder(folder) as partial:
        if not config.num_merges:
            write_byte_tokenizer(partial, characters=_KEYWORD_CHARACTER)
            return
        # The corpus takes half a minute: what prints the run's parameters first samples it.
        mixtures = repr([stage.mixture for stage in config.stages])
        if mixtures not in _corpora:
            _corpora[mixtures] = list(_tokenizer_corpus(config))
        write_bpe_tokenizer(
            partial,
            _corpora[mixtures],
            num_merges=config.num_merges,
            characters=_KEYWORD_CHARACTER + LETTERS_OF_EUROPE,
        )


def _tokenizer_corpus(config: TrainConfig) -> Iterator[str]:
    """Yield questions and answers of the last synthetic stage, but no text read off a picture.

    Text in pictures stays a sequence of characters, of which each is seen in one place.
    """
    mixtures = [stage.mixture for stage in config.stages if stage.mixture is not None]
    check_resources(mixtures[-1])
    for index in range(_CORPUS_SIZE):
        for question in sample(_CORPUS_SEED, index, mixtures[-1]).questions:
            yield question.text
            if not question.is_reading:
                yield question.answer


class _TensorReader:
    """Reads tensors of a model with adapters: from the folder, LoRA factors, NF4 buffers."""

    def __init__(
        self, model: Qwen2VL, tensors: TensorFolder, factors: dict[str, LoraFactors]
    ) -> None:
        self.tensors, self.factors = tensors, factors
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        nf4_layers = ((name, layer.nf4) for name, layer in named_lora_layers(model))
        self.is_double_quantized = {
            name: nf4.is_double_quantized for name, nf4 in nf4_layers if nf4 is not None
        }
        # Caches one layer, whose buffers are read one after the other.
        self.nf4_weight = lru_cache(maxsize=1)(self._quantize)

    def __call__(self, name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if layer.endswith(".nf4"):
            return self.nf4_weight(layer.removesuffix(".nf4")).get_buffer(leaf)
        if leaf in ("lora_A", "lora_B"):
            lora_factors = self.factors[layer]
            return lora_factors.a_RX if leaf == "lora_A" else lora_factors.b_YR
        # Reshapes a patch embedding that is stored as a matrix to the Conv3d shape.
        return self.tensors[name].view(self.shapes[name])

    def _quantize(self, layer: str) -> Nf4Weight:
        return Nf4Weight(self.tensors[f"{layer}.weight"], double=self.is_double_quantized[layer])
