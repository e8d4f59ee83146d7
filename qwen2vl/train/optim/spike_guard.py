"""Judges every step on the device: a spike moves nothing, and what is not finite ends the run.

A loss or gradient norm far above those of the last steps comes from bad data or a bad draw more
often than it teaches; such a step is skipped. It still enters the history, so a level that stays
is accepted after a few steps. The host never waits: a loss that is not finite stops all weights on
the device at once, and is told when somebody asks, at the next report or checkpoint.
(OLMo 2, arXiv 2501.00656, sec. 3.) Next room: checkpoint.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2vl.errors import EngineError

__all__ = ["WINDOW", "Guard"]

WINDOW = 128  # steps that a spike is measured against; judged from half of it on


class Guard:
    """The losses and norms of the last steps, and what was wrong with them."""

    def __init__(self, sigmas: float, device: torch.device | str) -> None:
        self.sigmas = sigmas
        self.seen = 0
        self.history_2W = torch.zeros(2, WINDOW, device=device)
        self.num_skipped = torch.zeros((), device=device)
        self.broken_3 = torch.zeros(3, device=device)  # step, loss and norm where it broke

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Say on the device whether step `step`, counted from 1, is to be skipped: 0 or 1."""
        pair_2 = torch.stack((loss.detach(), norm.detach())).to(self.history_2W.dtype)
        skip = self._is_spike(pair_2)
        first = (self.broken_3[0] == 0) & ~pair_2.isfinite().all()
        found_3 = torch.cat((torch.full_like(pair_2[:1], step), pair_2))
        self.broken_3.copy_(torch.where(first, found_3, self.broken_3))
        skip = skip | (self.broken_3[0] > 0)
        self.num_skipped += skip
        self.history_2W[:, self.seen % WINDOW] = pair_2
        self.seen += 1
        return skip.to(self.history_2W.dtype)

    def check(self) -> None:
        """Wait for the device, and say if a step broke.

        Raises:
            EngineError: a loss or norm was not finite; no weight has changed since.
        """
        step, loss, norm = self.broken_3.tolist()
        if step:
            raise EngineError(
                f"step {step:.0f}: loss {loss}, gradient norm {norm}; start again to go on from "
                "the last checkpoint, or begin another run with a lower optim.lr and out=FOLDER"
            )

    def take_skipped(self) -> int:
        """Count the steps skipped since the last call; waits for the device."""
        count = int(self.num_skipped.item())
        self.num_skipped.zero_()
        return count

    def state(self) -> dict[str, Tensor]:
        """Name what a checkpoint needs to judge the next step as this guard would."""
        return {"guard|history": self.history_2W, "guard|seen": torch.tensor(self.seen)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.history_2W.copy_(tensors["guard|history"])
        self.seen = int(tensors["guard|seen"].item())

    def _is_spike(self, pair_2: Tensor) -> Tensor:
        if not self.sigmas or self.seen < WINDOW // 2:
            return torch.zeros((), dtype=torch.bool, device=pair_2.device)
        past = self.history_2W[:, : min(self.seen, WINDOW)]
        return (pair_2 > past.mean(1) + self.sigmas * past.std(1)).any()
