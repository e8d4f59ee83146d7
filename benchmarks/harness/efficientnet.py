"""EfficientNet-Lite0, an image classifier of 4.65 M parameters trained on ImageNet, in PyTorch.

The weights are the dataset efficientnet-lite0 of `qwen2vl fetch-data`. The network is that of
EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946) without squeeze-and-excitation, and with ReLU6
in place of SiLU. Convolutions are padded as in TensorFlow ("SAME"), where the weights were trained:
with a stride of 2, an even size gets one pixel more at its end than at its start.

    model = load_efficientnet()
    features_BD = model.features(preprocess(images))     D = 1,280
    logits_BK = model(preprocess(images))                K = 1,000, the classes of ImageNet
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from qwen2vl.fetch import dataset_folder

__all__ = [
    "FEATURES",
    "SIDE",
    "EfficientNetLite0",
    "load_efficientnet",
    "preprocess",
]

DATASET = "efficientnet-lite0"
FILE = "efficientnet-lite0-57934424.pth"
SIDE = 224  # pixels of the input that it was trained with
FEATURES = 1280
CLASSES = 1000
MEAN, STD = 127.0, 128.0  # of uint8 values
STEM = 32
EPS = 1e-3

# Repeats, kernel size, stride of the first, expansion, channels. (Table 1 of the paper.)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) pixels a side."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Pad, and convolve (B, C, H, W)."""
        height, width = input.shape[-2:]
        kernel, stride = self.kernel_size[0], self.stride[0]
        (top, bottom), (left, right) = (_padding(n, kernel, stride) for n in (height, width))
        return super().forward(F.pad(input, (left, right, top, bottom)))


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(
        self, in_channels: int, channels: int, *, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.is_expanded = expansion != 1
        self.has_residual = stride == 1 and in_channels == channels
        if self.is_expanded:
            self.expand_conv = SameConv2d(in_channels, inner, 1)
            self.bn0 = nn.BatchNorm2d(inner, eps=EPS)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.bn1 = nn.BatchNorm2d(inner, eps=EPS)
        self.project_conv = SameConv2d(inner, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, ceil(H / stride), ceil(W / stride))."""
        y = F.relu6(self.bn0(self.expand_conv(x_BCHW))) if self.is_expanded else x_BCHW
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x_BCHW + y if self.has_residual else y


class EfficientNetLite0(nn.Module):
    """The classifier; attributes are those of the file of weights, without leading underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STEM, 3, 2)
        self.bn0 = nn.BatchNorm2d(STEM, eps=EPS)
        blocks: list[Block] = []
        channels = STEM
        for repeats, kernel, stride, expansion, out in STAGES:
            for index in range(repeats):
                own_stride = stride if index == 0 else 1
                blocks.append(
                    Block(channels, out, kernel=kernel, stride=own_stride, expansion=expansion)
                )
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConv2d(channels, FEATURES, 1)
        self.bn1 = nn.BatchNorm2d(FEATURES, eps=EPS)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features (B, 1280) of images (B, 3, H, W)."""
        y = F.relu6(self.bn0(self.conv_stem(x_BCHW)))
        for block in self.blocks:
            y = block(y)
        return F.relu6(self.bn1(self.conv_head(y))).mean((2, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, 1000) of images (B, 3, H, W)."""
        return self.fc(self.features(x_BCHW))


def load_efficientnet(folder: Path | None = None) -> EfficientNetLite0:
    """Load the classifier, in evaluation mode.

    Args:
        folder: of the file of weights; None: that of the dataset.

    Raises:
        DatasetNotFoundError: the dataset is not on this machine; the text has the command.
        RuntimeError: the file has other tensors.
    """
    path = (folder or dataset_folder(DATASET)) / FILE
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict({re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()})
    return model.eval()


def preprocess(images: Sequence[NDArray[np.uint8]], side: int = SIDE) -> Tensor:
    """Resize images (H, W, 3) to `side` pixels a side and normalize them: (B, 3, side, side)."""
    resized = [
        np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
        for image in images
    ]
    pixels_BHWC = torch.from_numpy(np.stack(resized)).to(torch.float32)
    return ((pixels_BHWC - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the pixels to pad before and after one side of an image."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
