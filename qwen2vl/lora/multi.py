"""Adapters that stay unmerged: several at once, each for the rows that ask for it.

Rows of one packed forward belong to different requests, and those to different adapters: the rows
of an adapter gain (x A^T) B^T, with its scale inside B. Nothing is installed in the model. Only
while somebody's rows ask for it, the layers that an adapter changes lend their places to layers
that add the gain; a forward in which nobody does runs the very modules that it would run if no
adapter had been read, and so costs the same. What lies beneath may be any linear layer: of floats,
of small integers, or a share of a joined one. It must not know requests. Letters as in lora.py: R
rank, X and Y inputs and outputs. Back up: load.py reads adapters, engine/runner.py says whose rows.
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

__all__ = ["Adapter", "AdapterSwitch", "Owners", "Room"]

Room = Literal["visual", "model", "lm_head"]  # the parts of Qwen2VL that are run one by one


class Gain(NamedTuple):
    """What one linear layer gains: x @ a_RX.T @ b_RY."""

    a_RX: Tensor
    b_RY: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter, ready to compute with; two are the same only if they are one."""

    gains: Mapping[Room, Mapping[str, Gain]]  # by room, then by the layer's official name
    digest: bytes  # of all it adds: keys and values computed with it are no other's
    vision_digest: bytes  # of what it adds to the tower; empty where that stays as it is

    @classmethod
    def of(cls, factors: Mapping[str, LoraFactors], model: Qwen2VL) -> Adapter:
        """Bring what `read_lora` has understood to the device and dtype of `model`."""
        gains: dict[Room, dict[str, Gain]] = {}
        for name, found in factors.items():
            room = cast("Room", name.partition(".")[0])
            b_RY = (found.b_YR.float() * found.scale).T
            gains.setdefault(room, {})[name] = Gain(
                found.a_RX.to(model.device, model.dtype),
                b_RY.to(model.device, model.dtype).contiguous(),
            )
        seen = {name: found for name, found in factors.items() if name.startswith("visual.")}
        return cls(gains, _digest(factors), _digest(seen) if seen else b"")


Owners = Sequence[tuple[Adapter | None, int]]  # whose the rows are, and how many, end to end


_AS_IT_IS = nullcontext()


class AdapterSwitch:
    """Puts adapters to work in one model, for one forward at a time."""

    def __init__(self, model: Qwen2VL) -> None:
        self._model = model
        self._places: dict[str, tuple[dict[str, nn.Module | None], str]] = {}
        self._lent: list[tuple[str, nn.Module | None]] = []  # names, and whose place it is

    def at_work(self, room: Room, owners: Owners) -> AbstractContextManager[None]:
        """Let the rows of a forward through `room` gain what their owners' adapters add."""
        if not self._lent and all(adapter is None for adapter, _ in owners):
            return _AS_IT_IS
        return self._adapted(room, owners)

    @contextmanager
    def _adapted(self, room: Room, owners: Owners) -> Iterator[None]:
        self._take_back()  # what an interrupt has left, if one came
        try:
            self._lend(room, _runs(owners), sum(count for _, count in owners))
            yield
        finally:
            self._take_back()

    def _lend(self, room: Room, runs: Sequence[_Run], total: int) -> None:
        parts: dict[str, list[tuple[int, int, Gain]]] = {}
        for adapter, start, stop in runs:
            for name, gain in adapter.gains.get(room, {}).items():
                parts.setdefault(name, []).append((start, stop, gain))
        for name, gained in parts.items():
            modules, leaf = self._place(name)
            layer = modules[leaf]
            assert layer is not None
            self._lent.append((name, layer))  # first: what is not noted is not given back
            # The model only ever calls it, as every module.
            modules[leaf] = cast("nn.Module", _Gaining(layer, gained, total))

    def _take_back(self) -> None:
        while self._lent:
            name, layer = self._lent[-1]
            modules, leaf = self._place(name)
            modules[leaf] = layer
            self._lent.pop()

    def _place(self, name: str) -> tuple[dict[str, nn.Module | None], str]:
        """Find where a layer's parent holds it: by `setattr` it would take ten times as long."""
        if name not in self._places:
            parent, _, leaf = name.rpartition(".")
            self._places[name] = (self._model.get_submodule(parent)._modules, leaf)
        return self._places[name]


class _Gaining:
    """A layer whose rows gain: from start to stop, in rows of the whole forward."""

    __slots__ = ("_gained", "_layer", "_total")

    def __init__(
        self, layer: nn.Module, gained: Sequence[tuple[int, int, Gain]], total: int
    ) -> None:
        self._layer = layer
        self._gained = gained
        self._total = total

    def __call__(self, x_TX: Tensor) -> Tensor:
        y_TY = self._layer(x_TX)
        merged = self._total // len(x_TX)  # patches to a row: 4 in the merger, 1 elsewhere
        for start, stop, gain in self._gained:
            rows = slice(start // merged, stop // merged)
            # In place: the output is new, and of a joined layer these columns are nobody else's.
            y_TY[rows].addmm_(F.linear(x_TX[rows], gain.a_RX), gain.b_RY)
        return y_TY


_Run = tuple[Adapter, int, int]


def _runs(owners: Owners) -> list[_Run]:
    """List (adapter, first row, last row + 1), neighbors of one adapter together."""
    runs: list[_Run] = []
    stop = 0
    for adapter, count in owners:
        start, stop = stop, stop + count
        if adapter is None or not count:
            continue
        if runs and runs[-1][0] is adapter and runs[-1][2] == start:
            start = runs.pop()[1]
        runs.append((adapter, start, stop))
    return runs


def _digest(factors: Mapping[str, LoraFactors]) -> bytes:
    """Hash every number, under the name of its layer."""
    hasher = sha256()
    for name, found in sorted(factors.items()):
        hasher.update(f"{name} {found.scale!r}\n".encode())
        for tensor in (found.a_RX, found.b_YR):
            hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            hasher.update(flat.numpy().data)
    return hasher.digest()
