"""GIF: Pillow's plugin, with a canvas that is transparent where no frame has drawn.

Browsers clear what a frame leaves free, and what its disposal restores to the background, to
transparent. Pillow fills both with color 0 or with the background color of the header, where the
frame has no transparent color. (GIF89a, section 23; Chromium: GIFImageDecoder.)
"""

from __future__ import annotations

from typing import Any

from PIL import GifImagePlugin, Image

__all__ = ["GifFile", "load_gif"]

_TO_BACKGROUND, _TO_PREVIOUS = 2, 3  # disposal methods


class GifFile(GifImagePlugin.GifImageFile):
    """A GIF file; its frames are composed on a transparent canvas."""

    _clears = False  # the current frame is disposed of to transparent pixels

    def _seek(self, frame: int, update_image: bool = True) -> None:
        """Go to the next frame; without `update_image` only count it: called by Pillow."""
        super()._seek(frame, update_image)
        if not update_image:
            return
        method = self.disposal_method
        self._clears = method == _TO_BACKGROUND or (method == _TO_PREVIOUS and frame == 0)
        if self._clears and self.dispose_extent is not None:
            left, upper, right, lower = self.dispose_extent
            self.dispose = Image.core.fill("RGBA", (right - left, lower - upper), (0, 0, 0, 0))

    def load(self) -> Any:
        """Decode the current frame and compose it: mode RGBA where the canvas is transparent."""
        box = self.tile[0][1] if self.tile else None
        pixels = super().load()
        if box is None or self.mode == "RGBA":
            return pixels
        if self.tell() == 0 and _leaves_canvas(self, box):
            canvas = _on_transparent(self, box)
        elif self._clears or self.mode == "L":  # whose later frames Pillow would not give colors
            canvas = self.convert("RGBA")
        else:
            return pixels
        self.info.pop("transparency", None)
        self.im, self._mode = canvas.im, "RGBA"
        return super().load()


def load_gif(image: GifImagePlugin.GifImageFile) -> Image.Image:
    """Decode the current frame of a GIF that a user opened by Pillow.

    Of its first frame, what it leaves free of the canvas becomes transparent.
    """
    box = image.tile[0][1] if image.tile and image.tell() == 0 else None
    image.load()
    return _on_transparent(image, box) if box and _leaves_canvas(image, box) else image


def _leaves_canvas(image: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Return whether the first frame leaves free a part of the canvas that Pillow fills."""
    return box != (0, 0, *image.size) and "transparency" not in image.info


def _on_transparent(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGB").crop(box), box[:2])
    return canvas
