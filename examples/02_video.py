"""Ask about a clip given as a list of frames: python examples/02_video.py [MODEL]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams


def main(model: str = "nano", question: str = "Which way does the shape move?") -> None:
    clip = [frame(24 + 24 * i) for i in range(6)]
    content = [{"type": "video", "video": clip}, {"type": "text", "text": question}]
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (answer,) = LLM(model).chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {answer.text} ({answer.video_tokens} video tokens)")


def frame(left: int) -> Image.Image:
    """Draw a blue square so far from the left border."""
    picture = Image.new("RGB", (224, 112), "white")
    ImageDraw.Draw(picture).rectangle((left, 40, left + 32, 72), fill="blue")
    return picture


if __name__ == "__main__":
    main(*sys.argv[1:])
