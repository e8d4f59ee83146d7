"""Muon: matrices move along their momentum with all singular values made alike.

What torch.optim.Muon computes, to the bit, and two things more: a step can be skipped on the
device, and of a sharded matrix each rank holds some rows. Momentum is elementwise and stays in
parts; the quintic Newton-Schulz iteration needs the whole matrix, on one rank of each group.
(kellerjordan.github.io/posts/muon; arXiv 2502.16982 for the scale that lets it share AdamW's rate.)
Next room: parallel/all_to_all.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qwen2vl.parallel.all_to_all import on_whole

__all__ = ["Muon", "orthogonalize"]

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; singular values end in 0.7 .. 1.2
ITERATIONS = 5
SMALLEST_NORM = 1e-7
SCALE = 0.2  # root mean square of AdamW's usual update


class Muon(torch.optim.Optimizer):
    """Steps matrices, whole or this rank's rows of them."""

    found_inf: Tensor | None = None  # 1: change nothing; set before each step

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        group: dist.ProcessGroup | None = None,
        rows: Mapping[Tensor, int] | None = None,
    ) -> None:
        """Take groups of matrices; with `group`, of `rows` rows on all its ranks together."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.group = group
        self.rows = rows or {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] - never a loss
        """Move every matrix that has a gradient."""
        assert closure is None, "a closure has no place here"
        for settings in self.param_groups:
            moving = [p for p in settings["params"] if p.grad is not None]
            if self.group is None:
                for parameter in moving:
                    push = self._push(parameter, settings["momentum"])
                    self._move(parameter, orthogonalize(push), settings)
            else:
                # Rounded before they travel: the iteration begins with it anyway.
                pushes = [self._push(p, settings["momentum"]).bfloat16() for p in moving]
                rows = [self.rows[p] for p in moving]
                turned = on_whole(pushes, rows, orthogonalize, self.group)
                for parameter, direction in zip(moving, turned, strict=True):
                    self._move(parameter, direction, settings)

    def _push(self, parameter: Tensor, momentum: float) -> Tensor:
        """Let the momentum take in the gradient; return where it points, one step ahead."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        self._put(buffer, buffer.lerp(gradient, 1 - momentum))
        return gradient.lerp(buffer, momentum)

    def _move(self, parameter: Tensor, direction: Tensor, settings: dict[str, Any]) -> None:
        num_rows = self.rows.get(parameter, parameter.shape[0])
        scale = SCALE * math.sqrt(max(num_rows, parameter.shape[1]))
        moved = parameter * (1 - settings["lr"] * settings["weight_decay"])
        moved.add_(direction, alpha=-settings["lr"] * scale)
        self._put(parameter, moved)

    def _put(self, old: Tensor, new: Tensor) -> None:
        """Store `new` unless the step is skipped; 0 times a NaN would be none the better."""
        if self.found_inf is not None:
            new = torch.where(self.found_inf > 0, old, new)
        old.copy_(new)


def orthogonalize(matrix_RC: Tensor) -> Tensor:
    """Make all singular values about 1, in bfloat16. (torch: Muon's Newton-Schulz iteration)."""
    a, b, c = QUINTIC
    is_tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.to(torch.bfloat16, copy=True)
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=SMALLEST_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
