"""Ask about a picture: python examples/01_ask.py [MODEL [PICTURE [QUESTION]]]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams


def main(
    model: str = "nano", picture: str = "", question: str = "What color is the shape?"
) -> None:
    content = [
        {"type": "image", "image": picture or draw()},
        {"type": "text", "text": question},
    ]
    llm = LLM(model)
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (answer,) = llm.chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {answer.text} ({answer.image_tokens} image tokens)")


def draw() -> Image.Image:
    """Make a picture to ask about: one red disc."""
    picture = Image.new("RGB", (224, 168), "white")
    ImageDraw.Draw(picture).ellipse((72, 44, 152, 124), fill="red")
    return picture


if __name__ == "__main__":
    main(*sys.argv[1:])
