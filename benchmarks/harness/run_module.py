"""Run a module where torchvision was built for another build of torch: `run_module.py MODULE ...`.

torchvision's wheels on PyPI hold operators compiled for CUDA. With a CPU build of torch they do not
load, and the import fails at the first description of one. Declaring the two operators that are
described unconditionally lets it pass; calling them fails. Harnesses that ask a server do not.
"""

from __future__ import annotations

import runpy
import sys

import torch

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def main() -> None:
    """Declare the operators unless they are there, then run the module."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        sys.modules.pop("torchvision", None)
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", SIGNATURE)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
