"""What the logits of one loss take, chunked and plain: bytes at the peak, and time.

    python benchmarks/loss_memory.py [--tokens 16384] [--width 256] [--dtype float32 | bfloat16]

Every token is a target, which is the worst case, and the vocabulary is the official one. Tensors
as wide as the vocabulary are followed from their making to their end. The plain form would need
tens of gigabytes: it runs on the meta device, where every tensor is made and none is filled. The
chunked form runs for real, and the growth of the process stands beside what was counted.
`small`: forward and backward at nano's size, both by turns. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from live import live_bytes
from record import line
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta
from qwen2vl.recipes.nano import MODEL
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loss import Outcome, token_loss

WORDS = 151_936
SMALL = (4000, MODEL.text.vocab_size, MODEL.text.hidden_size)  # targets, words, width
ROUNDS = 40
MB = 1e6

Loss = Callable[[Tensor, Tensor, Batch, float], Outcome]


def plain_loss(hidden_TD: Tensor, head_VD: Tensor, batch: Batch, divisor: float) -> Outcome:
    """Compute all logits at once, as one writes it down first."""
    logits_RV = F.linear(hidden_TD.index_select(0, batch.target_index_R), head_VD).float()
    losses_R = F.cross_entropy(logits_RV, batch.targets_R, reduction="none")
    loss = (losses_R * batch.weights_R).sum() / divisor
    with torch.no_grad():
        right_R = logits_RV.argmax(1) == batch.targets_R
    return Outcome(loss, losses_R.detach(), right_R)


def every_token(tokens: int, words: int) -> Batch:
    """Make a batch whose tokens are all targets."""
    ids_T = torch.randint(0, words, (tokens,))
    return Batch(
        input_ids_T=ids_T,
        position_ids_3T=torch.arange(tokens).expand(3, -1),
        meta=AttnMeta.build([tokens]),
        patches_NP=None,
        vision_meta=None,
        pad_index_M=None,
        target_index_R=torch.arange(tokens),
        targets_R=ids_T,
        weights_R=torch.ones(tokens),
        owner_R=torch.zeros(tokens, dtype=torch.int64),
        families=("all",),
    )


def counted(loss: Loss, batch: Batch, width: int, dtype: torch.dtype, device: str) -> int:
    """Run forward and backward; give the most bytes of logits that lived at once."""
    hidden_TD = torch.randn(len(batch.input_ids_T), width, device=device, dtype=dtype)
    head_VD = torch.randn(WORDS, width, device=device, dtype=dtype)
    with live_bytes(last_axis=WORDS) as watch:
        loss(hidden_TD.requires_grad_(), head_VD.requires_grad_(), batch, 1.0).loss.backward()
    return watch.peak


def memory(tokens: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Compare the peaks, and look at the process."""
    batch = every_token(tokens, WORDS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    chunked = counted(token_loss, batch, width, dtype, "cpu")
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    plain = counted(plain_loss, batch.to("meta"), width, dtype, "meta")
    return {
        "plain_mb": round(plain / MB),
        "chunked_mb": round(chunked / MB),
        "share_percent": round(100 * chunked / plain, 2),
        "process_grew_mb": round(grown / MB),
        "seconds": round(seconds, 1),
    }


def small(dtype: torch.dtype) -> dict[str, float]:
    """Time nano's loss, forward and backward, both forms by turns."""
    tokens, words, width = SMALL
    batch = every_token(tokens, words)
    hidden_TD = torch.randn(tokens, width, requires_grad=True)
    head_VD = (0.05 * torch.randn(words, width)).requires_grad_()
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(ROUNDS):
        for name, loss in (("plain", plain_loss), ("chunked", token_loss)):
            hidden_TD.grad = head_VD.grad = None
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                outcome = loss(hidden_TD, head_VD, batch, float(tokens))
            outcome.loss.backward()
            times[name].append(time.perf_counter() - start)
    ratios = [c / p for c, p in zip(times["chunked"], times["plain"], strict=True)]
    return {
        "plain_ms": round(1000 * median(times["plain"]), 2),
        "chunked_ms": round(1000 * median(times["chunked"]), 2),
        "ratio": round(median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    numbers: dict[str, Any] = {
        "logits": memory(given.tokens, given.width, dtype),
        "small": small(dtype),
    }
    print(line(numbers))


if __name__ == "__main__":
    main()
