"""Pictures for questions that nano can answer, as data URLs, and the questions as messages."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageDraw


def picture(color: str = "red", *, shape: str = "circle", size: int = 112) -> Image.Image:
    """Draw one shape on white."""
    image = Image.new("RGB", (size, size), "white")
    box = (size // 4, size // 4, size // 4 * 3, size // 4 * 3)
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    else:
        canvas.rectangle(box, fill=color)
    return image


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """Return a picture as a data URL."""
    data = base64.b64encode(encode(image, kind, **options)).decode()
    return f"data:image/{kind.lower()};base64,{data}"


def question(text: str, *images: Image.Image, **options: Any) -> list[dict[str, Any]]:
    """Return one user message: pictures, then text; options are of each picture."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}, **options} for image in images
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
