"""LoRA layers: y = W x + scale * B A x, with A and B trained and W frozen; merging; QLoRA.

In training a LoraLinear replaces a linear layer under the same parameter names, with lora_A and
lora_B beside them; its base weight may be NF4 (QLoRA). `merge_adapter` merges temporarily and
`unmerge_adapter` restores to the bit. Loading and exporting add scale * B A to W once
(`merge_lora`), after which inference costs what it costs without an adapter. lm_head cannot be
trained: the loss reads it as a matrix.

Letters: R rank, X and Y inputs and outputs of a linear layer. (Hu et al. 2021, LoRA; Kalajdzievski
2023, rsLoRA; Dettmers et al. 2023, QLoRA; PEFT: LoraConfig, LoraLayer.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.errors import ConfigError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.nf4 import BaseQuantization, Nf4Weight, dequantize_nf4

__all__ = [
    "DECODER_TARGET_MODULES",
    "LoraConfig",
    "LoraFactors",
    "LoraLinear",
    "extract_factors",
    "init_factors",
    "inject_lora",
    "match_target_modules",
    "merge_adapter",
    "merge_lora",
    "merge_state_dict",
    "named_lora_layers",
    "unmerge_adapter",
]

# The seven linear layers of every decoder block.
DECODER_TARGET_MODULES = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"

_A, _B, _NF4 = "lora_A", "lora_B", "nf4"
_LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which linear layers get LoRA factors, and their hyperparameters (PEFT: LoraConfig)."""

    rank: int = 16  # of B A: rows of A, columns of B
    alpha: float = 32.0  # B A is scaled by alpha / rank
    dropout: float = 0.0  # of the inputs of A, in training
    use_rslora: bool = False  # rsLoRA: scale by alpha / sqrt(rank), for high ranks
    target_modules: tuple[str, ...] = (DECODER_TARGET_MODULES,)  # regexes of full layer names
    quantize_base: BaseQuantization = "none"  # QLoRA: of the adapted layers' own weights
    init: str = ""  # a PEFT adapter folder to initialize the factors from

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """The LoRA factors of one linear layer: its weight changes by scale * b_YR @ a_RX."""

    a_RX: Tensor
    b_YR: Tensor
    scale: float


