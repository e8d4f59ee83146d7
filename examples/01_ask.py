"""Image question answering: python examples/01_ask.py [MODEL [IMAGE [QUESTION]]]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams


def main(model: str = "nano", image: str = "", question: str = "What color is the shape?") -> None:
    content = [
        {"type": "image", "image": image or draw()},
        {"type": "text", "text": question},
    ]
    llm = LLM(model)
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (completion,) = llm.chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {completion.text} ({completion.image_tokens} image tokens)")


def draw() -> Image.Image:
    """Draw a test image: one red disc."""
    image = Image.new("RGB", (224, 168), "white")
    ImageDraw.Draw(image).ellipse((72, 44, 152, 124), fill="red")
    return image


if __name__ == "__main__":
    main(*sys.argv[1:])
