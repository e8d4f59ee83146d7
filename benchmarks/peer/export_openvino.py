"""optimum-cli, where torchvision has no operators: python export_openvino.py export openvino ...

optimum-intel asks for torchvision, whose wheels bring operators for CUDA alone; without CUDA they
do not load, and importing it ends at operators that nobody has declared. Exporting calls none.
"""

from __future__ import annotations

import torch

declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from optimum.commands.optimum_cli import main  # noqa: E402 - after the declarations

if __name__ == "__main__":
    main()
