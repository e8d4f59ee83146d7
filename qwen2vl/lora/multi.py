"""Multi-LoRA: several unmerged adapters in one packed batch, each applied to its request's tokens.

Tokens of one packed forward belong to different requests, and these may use different adapters. To
the outputs of an adapter's tokens (x A^T) B^T is added, with the scale folded into B. The wrappers
that add it replace modules only during a forward that has adapted tokens: a forward without any
runs the unchanged modules, at no extra cost. The base layer may be any linear layer:
floating-point, quantized, or a slice of a fused one. This module does not depend on requests: the
engine passes a LoraMapping. Letters: R rank, X and Y inputs and outputs of a linear layer. (vLLM:
LoRAMapping, LoRAModelManager.) loading.py reads adapters, engine/runner.py activates
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.lora.layers import LoraFactors
from qwen2vl.model import Qwen2VL

__all__ = ["LoraAdapter", "LoraManager", "LoraMapping", "ModelPart"]

ModelPart = Literal["visual", "model", "lm_head"]  # Qwen2VL's separately called parts


class LoraDelta(NamedTuple):
    """What is added to the output of one linear layer: x @ a_RX.T @ b_RY."""

    a_RX: Tensor
    b_RY: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraAdapter:
    """An adapter on the model's device; compared by identity, not by content."""

    # By part, then by the layer's official name.
    deltas: Mapping[ModelPart, Mapping[str, LoraDelta]]
    digest: bytes  # of all factors: part of the prefix cache's keys
    vision_digest: bytes  # of the vision tower's factors; empty if it has none

    @classmethod
    def from_factors(cls, factors: Mapping[str, LoraFactors], model: Qwen2VL) -> LoraAdapter:
        """Move factors (of `parse_peft_adapter`) to the device and dtype of `model`."""
        deltas: dict[ModelPart, dict[str, LoraDelta]] = {}
        for name, layer_factors in factors.items():
            part = cast("ModelPart", name.partition(".")[0])
            b_RY = (layer_factors.b_YR.float() * layer_factors.scale).T
            deltas.setdefault(part, {})[name] = LoraDelta(
                layer_factors.a_RX.to(model.device, model.dtype),
                b_RY.to(model.device, model.dtype).contiguous(),
            )
        visual = {name: f for name, f in factors.items() if name.startswith("visual.")}
        return cls(deltas, _digest(factors), _digest(visual) if visual else b"")


# For consecutive tokens (or patches) of a forward: their adapter and their number.
LoraMapping = Sequence[tuple[LoraAdapter | None, int]]


_NO_ADAPTER = nullcontext()


class LoraManager:
    """Activates adapters in one model, for one forward at a time."""

    def __init__(self, model: Qwen2VL) -> None:
        self._model = model
        self._module_slots: dict[str, tuple[dict[str, nn.Module | None], str]] = {}
        self._replaced: list[tuple[str, nn.Module | None]] = []  # name and base layer

    def activate(self, part: ModelPart, mapping: LoraMapping) -> AbstractContextManager[None]:
        """Return a context in which a forward through `part` applies the adapters of `mapping`."""
        if not self._replaced and all(adapter is None for adapter, _ in mapping):
            return _NO_ADAPTER
        return self._activated(part, mapping)

    @contextmanager
    def _activated(self, part: ModelPart, mapping: LoraMapping) -> Iterator[None]:
        self._restore()  # wrappers that an interrupt has left, if any
        try:
            self._install(part, _adapter_spans(mapping), sum(count for _, count in mapping))
            yield
        finally:
            self._restore()

    def _install(self, part: ModelPart, spans: Sequence[_AdapterSpan], total: int) -> None:
        deltas: dict[str, list[tuple[int, int, LoraDelta]]] = {}
        for adapter, start, stop in spans:
            for name, delta in adapter.deltas.get(part, {}).items():
                deltas.setdefault(name, []).append((start, stop, delta))
        for name, layer_deltas in deltas.items():
            modules, leaf = self._modules_and_key(name)
            layer = modules[leaf]
            assert layer is not None
            # Recorded before it is replaced, so that an interrupt in between cannot lose it.
            self._replaced.append((name, layer))
            # Not an nn.Module, but the model only calls it.
            modules[leaf] = cast("nn.Module", _LayerWithLoraDeltas(layer, layer_deltas, total))

    def _restore(self) -> None:
        while self._replaced:
            name, layer = self._replaced[-1]
            modules, leaf = self._modules_and_key(name)
            modules[leaf] = layer
            self._replaced.pop()

    def _modules_and_key(self, name: str) -> tuple[dict[str, nn.Module | None], str]:
        """Return the `_modules` dict and the key of a layer; `setattr` takes ten times as long."""
        if name not in self._module_slots:
            parent, _, leaf = name.rpartition(".")
            self._module_slots[name] = (self._model.get_submodule(parent)._modules, leaf)
        return self._module_slots[name]


class _LayerWithLoraDeltas:
    """A layer with LoRA deltas for spans (start, stop) of the forward's tokens or patches."""

    __slots__ = ("_deltas", "_layer", "_total")

    def __init__(
        self, layer: nn.Module, deltas: Sequence[tuple[int, int, LoraDelta]], total: int
    ) -> None:
        self._layer = layer
        self._deltas = deltas
        self._total = total

    def __call__(self, x_TX: Tensor) -> Tensor:
        y_TY = self._layer(x_TX)
        per_row = self._total // len(x_TX)  # patches a row: 4 in the merger, 1 elsewhere
        for start, stop, delta in self._deltas:
            rows = slice(start // per_row, stop // per_row)
            # In place: the output is new, and no other layer reads these columns of a fused one.
            y_TY[rows].addmm_(F.linear(x_TX[rows], delta.a_RX), delta.b_RY)
        return y_TY


_AdapterSpan = tuple[LoraAdapter, int, int]


def _adapter_spans(mapping: LoraMapping) -> list[_AdapterSpan]:
    """List (adapter, first token, last token + 1); adjacent spans of one adapter are joined."""
    spans: list[_AdapterSpan] = []
    stop = 0
    for adapter, count in mapping:
        start, stop = stop, stop + count
        if adapter is None or not count:
            continue
        if spans and spans[-1][0] is adapter and spans[-1][2] == start:
            start = spans.pop()[1]
        spans.append((adapter, start, stop))
    return spans


def _digest(factors: Mapping[str, LoraFactors]) -> bytes:
    """Hash names, scales and values of all factors."""
    hasher = sha256()
    for name, layer_factors in sorted(factors.items()):
        hasher.update(f"{name} {layer_factors.scale!r}\n".encode())
        for tensor in (layer_factors.a_RX, layer_factors.b_YR):
            hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            hasher.update(flat.numpy().data)
    return hasher.digest()
