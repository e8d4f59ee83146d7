"""Muon optimizer: momentum orthogonalized by Newton-Schulz iterations, also for sharded matrices.

Computes what torch.optim.Muon computes, bit for bit where the device has bfloat16, with two
additions: a step can be skipped without a host sync, and each rank may hold some rows of a sharded
matrix. Momentum is elementwise and stays sharded; the quintic Newton-Schulz iteration needs the
full matrix, which is gathered on one rank of the group. (kellerjordan.github.io/posts/muon; arXiv
2502.16982 for the scale by which Muon shares AdamW's learning rate.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from qwen2vl.memory import matmul_dtype
from qwen2vl.parallel.all_to_all import apply_to_full_matrices

__all__ = ["Muon", "orthogonalize"]

QUINTIC = (3.4445, -4.7750, 2.0315)  # maximal slope at zero; singular values end in 0.7 .. 1.2
NUM_ITERATIONS = 5
EPS = 1e-7  # smallest norm that is divided by
UPDATE_RMS = 0.2  # root mean square of AdamW's usual update


class Muon(torch.optim.Optimizer):
    """Muon for matrices, whole or sharded by rows."""

    found_inf: Tensor | None = None  # 1: skip the step; set before each step, as by GradScaler

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        group: dist.ProcessGroup | None = None,
        num_rows: Mapping[Tensor, int] | None = None,
    ) -> None:
        """Set up parameter groups of matrices; with `group`, shards of `num_rows` rows in all."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.group = group
        self.num_rows = num_rows or {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override] - never a loss
        """Update every matrix that has a gradient."""
        assert closure is None, "a closure has no place here"
        for param_group in self.param_groups:
            trainable = [
                parameter for parameter in param_group["params"] if parameter.grad is not None
            ]
            if self.group is None:
                for parameter in trainable:
                    update = self._nesterov_update(parameter, param_group["momentum"])
                    self._apply_update(parameter, orthogonalize(update), param_group)
            else:
                # Cast before the transfer: the iteration computes in bfloat16.
                updates = [
                    self._nesterov_update(parameter, param_group["momentum"]).bfloat16()
                    for parameter in trainable
                ]
                num_rows = [self.num_rows[parameter] for parameter in trainable]
                orthogonalized = apply_to_full_matrices(
                    updates, num_rows, orthogonalize, self.group
                )
                for parameter, update in zip(trainable, orthogonalized, strict=True):
                    self._apply_update(parameter, update, param_group)

    def _nesterov_update(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the momentum by the gradient; return the Nesterov update."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        self._write_unless_skipped(buffer, buffer.lerp(gradient, 1 - momentum))
        return gradient.lerp(buffer, momentum)

    def _apply_update(self, parameter: Tensor, update: Tensor, param_group: dict[str, Any]) -> None:
        num_rows = self.num_rows.get(parameter, parameter.shape[0])
        scale = UPDATE_RMS * math.sqrt(max(num_rows, parameter.shape[1]))
        updated = parameter * (1 - param_group["lr"] * param_group["weight_decay"])
        updated.add_(update, alpha=-param_group["lr"] * scale)
        self._write_unless_skipped(parameter, updated)

    def _write_unless_skipped(self, old: Tensor, new: Tensor) -> None:
        """Store `new` unless the step is skipped; multiplying by 0 would keep NaNs."""
        if self.found_inf is not None:
            new = torch.where(self.found_inf > 0, old, new)
        old.copy_(new)


def orthogonalize(matrix_RC: Tensor) -> Tensor:
    """Set all singular values to about 1 (torch.optim.Muon's Newton-Schulz); returns bfloat16.

    It computes in bfloat16, as torch does, but in float32 where the device lacks bfloat16: a step
    would take minutes there.
    """
    a, b, c = QUINTIC
    is_tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.to(torch.bfloat16, copy=True).to(matmul_dtype("auto", matrix_RC.device))
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(torch.bfloat16)
    return x.T if is_tall else x
