"""Spike guard: steps with a loss or gradient-norm spike are skipped; a non-finite one ends the run.

A loss or gradient norm far above those of the last steps is more often due to bad data or an
unlucky batch than useful; such a step is skipped. It still enters the history, so that a level that
persists is accepted after a few steps. There is no host sync: after a non-finite loss all further
updates are skipped on the device, and the error is raised at the next report or checkpoint.
(OLMo 2, arXiv 2501.00656, sec. 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2vl.errors import EngineError

__all__ = ["WINDOW", "SpikeGuard"]

WINDOW = 128  # steps that a spike is compared with; the first half of them is never skipped


class SpikeGuard:
    """Losses and norms of the last steps, the number of skipped steps, the first bad step."""

    def __init__(self, sigmas: float, device: torch.device | str) -> None:
        self.sigmas = sigmas
        self.num_seen = 0
        self.history_2W = torch.zeros(2, WINDOW, device=device)
        self.num_skipped = torch.zeros((), device=device)
        self.first_bad_3 = torch.zeros(3, device=device)  # step, loss, norm of the non-finite one

    def should_skip(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Return on the device whether to skip `step`, counted from 1: 0 or 1."""
        pair_2 = torch.stack((loss.detach(), norm.detach())).to(self.history_2W.dtype)
        skip = self._is_spike(pair_2)
        is_first = (self.first_bad_3[0] == 0) & ~pair_2.isfinite().all()
        record_3 = torch.cat((torch.full_like(pair_2[:1], step), pair_2))
        self.first_bad_3.copy_(torch.where(is_first, record_3, self.first_bad_3))
        skip = skip | (self.first_bad_3[0] > 0)
        self.num_skipped += skip
        self.history_2W[:, self.num_seen % WINDOW] = pair_2
        self.num_seen += 1
        return skip.to(self.history_2W.dtype)

    def raise_if_not_finite(self) -> None:
        """Wait for the device, and raise if a step was not finite.

        Raises:
            EngineError: a loss or norm was not finite; no weight has changed since.
        """
        step, loss, norm = self.first_bad_3.tolist()
        if step:
            raise EngineError(
                f"step {step:.0f}: loss {loss}, gradient norm {norm}; start again to resume from "
                "the last checkpoint, or begin another run with a lower optim.lr and "
                "output_dir=FOLDER"
            )

    def pop_num_skipped(self) -> int:
        """Return the number of steps skipped since the last call; waits for the device."""
        num_skipped = int(self.num_skipped.item())
        self.num_skipped.zero_()
        return num_skipped

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs to restore this guard."""
        return {"guard|history": self.history_2W, "guard|seen": torch.tensor(self.num_seen)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore from `state_dict`."""
        self.history_2W.copy_(tensors["guard|history"])
        self.num_seen = int(tensors["guard|seen"].item())

    def _is_spike(self, pair_2: Tensor) -> Tensor:
        if not self.sigmas or self.num_seen < WINDOW // 2:
            return torch.zeros((), dtype=torch.bool, device=pair_2.device)
        past = self.history_2W[:, : min(self.num_seen, WINDOW)]
        return (pair_2 > past.mean(1) + self.sigmas * past.std(1)).any()
