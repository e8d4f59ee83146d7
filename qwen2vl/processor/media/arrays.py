"""Pixel arrays: numpy arrays and torch tensors -> channels last, 8-bit values.

The channels are found by the shape alone, and a shape that can be read in two ways is rejected. Of
the first and the last axis of an image (of a frame, in an array of frames):

    one has 3 or 4 elements     it is the channels: RGB or RGBA
    both have 3 or 4            rejected: (3, 224, 3) is 3 rows, or 3 columns
    else, one has 1 element     it is the channel of a gray image
    else, both have 1           rejected, except (1, 1, 1)

So PIL's and OpenCV's (height, width, 3) and torchvision's (3, height, width) are both read.
(HF: infer_channel_dimension_format.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qwen2vl.errors import InputError
from qwen2vl.processor.image_formats.samples import float_white

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["frames_channels_last", "image_channels_last", "tensor_to_array", "to_uint8"]

_COLORS = (3, 4)  # number of channels of RGB and RGBA
_DARK = 1 << 14  # no 16-bit value reaches it: probably 10, 12 or 14 bit, as of medical images


def tensor_to_array(tensor: Tensor, name: str) -> np.ndarray:
    """Copy a tensor of any device to a numpy array; on the CPU they share their memory.

    bfloat16 and float8, which numpy lacks, become float32.

    Raises:
        InputError: the tensor is sparse, quantized or on the meta device.
    """
    # Not at the top: workers that decode media (media_worker) start without torch.
    import torch

    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        raise InputError(
            f"{name}: a tensor on device {tensor.device} with layout {tensor.layout} and dtype "
            f"{tensor.dtype} has no plain pixels; give a dense uint8 tensor"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype not in (
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


def image_channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """Return a view (height, width, channels), or the (height, width) of a gray image.

    Raises:
        InputError: the shape is not that of an image, or can be read in two ways.
    """
    if array.ndim == 4:
        raise InputError(
            f"{name}: array of shape {array.shape} is not an image but a video; give it as video, "
            "not image, or one frame of it: array[0]"
        )
    if array.ndim not in (2, 3):
        raise InputError(_wrong_shape(array.shape, name))
    if 0 in array.shape:
        raise InputError(f"{name}: array of shape {array.shape} has no pixels; give at least 1 x 1")
    if array.ndim == 3 and _channel_axis(array.shape, name) == 0:
        return array.transpose(1, 2, 0)
    return array


def frames_channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """Return a view (frames, height, width, channels).

    Raises:
        InputError: the shape is not that of a video, or can be read in two ways.
    """
    wanted = "(frames, height, width, 3) or (frames, 3, height, width)"
    if array.ndim in (2, 3) and (array.ndim == 2 or {array.shape[0], array.shape[2]} & {1, 3, 4}):
        raise InputError(
            f"{name}: array of shape {array.shape} is an image; give it as image, not video, or "
            f"give {wanted}"
        )
    if array.ndim != 4:
        raise InputError(f"{name}: array of shape {array.shape} is not a video; give {wanted}")
    if len(array) == 0:
        raise InputError(f"{name}: array of shape {array.shape} has no frames; give at least one")
    if 0 in array.shape:
        raise InputError(f"{name}: array of shape {array.shape} has no pixels; give at least 1 x 1")
    return array.transpose(0, 2, 3, 1) if _channel_axis(array.shape[1:], name) == 0 else array


def _channel_axis(shape: tuple[int, ...], name: str) -> int:
    """Return which of three axes is the channels, 0 or 2, as the module says."""
    first, middle, last = shape
    if (first in _COLORS and last in _COLORS) or (first == last == 1 and middle > 1):
        raise InputError(
            f"{name}: array of shape {shape} could have its channels first or last; give a PIL "
            "image, made by Image.fromarray from (height, width, channels), in place of it"
        )
    for count in (_COLORS, (1,)):
        if last in count:
            return 2
        if first in count:
            return 0
    raise InputError(_wrong_shape(shape, name))


def _wrong_shape(shape: tuple[int, ...], name: str) -> str:
    return (
        f"{name}: array of shape {shape} is not an image; give (height, width, 3) RGB, "
        "(height, width, 4) RGBA, the same with channels first, or (height, width) gray"
    )


def to_uint8(values: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Scale bool, 16 to 64-bit and float values to uint8; return them with a note on the scale.

    16-bit values are divided by 257, so that 65535 becomes 255. Signed integers, which numpy makes
    of lists, and those of more bits are read as 8-bit when all fit, else as 16-bit; false and true
    are 0 and 255. Floats are read as [0, 1], or as [0, 255] when a value exceeds 3; those up to 0.1
    outside of [0, 1] are clipped.

    Raises:
        InputError: values of another dtype, out of range, or not finite.
    """
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "biufc":
        raise InputError(f"{name}: an array of {values.dtype} holds no numbers; give uint8 0..255")
    if not np.all(np.isfinite(values)):
        raise InputError(f"{name} holds NaN or infinite values; clean and scale it to 0..255")
    low, high = values.min(), values.max()
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255), "false and true read as 0 and 255"
    if kind == "f" and (white := float_white(low, high)) is not None:
        note = f"float values scaled from [0, {white:g}]"
        if low < 0 or high > white:
            note += f"; those from {low:g} to {high:g} clipped to it"
        scaled = np.rint(values.astype(np.float64) * (255 / white))
        return scaled.clip(0, 255).astype(np.uint8), note
    is_wide = kind in "iu" and size >= 4
    if (is_wide or (kind, size) == ("i", 2)) and low >= 0 and high <= 255:
        return values.astype(np.uint8), f"{8 * size}-bit values read as 8-bit"
    if (is_wide or (kind, size) == ("u", 2)) and low >= 0 and high <= 65535:
        note = "16-bit scaled to 8-bit"
        if high < _DARK:
            note += f"; the brightest value is {high} of 65535"
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), note
    raise _not_colors(values, name)


def _not_colors(values: np.ndarray, name: str) -> InputError:
    kind, low, high = values.dtype.kind, values.min(), values.max()
    what, remark = "not colors", ""
    if kind == "f" and low < 0:
        remark = ", after undoing their normalization"
    elif kind == "f" and high <= 255:
        what, remark = "neither 0..1 nor 0..255", ", or to 0..1"
    return InputError(
        f"{name}: {values.dtype} values from {low} to {high} are {what}; scale them to uint8 "
        f"0..255 first{remark}"
    )
