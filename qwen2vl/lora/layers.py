"""Low-rank adapters of linear layers: y = W x + scale * B A x; A and B are learned, W stays.

Three lives of the same factors. In training a LoraLinear stands where the layer stood, under the
names of its parameters, and the model never knows. For a while it may be merged, and is unmerged to
the bit. Loaded or exported, W becomes W + scale * B A once, and answering costs what it costs
without. The head is no layer to train: the loss reads it as a matrix.

Letters of this room: R rank, X and Y the inputs and outputs of a linear layer. (Hu et al. 2021,
LoRA; Kalajdzievski 2023, rsLoRA; Dettmers et al. 2023, QLoRA.) Next room: peft.py, the files.
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
from qwen2vl.quantization.nf4 import Nf4Weight, Quantize, dequantize

__all__ = [
    "DECODER",
    "LoraConfig",
    "LoraFactors",
    "LoraLinear",
    "factors_of",
    "fresh_factors",
    "lora_layers",
    "merge_in_place",
    "merge_lora",
    "merged_state",
    "put_lora",
    "target_names",
    "unmerge",
]

DECODER = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # the seven layers of every block

_A, _B, _NF4 = "lora_A", "lora_B", "nf4"
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Which layers learn a low-rank change, and of which size."""

    rank: int = 16
    alpha: float = 32.0  # the change counts alpha / rank times
    dropout: float = 0.0  # share of a layer's inputs that the change does not see, in training
    rank_stabilized: bool = False  # alpha / sqrt(rank) instead, for high ranks
    targets: tuple[str, ...] = (DECODER,)  # patterns of the names of layers; full matches
    quantize_base: Quantize = "none"  # what the adapted layers' own weights are stored as
    init: str = ""  # an adapter folder of PEFT to go on from, in place of fresh factors

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFactors:
    """What one linear layer gains: scale * b_YR @ a_RX."""

    a_RX: Tensor
    b_YR: Tensor
    scale: float


