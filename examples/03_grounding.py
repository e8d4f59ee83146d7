"""Visual grounding with bounding boxes: python examples/03_grounding.py [MODEL [OUTPUT.png]]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams
from qwen2vl.grounding import Box, parse


def main(model: str = "nano", output: str = "boxes.png") -> None:
    image = Image.new("RGB", (280, 196), "white")
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((30, 50, 94, 114), fill="red")
    canvas.rectangle((170, 90, 234, 154), fill="green")

    question = "Where is the red circle?"
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (completion,) = LLM(model).chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {completion.text}")

    for found in parse(completion.text):
        if isinstance(found.shape, Box):
            box = found.shape.to_pixels((image.height, image.width))
            print("in pixels:", [round(value) for value in box])
            canvas.rectangle(box, outline="black", width=2)
    image.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
