"""A folder with the layout of the package easy-vqa, of invented questions and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from qwen2vl.eval.suites.easy_vqa import EasyVQA, EasyVQADefinition, load_definition

RGB = {
    **{"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128)},
    **{"green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)},
}


def answer_of(part: str, asked: str, shape: str, color: str) -> str:
    """Return the answer to a question of a part, in which a shape or color is asked for."""
    if part in ("shape", "shape_of_color"):
        return shape
    if part in ("color", "color_of_shape"):
        return color
    is_there = asked == (shape if part.endswith("shape") else color)
    return "yes" if is_there != part.startswith("lacks") else "no"


def write_package(folder: Path, *, num_images: int, split: str = "test") -> EasyVQADefinition:
    """Write one question of each pattern for each image; return the definition of the set."""
    published, random = load_definition(), Random(7)
    images = folder / "easy_vqa" / "data" / split / "images"
    images.mkdir(parents=True)
    rows: list[list[str | int]] = []
    for number in range(num_images):
        shape, color = random.choice(published.shapes), random.choice(published.colors)
        draw_shape(shape, color, random).save(images / f"{number}.png")
        for part, patterns in published.patterns.items():
            for pattern in patterns:
                own = part in ("shape_of_color", "color_of_shape")
                asked_shape = shape if own else random.choice(published.shapes)
                asked_color = color if own else random.choice(published.colors)
                question = pattern.format(shape=asked_shape, color=asked_color)
                asked = asked_shape if "{shape}" in pattern else asked_color
                rows.append([question, answer_of(part, asked, shape, color), number])
    content = json.dumps(rows).encode()
    (images.parent / "questions.json").write_bytes(content)
    return replace(published, num_questions=len(rows), sha256=sha256(content).hexdigest())


def draw_shape(shape: str, color: str, random: Random) -> Image.Image:
    """Draw one shape on a nearly white square of 64 pixels."""
    image = Image.new("RGB", (64, 64), (random.randint(230, 255),) * 3)
    x, y, size = random.randint(2, 20), random.randint(2, 20), random.randint(20, 40)
    draw = ImageDraw.Draw(image)
    if shape == "triangle":
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=RGB[color])
    else:
        draw_one = draw.ellipse if shape == "circle" else draw.rectangle
        draw_one((x, y, x + size, y + size), fill=RGB[color])
    return image


def open_package(folder: Path, *, num_images: int) -> EasyVQA:
    """Write the package and open it as a suite."""
    return EasyVQA(folder, write_package(folder, num_images=num_images))
