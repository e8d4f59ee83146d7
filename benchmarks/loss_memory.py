"""Memory and time of the loss, chunked and plain cross-entropy: peak bytes of logits.

    python benchmarks/loss_memory.py [--tokens 16384] [--width 256] [--dtype float32 | bfloat16]

Every token is a target, which is the worst case, and the vocabulary is the official one. Tensors
as wide as the vocabulary are tracked from allocation to deallocation. The plain form would need
tens of gigabytes, so it runs on the meta device, where tensors have no data. The chunked form runs
on the CPU, and the growth of the process is reported beside the tracked bytes. `small`: forward and
backward at nano's size, both forms alternating. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from record import format_result
from tensor_memory import track_tensor_memory
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta
from qwen2vl.recipes.nano import MODEL
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loss import LossOutput, token_loss

VOCAB_SIZE = 151_936
NANO_SHAPE = (4000, MODEL.text.vocab_size, MODEL.text.hidden_size)  # targets, vocabulary, width
ROUNDS = 40
MB = 1e6

Loss = Callable[[Tensor, Tensor, Batch, float], LossOutput]


def plain_loss(hidden_TD: Tensor, head_VD: Tensor, batch: Batch, divisor: float) -> LossOutput:
    """Compute all logits at once."""
    logits_RV = F.linear(hidden_TD.index_select(0, batch.target_index_R), head_VD).float()
    losses_R = F.cross_entropy(logits_RV, batch.targets_R, reduction="none")
    loss = (losses_R * batch.weights_R).sum() / divisor
    with torch.no_grad():
        is_correct_R = logits_RV.argmax(1) == batch.targets_R
    return LossOutput(loss, losses_R.detach(), is_correct_R)


def batch_of_targets(tokens: int, vocab_size: int) -> Batch:
    """Return a batch whose tokens are all targets."""
    ids_T = torch.randint(0, vocab_size, (tokens,))
    return Batch(
        input_ids_T=ids_T,
        position_ids_3T=torch.arange(tokens).expand(3, -1),
        meta=AttnMeta.build([tokens]),
        patches_NP=None,
        vision_meta=None,
        placeholder_index_M=None,
        target_index_R=torch.arange(tokens),
        targets_R=ids_T,
        weights_R=torch.ones(tokens),
        example_index_R=torch.zeros(tokens, dtype=torch.int64),
        families=("all",),
    )


def peak_logit_bytes(loss: Loss, batch: Batch, width: int, dtype: torch.dtype, device: str) -> int:
    """Run forward and backward; return the peak bytes of logits."""
    hidden_TD = torch.randn(len(batch.input_ids_T), width, device=device, dtype=dtype)
    head_VD = torch.randn(VOCAB_SIZE, width, device=device, dtype=dtype)
    with track_tensor_memory(last_axis=VOCAB_SIZE) as tracker:
        loss(hidden_TD.requires_grad_(), head_VD.requires_grad_(), batch, 1.0).loss.backward()
    return tracker.peak_bytes


def measure_memory(tokens: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Compare the peak bytes, and measure the growth of the process."""
    batch = batch_of_targets(tokens, VOCAB_SIZE)
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    chunked = peak_logit_bytes(token_loss, batch, width, dtype, "cpu")
    seconds = time.perf_counter() - start
    process_growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before) * 1024
    plain = peak_logit_bytes(plain_loss, batch.to("meta"), width, dtype, "meta")
    return {
        "plain_mb": round(plain / MB),
        "chunked_mb": round(chunked / MB),
        "share_percent": round(100 * chunked / plain, 2),
        "process_grew_mb": round(process_growth / MB),
        "seconds": round(seconds, 1),
    }


def time_nano_loss(dtype: torch.dtype) -> dict[str, float]:
    """Time forward and backward of the loss at nano's size, both forms alternating."""
    tokens, vocab_size, width = NANO_SHAPE
    batch = batch_of_targets(tokens, vocab_size)
    hidden_TD = torch.randn(tokens, width, requires_grad=True)
    head_VD = (0.05 * torch.randn(vocab_size, width)).requires_grad_()
    times: dict[str, list[float]] = {"plain": [], "chunked": []}
    for _ in range(ROUNDS):
        for name, loss in (("plain", plain_loss), ("chunked", token_loss)):
            hidden_TD.grad = head_VD.grad = None
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = loss(hidden_TD, head_VD, batch, float(tokens))
            output.loss.backward()
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
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    numbers: dict[str, Any] = {
        "logits": measure_memory(args.tokens, args.width, dtype),
        "small": time_nano_loss(dtype),
    }
    print(format_result(numbers))


if __name__ == "__main__":
    main()
