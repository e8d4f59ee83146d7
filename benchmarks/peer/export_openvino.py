"""optimum-cli for a torchvision without operators: python export_openvino.py export openvino ...

optimum-intel requires torchvision, whose wheels have CUDA operators only; without CUDA they do not
load, and importing torchvision fails at undeclared operators. The export calls none of them.
"""

from __future__ import annotations

import torch

declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from optimum.commands.optimum_cli import main  # noqa: E402 - after the declarations

if __name__ == "__main__":
    main()
