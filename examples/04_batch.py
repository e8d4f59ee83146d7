"""Batched inference, several questions on one image: python examples/04_batch.py [MODEL]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams

QUESTIONS = ("How many shapes are there?", "List the shapes.", "Is there a green circle?")


def main(model: str = "nano") -> None:
    image = draw()
    conversations = [
        [{"role": "user", "content": [{"image": image}, {"text": question}]}]
        for question in QUESTIONS
    ]
    completions = LLM(model).chat(conversations, SamplingParams(temperature=0, max_tokens=64))
    for question, completion in zip(QUESTIONS, completions, strict=True):
        cached = (
            f"{completion.cached_tokens} of {completion.prompt_tokens} prompt tokens were cached"
        )
        print(f"{question} {completion.text} ({cached})")


def draw() -> Image.Image:
    """Draw a test image: a red disc, and a blue square to its right."""
    image = Image.new("RGB", (224, 168), "white")
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((20, 44, 90, 114), fill="red")
    canvas.rectangle((130, 60, 200, 130), fill="blue")
    return image


if __name__ == "__main__":
    main(*sys.argv[1:])
