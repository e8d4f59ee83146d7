"""Data types of composite pictures: `Composite` is a background and layers, painted in order.

Coordinates are pixels of the picture, x to the right, y down; boxes are (x1, y1, x2, y2), the last
two exclusive. JSON omits fields that hold their default, and names the type of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

__all__ = [
    "Composite",
    "Generated",
    "Ground",
    "Icon",
    "Layer",
    "Lines",
    "Photo",
    "Rect",
    "ShapeLayer",
    "Text",
    "Tone",
    "lists_to_tuples",
    "without_defaults",
]

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
# Black lines that are added to an icon: around its parts, or around white parts.
Lines = Literal["", "outlines", "line_art"]
# Degrees by which hues of an icon are turned; its saturation and its brightness, in percent.
Tone = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The background of a picture.

    plain: `rgb`. gradient: from `rgb` to `rgb2`, from left to right or, if `seed` is odd, from top
    to bottom. noise: independent random pixels between `rgb` and `rgb2`, in cells of `cell` pixels.
    stripes, checks: of `cell` pixels, in the two colors. clouds: smooth noise between the colors,
    in spots of about three cells.
    """

    kind: Literal["plain", "gradient", "noise", "stripes", "checks", "clouds"] = "plain"
    rgb: RGB = (255, 255, 255)
    rgb2: RGB = (0, 0, 0)
    cell: int = 1  # pixels
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Icon:
    """An icon of the dataset named-pictures, drawn into the box."""

    style: str  # "openmoji"
    name: str  # of the object, as in names.tsv: "guitar"
    box: Box
    angle: int = 0  # degrees counterclockwise
    raster: int = 0  # pixels a side at which it is drawn, then resized to the box; 0: the box's
    lines: Lines = ""
    tone: Tone = (0, 100, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rect:
    """A filled rectangle, as of a table or a chart."""

    rgb: RGB
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeLayer:
    """A geometric shape; its pixels fill the box exactly, unless it is rotated."""

    kind: str  # of SHAPE_KINDS or MORE_SHAPE_KINDS
    rgb: RGB
    box: Box
    angle: int = 0  # degrees counterclockwise; the largest that the box holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One line of text, of any script."""

    text: str
    font: str  # file name, or "PACKAGE/FILE" of the dataset test-fonts
    size: int  # pixels per em
    x: int  # left end of the line
    y: int  # baseline
    rgb: RGB = (0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Photo:
    """A photo of the dataset photos, cropped, and resized to the box."""

    file: str  # "chelsea.png"
    crop: Box | None = None  # in pixels of the photo; None: all of it
    box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A drawing computed from a seed: something like a photo, or a figure without a name."""

    kind: Literal["photo", "polygon", "blob", "scribble", "strokes"]
    seed: int
    rgb: RGB = (0, 0, 0)  # of a figure
    box: Box


Layer = Icon | Rect | ShapeLayer | Text | Photo | Generated
_LAYERS: dict[str, Callable[..., Layer]] = {
    "icon": Icon,
    "rect": Rect,
    "shape": ShapeLayer,
    "text": Text,
    "photo": Photo,
    "generated": Generated,
}
_NAMES = {kind: name for name, kind in _LAYERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A picture: a background with layers, then blur and JPEG compression."""

    width: int
    height: int
    ground: Ground = Ground()
    layers: tuple[Layer, ...] = ()  # painted in this order
    blur: float = 0.0  # radius of a Gaussian blur, in pixels
    jpeg_quality: int = 0  # 1 to 95; 0: not compressed

    def scaled(self, k: int) -> Composite:
        """Return the same picture scaled by the factor `k`."""
        return replace(
            self,
            width=k * self.width,
            height=k * self.height,
            ground=replace(self.ground, cell=k * self.ground.cell),
            layers=tuple(_scale_layer(layer, k) for layer in self.layers),
            blur=k * self.blur,
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values, without "type"."""
        raw = without_defaults(self)
        if "ground" in raw:
            raw["ground"] = without_defaults(self.ground)
        if self.layers:
            raw["layers"] = [
                {"type": _NAMES[type(layer)], **without_defaults(layer)} for layer in self.layers
            ]
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Composite:
        """Create from the output of `to_json`."""
        values = dict(raw)
        if "ground" in values:
            values["ground"] = Ground(**lists_to_tuples(values["ground"]))
        values["layers"] = tuple(_layer_from_json(layer) for layer in values.get("layers", ()))
        return cls(**values)


def _scale_layer(layer: Layer, k: int) -> Layer:
    if isinstance(layer, Text):
        return replace(layer, size=k * layer.size, x=k * layer.x, y=k * layer.y)
    x1, y1, x2, y2 = layer.box
    return replace(layer, box=(k * x1, k * y1, k * x2, k * y2))


def _layer_from_json(raw: Mapping[str, Any]) -> Layer:
    values = lists_to_tuples(raw)
    return _LAYERS[values.pop("type")](**values)


def without_defaults(item: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON values; fields that hold their default are omitted."""
    values = asdict(item)
    return {f.name: values[f.name] for f in fields(item) if getattr(item, f.name) != f.default}


def lists_to_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a JSON object with tuples in place of its lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
