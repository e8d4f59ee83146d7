"""Composite pictures: a background with layers of icons, shapes, text and photos, of any size.

    picture = Composite(width=640, height=480, layers=(Icon(style="noto", name="guitar", ...),))
    check_resources([picture])         datasets, fonts and libraries that its layers need
    pixels = draw_composite(picture)   (480, 640, 3) uint8

`layers.py` has the data types, as JSON and back; `draw.py` draws them; `icons.py` reads the styles
of the dataset named-pictures, and `text.py` lays out text of any script. Datasets are those of
`qwen2vl fetch-data`; nothing is fetched here.
"""

from __future__ import annotations

from qwen2vl.synth.compositing.draw import check_resources, draw_composite
from qwen2vl.synth.compositing.icons import IconName, icon_names
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon, Photo, Rect, ShapeLayer, Text

__all__ = [
    "Composite",
    "Ground",
    "Icon",
    "IconName",
    "Photo",
    "Rect",
    "ShapeLayer",
    "Text",
    "check_resources",
    "draw_composite",
    "icon_names",
]
