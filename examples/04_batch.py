"""Ask several questions about one picture at once: python examples/04_batch.py [MODEL]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams

QUESTIONS = ("How many shapes are there?", "Which shapes do you see?", "Find the blue square.")


def main(model: str = "nano") -> None:
    picture = draw()
    conversations = [
        [{"role": "user", "content": [{"image": picture}, {"text": question}]}]
        for question in QUESTIONS
    ]
    answers = LLM(model).chat(conversations, SamplingParams(temperature=0, max_tokens=64))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        cached = f"{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens were known"
        print(f"{question} {answer.text} ({cached})")


def draw() -> Image.Image:
    """Make a picture to ask about: a red disc, and a blue square to its right."""
    picture = Image.new("RGB", (224, 168), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((20, 44, 90, 114), fill="red")
    pen.rectangle((130, 60, 200, 130), fill="blue")
    return picture


if __name__ == "__main__":
    main(*sys.argv[1:])