class LoraLinear(nn.Linear):
    """A linear layer, its own weight as it was or in 4 bits, and the factors beside it."""

    def __init__(
        self, layer: nn.Linear, factors: LoraFactors, *, dropout: float, quantize: Quantize
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.scale, self.dropout = factors.scale, dropout
        self.bias = layer.bias
        self.weight = layer.weight
        self.nf4: Nf4Weight | None = None
        if quantize != "none":
            self.nf4 = Nf4Weight(layer.weight, double=quantize == "nf4_double")
            self.register_parameter("weight", None)
        place = layer.weight.device
        self.lora_A = nn.Parameter(factors.a_RX.to(place, torch.float32, copy=True))
        self.lora_B = nn.Parameter(factors.b_YR.to(place, torch.float32, copy=True))
        self.merged_YX: Tensor | None = None  # instead of all three, while it is there

    @property
    def factors(self) -> LoraFactors:
        """What is learned, as it stands; the tensors themselves, not copies."""
        return LoraFactors(a_RX=self.lora_A, b_YR=self.lora_B, scale=self.scale)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (T, X) into (T, Y)."""
        if self.merged_YX is not None:
            return F.linear(input, self.merged_YX, self.bias)
        if self.nf4 is None:
            out_TY = F.linear(input, self.weight, self.bias)
        else:
            out_TY = self.nf4(input)
            out_TY = out_TY if self.bias is None else out_TY + self.bias.to(out_TY.dtype)
        seen_TX = F.dropout(input, self.dropout, self.training)
        if not torch.is_autocast_enabled(input.device.type):
            seen_TX = seen_TX.to(
                self.lora_A.dtype
            )  # the factors stay precise beside a short weight
        change_TY = F.linear(F.linear(seen_TX, self.lora_A), self.lora_B)
        return out_TY + (change_TY * self.scale).to(out_TY.dtype)


def fresh_factors(model: Qwen2VL, config: LoraConfig, seed: int) -> dict[str, LoraFactors]:
    """Draw factors for the layers that `config` names: A uniform, B zero, so that nothing changes.

    Raises:
        ConfigError: a pattern matches no layer of the towers; a size is impossible.
    """
    _check(config)
    draw = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for name in target_names(model, config.targets):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        bound = layer.in_features**-0.5
        a_RX = torch.empty(config.rank, layer.in_features).uniform_(-bound, bound, generator=draw)
        b_YR = torch.zeros(layer.out_features, config.rank)
        factors[name] = LoraFactors(a_RX=a_RX, b_YR=b_YR, scale=config.scale)
    return factors


def target_names(model: Qwen2VL, patterns: tuple[str, ...]) -> list[str]:
    """List the linear layers whose whole name one of the patterns matches.

    Raises:
        ConfigError: a pattern is none, or matches no layer of the towers.
    """
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != _HEAD
    ]
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            own = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"adapter.targets: {pattern!r} is no pattern: {error}") from None
        if not own:
            raise ConfigError(
                f"adapter.targets: {pattern!r} matches no linear layer; names are like "
                f"{linears[0]} and {linears[-1]}"
            )
        found |= dict.fromkeys(own)
    return [name for name in linears if name in found]


def put_lora(
    model: Qwen2VL,
    factors: Mapping[str, LoraFactors],
    *,
    dropout: float = 0.0,
    quantize: Quantize = "none",
) -> None:
    """Replace layers by LoraLinears of the same names; who may learn is for the caller to say.

    Raises:
        ConfigError: the head is among them.
    """
    for name, found in factors.items():
        if name == _HEAD:
            raise ConfigError(
                "lm_head: the head cannot be adapted while training, the loss reads its matrix; "
                "name layers of the towers"
            )
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}"
        parent, _, leaf = name.rpartition(".")
        new = LoraLinear(layer, found, dropout=dropout, quantize=quantize)
        setattr(model.get_submodule(parent), leaf, new.train(layer.training))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """List the adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merge_in_place(model: nn.Module) -> None:
    """Let every adapted layer multiply once instead of three times; costs a second weight each."""
    for _, layer in lora_layers(model):
        weight_YX = layer.weight if layer.nf4 is None else layer.nf4.dequantized()
        layer.merged_YX = _merged(weight_YX, layer.factors)


def unmerge(model: nn.Module) -> None:
    """Take `merge_in_place` back: weight and factors were never touched."""
    for _, layer in lora_layers(model):
        layer.merged_YX = None


@torch.no_grad()
def merge_lora(model: Qwen2VL, factors: Mapping[str, LoraFactors]) -> None:
    """Add the factors to the weights of `model`, in float32 and rounded once.

    A new tensor takes the place of each weight: the old one may be a file in memory.
    """
    for name, found in factors.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.data = _merged(weight, found)


@torch.no_grad()
def merged_state(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Turn the state of an adapted model into that of the plain one it computes like.

    Works on names alone, so `state` may have been gathered from many processes.

    Args:
        state: the state dict of a model with LoraLinears.
        scales: of each adapted layer, by name.
    """
    plain = {name: t for name, t in state.items() if _owner(name) not in scales}
    for name, found in factors_of(state, scales).items():
        weight_YX = state.get(f"{name}.weight")
        if weight_YX is None:
            shape = torch.Size((len(found.b_YR), found.a_RX.shape[1]))
            weight_YX = dequantize(dict(_below(state, f"{name}.{_NF4}.")), shape)
        plain[f"{name}.weight"] = _merged(weight_YX, found)
        if (bias := state.get(f"{name}.bias")) is not None:
            plain[f"{name}.bias"] = bias
    return plain


def factors_of(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, LoraFactors]:
    """Pick the factors of every adapted layer out of a state dict."""
    return {
        name: LoraFactors(a_RX=state[f"{name}.{_A}"], b_YR=state[f"{name}.{_B}"], scale=scale)
        for name, scale in scales.items()
    }


def _merged(weight_YX: Tensor, found: LoraFactors) -> Tensor:
    a_RX, b_YR = (f.to(weight_YX.device, torch.float32) for f in (found.a_RX, found.b_YR))
    merged_YX = torch.addmm(weight_YX.float(), b_YR, a_RX, alpha=found.scale)
    return merged_YX.to(weight_YX.dtype)


def _owner(name: str) -> str:
    """Name the layer that a tensor of the state belongs to."""
    return name.rpartition(".")[0].removesuffix(f".{_NF4}")


def _below(state: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    yield from ((n.removeprefix(prefix), t) for n, t in state.items() if n.startswith(prefix))


def _check(config: LoraConfig) -> None:
    rules = [
        (config.rank >= 1, f"rank is {config.rank}, must be at least 1"),
        (config.alpha > 0, f"alpha is {config.alpha}, must be above 0"),
        (0 <= config.dropout < 1, f"dropout is {config.dropout}, must be from 0 to below 1"),
    ]
    if broken := [text for holds, text in rules if not holds]:
        raise ConfigError("adapter: " + "; ".join(broken))