class LoraLinear(nn.Linear):
    """A linear layer with LoRA factors; the base weight is frozen, plain or NF4."""

    def __init__(
        self, layer: nn.Linear, factors: LoraFactors, *, dropout: float, quantize: BaseQuantization
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.scale, self.dropout = factors.scale, dropout
        self.bias = layer.bias
        self.weight = layer.weight
        self.nf4: Nf4Weight | None = None
        if quantize != "none":
            self.nf4 = Nf4Weight(layer.weight, double=quantize == "nf4_double")
            self.register_parameter("weight", None)
        device = layer.weight.device
        self.lora_A = nn.Parameter(factors.a_RX.to(device, torch.float32, copy=True))
        self.lora_B = nn.Parameter(factors.b_YR.to(device, torch.float32, copy=True))
        self.merged_weight_YX: Tensor | None = None  # while merged, used in place of W, A and B

    @property
    def factors(self) -> LoraFactors:
        """The current factors; the parameters themselves, not copies."""
        return LoraFactors(a_RX=self.lora_A, b_YR=self.lora_B, scale=self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (T, X) into (T, Y)."""
        if self.merged_weight_YX is not None:
            return F.linear(input, self.merged_weight_YX, self.bias)
        if self.nf4 is None:
            out_TY = F.linear(input, self.weight, self.bias)
        else:
            out_TY = self.nf4(input)
            out_TY = out_TY if self.bias is None else out_TY + self.bias.to(out_TY.dtype)
        dropped_TX = F.dropout(input, self.dropout, self.training)
        if not torch.is_autocast_enabled(input.device.type):
            # The factors stay float32, also beside a bfloat16 weight.
            dropped_TX = dropped_TX.to(self.lora_A.dtype)
        delta_TY = F.linear(F.linear(dropped_TX, self.lora_A), self.lora_B)
        return out_TY + (delta_TY * self.scale).to(out_TY.dtype)


def init_factors(model: Qwen2VL, config: LoraConfig, seed: int) -> dict[str, LoraFactors]:
    """Draw factors for the target modules: A uniform, B zero, so that the model computes the same.

    Raises:
        ConfigError: a pattern matches no layer, or a hyperparameter is out of range.
    """
    _check_config(config)
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for name in match_target_modules(model, config.target_modules):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        bound = layer.in_features**-0.5
        a_RX = torch.empty(config.rank, layer.in_features).uniform_(
            -bound, bound, generator=generator
        )
        b_YR = torch.zeros(layer.out_features, config.rank)
        factors[name] = LoraFactors(a_RX=a_RX, b_YR=b_YR, scale=config.scale)
    return factors


def match_target_modules(model: Qwen2VL, patterns: tuple[str, ...]) -> list[str]:
    """List the linear layers, without the head, whose full name one of the patterns matches.

    Raises:
        ConfigError: a pattern is not a regex, or matches no layer.
    """
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != _LM_HEAD
    ]
    matched: dict[str, None] = {}
    for pattern in patterns:
        try:
            names = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(
                f"adapter.target_modules: {pattern!r} is no pattern: {error}"
            ) from None
        if not names:
            raise ConfigError(
                f"adapter.target_modules: {pattern!r} matches no linear layer; names are like "
                f"{linears[0]} and {linears[-1]}"
            )
        matched |= dict.fromkeys(names)
    return [name for name in linears if name in matched]


def inject_lora(
    model: Qwen2VL,
    factors: Mapping[str, LoraFactors],
    *,
    dropout: float = 0.0,
    quantize: BaseQuantization = "none",
) -> None:
    """Replace linear layers by LoraLinears, in place; the caller sets `requires_grad`.

    Raises:
        ConfigError: lm_head is among them.
    """
    for name, layer_factors in factors.items():
        if name == _LM_HEAD:
            raise ConfigError(
                "lm_head: the head cannot be adapted while training, the loss reads its matrix; "
                "name layers of the towers"
            )
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}"
        parent, _, leaf = name.rpartition(".")
        lora = LoraLinear(layer, layer_factors, dropout=dropout, quantize=quantize)
        setattr(model.get_submodule(parent), leaf, lora.train(layer.training))


def named_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Iterate over the names and LoraLinears of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Merge the factors into a second weight of each layer: one product in place of three."""
    for _, layer in named_lora_layers(model):
        weight_YX = layer.weight if layer.nf4 is None else layer.nf4.dequantize()
        layer.merged_weight_YX = _merge(weight_YX, layer.factors)


def unmerge_adapter(model: nn.Module) -> None:
    """Undo `merge_adapter`, exactly: base weights and factors were not changed."""
    for _, layer in named_lora_layers(model):
        layer.merged_weight_YX = None


@torch.no_grad()
def merge_lora(model: Qwen2VL, factors: Mapping[str, LoraFactors]) -> None:
    """Add the factors to the weights of `model`, computed in float32 and rounded once.

    Each weight gets a new tensor: the old one may be memory-mapped from a file.
    """
    for name, layer_factors in factors.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.data = _merge(weight, layer_factors)


@torch.no_grad()
def merge_state_dict(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Convert the state dict of an adapted model into that of the merged, plain model.

    Needs no model, so `state` may be a full state dict gathered from many processes.

    Args:
        state: the state dict of a model with LoraLinears.
        scales: the scale of each adapted layer, by name.
    """
    plain = {name: t for name, t in state.items() if _layer_name(name) not in scales}
    for name, factors in extract_factors(state, scales).items():
        weight_YX = state.get(f"{name}.weight")
        if weight_YX is None:
            shape = torch.Size((len(factors.b_YR), factors.a_RX.shape[1]))
            weight_YX = dequantize_nf4(dict(_with_prefix(state, f"{name}.{_NF4}.")), shape)
        plain[f"{name}.weight"] = _merge(weight_YX, factors)
        if (bias := state.get(f"{name}.bias")) is not None:
            plain[f"{name}.bias"] = bias
    return plain


def extract_factors(
    state: Mapping[str, Tensor], scales: Mapping[str, float]
) -> dict[str, LoraFactors]:
    """Extract the factors of every adapted layer from a state dict."""
    return {
        name: LoraFactors(a_RX=state[f"{name}.{_A}"], b_YR=state[f"{name}.{_B}"], scale=scale)
        for name, scale in scales.items()
    }


def _merge(weight_YX: Tensor, factors: LoraFactors) -> Tensor:
    a_RX, b_YR = (f.to(weight_YX.device, torch.float32) for f in (factors.a_RX, factors.b_YR))
    # PEFT's operations in PEFT's order: `addmm` with alpha fuses the scale on some CPUs, and then
    # differs from PEFT in the last bit.
    merged_YX = (b_YR @ a_RX).mul_(factors.scale).add_(weight_YX)
    return merged_YX.to(weight_YX.dtype)


def _layer_name(name: str) -> str:
    """Return the name of the layer that a tensor of the state dict belongs to."""
    return name.rpartition(".")[0].removesuffix(f".{_NF4}")


def _with_prefix(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    yield from ((n.removeprefix(prefix), t) for n, t in state.items() if n.startswith(prefix))


def _check_config(config: LoraConfig) -> None:
    rules = [
        (config.rank >= 1, f"rank is {config.rank}, must be at least 1"),
        (config.alpha > 0, f"alpha is {config.alpha}, must be above 0"),
        (0 <= config.dropout < 1, f"dropout is {config.dropout}, must be from 0 to below 1"),
    ]
    if violations := [text for holds, text in rules if not holds]:
        raise ConfigError("adapter: " + "; ".join(violations))
