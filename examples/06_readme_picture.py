"""The README's picture: python examples/06_readme_picture.py [MODEL [OUTPUT.png]]."""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

from qwen2vl import LLM
from qwen2vl.cli.boxes import parse_shapes, strip_grounding_tokens
from qwen2vl.synth import Mixture, render, sample


def main(model: str = "nano", output: str = "readme.png") -> None:
    llm = LLM(model)
    page = Image.new("RGB", (1100, 360), "white")
    pen = ImageDraw.Draw(page)
    for left, family in ((20, "text"), (380, "shapes"), (740, "grounding")):
        mixture = Mixture(weights={family: 1}, split="held_out", fonts="bundled")
        example = render(sample(2, 0, mixture))  # the first sample, whatever its answer
        picture = Image.fromarray(example.prompt[0]["content"][0]["image"])
        (answer,) = llm.chat(example.prompt)
        factor = min(320 / picture.width, 240 / picture.height)
        picture = picture.resize([round(n * factor) for n in picture.size])
        shapes = parse_shapes(answer.text, answer.items)
        for shape in shapes:
            corners = [(x * factor, y * factor) for x, y in shape.corners]
            ImageDraw.Draw(picture).rectangle((*corners[0], *corners[-1]), outline="red", width=4)
        question = strip_grounding_tokens(example.truth[0].text)
        text = "; ".join(shape.text for shape in shapes) or answer.text
        page.paste(picture, (left, 20 + (240 - picture.height) // 2))
        pen.text((left, 280), question, "#57606a", font_size=19)
        pen.text((left, 316), text, "#1f2328", font_size=22)
        print(f"{question} {text}")
    page.save(output, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
