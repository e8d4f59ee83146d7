"""Attention of training in bfloat16 on a CPU: forward and backward against SDPA in float32.

    python benchmarks/attention_backward.py [--rounds 9] [--threads 2]

Both sides alternate on the segments of a batch of small pictures, of several large ones, and of one
of 900 pixels, 64 channels a head. Prints milliseconds (medians), and the ratio with its quartiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from record import format_result
from torch.nn import functional as F

from qwen2vl.model.flash_attention_cpu import enable_flash_attention_cpu, flash_attention_cpu

# (segments, heads, patches)
SHAPES = ((48, 4, 152), (8, 4, 1024), (1, 4, 4096))
HEAD_DIM = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    enable_flash_attention_cpu()
    print(format_result({str(shape): compare(shape, args.rounds) for shape in SHAPES}))


def compare(shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Alternate both implementations on one shape."""
    size = (*shape, HEAD_DIM)
    qkv = [torch.randn(size).bfloat16().requires_grad_() for _ in range(3)]
    d_out = torch.randn(size).bfloat16()

    def float32() -> torch.Tensor:
        q, k, v = (tensor.float() for tensor in qkv)
        return F.scaled_dot_product_attention(q, k, v).bfloat16()

    def bfloat16() -> torch.Tensor:
        return flash_attention_cpu(qkv[0], qkv[1], qkv[2])

    times: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    sides: dict[str, Callable[[], torch.Tensor]] = {"float32": float32, "bfloat16": bfloat16}
    for index in range(rounds + 2):
        for name in sorted(sides, reverse=bool(index % 2)):
            start = time.perf_counter()
            torch.autograd.grad(sides[name](), qkv, d_out)
            if index > 1:  # the first rounds compile
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(times["float32"], times["bfloat16"], strict=True)]
    return {
        **{f"{name}_ms": round(median(values), 1) for name, values in times.items()},
        "ratio": round(median(ratios), 2),
        "quartiles": [round(quantiles(ratios, n=4)[index], 2) for index in (0, 2)],
    }


if __name__ == "__main__":
    main()
