"""Video question answering on a list of frames: python examples/02_video.py [MODEL]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams


def main(model: str = "nano", question: str = "Which way does the shape move?") -> None:
    frames = [frame(24 + 24 * i) for i in range(6)]
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (completion,) = LLM(model).chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {completion.text} ({completion.video_tokens} video tokens)")


def frame(left: int) -> Image.Image:
    """Draw a frame: a blue square at `left` pixels from the left border."""
    image = Image.new("RGB", (224, 112), "white")
    ImageDraw.Draw(image).rectangle((left, 40, left + 32, 72), fill="blue")
    return image


if __name__ == "__main__":
    main(*sys.argv[1:])
