"""Visual grounding with bounding boxes: python examples/03_grounding.py [MODEL [OUTPUT.png]]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM, SamplingParams
from qwen2vl.grounding import Box, parse


def main(model: str = "nano", output: str = "boxes.png") -> None:
    image = Image.new("RGB", (112, 84), "white")
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((10, 22, 45, 57), fill="red")
    canvas.rectangle((65, 30, 100, 65), fill="green")

    question = "Where is the red circle?"
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (completion,) = LLM(model).chat([{"role": "user", "content": content}], greedy)
    print(f"{question} {completion.text}")

    for found in parse(completion.text):
        if isinstance(found.shape, Box):
            box = found.shape.to_pixels((image.height, image.width))
            print("in pixels:", [round(value) for value in box])
            canvas.rectangle(box, outline="black")
    image.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
