"""Streaming to concurrent callers with AsyncLLM: python examples/05_async.py [MODEL]."""

from __future__ import annotations

import asyncio
import sys

from PIL import Image, ImageDraw

from qwen2vl import AsyncLLM

QUESTION = "What do you see?"


async def caller(engine: AsyncLLM, color: str) -> None:
    """Ask about an image; print the streamed pieces of the output."""
    stream = await engine.stream(QUESTION, images=draw(color), temperature=0, max_tokens=32)
    pieces = [delta.text async for delta in stream]
    (completion,) = await stream.completions()
    print(f"{QUESTION} {'|'.join(pieces)} ({completion.finish_reason})")


def draw(color: str) -> Image.Image:
    """Draw a test image: one disc."""
    image = Image.new("RGB", (112, 84), "white")
    ImageDraw.Draw(image).ellipse((36, 22, 76, 62), fill=color)
    return image


async def main(model: str = "nano") -> None:
    async with AsyncLLM(model) as engine:
        await asyncio.gather(*(caller(engine, color) for color in ("red", "blue", "purple")))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
