"""Requests of the server benchmarks: each with its own picture and question, from a seed."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["chat_bodies", "chat_body", "jpeg", "jpeg_below", "question"]

WORDS = (
    "the of and to in is was for that on with as by at from are were this be have not which one "
    "all new two more when would about time people first water long little very after words called "
    "red green blue circle square triangle left right above below large small count where color"
).split()

LARGE = 2000  # pixels on a side

# One in every request, so that no server adds its own.
SYSTEM = "You are a helpful assistant."
SHARED_SYSTEM = (
    "You answer questions about pictures. Answer in one short sentence. Name colors, shapes and "
    "numbers as they are seen, and nothing that is not in the picture. If several objects are of "
    "one kind, count them. If text is seen, quote it as it is written, with its punctuation. "
    "Positions are given as left, right, top, bottom and center. Never guess, never apologize."
)


def jpeg(seed: int, height: int = 224, width: int = 224, quality: int = 85) -> bytes:
    """Draw a picture of smooth colors and rectangles, and return it as a JPEG."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(4):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        box = (left, top, left + width // 5, top + height // 5)
        image.paste(tuple(int(v) for v in rng.integers(0, 256, 3)), box)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def jpeg_below(seed: int, height: int, width: int, num_bytes: int) -> bytes:
    """Return a JPEG with much detail, of the highest quality that has at most `num_bytes`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    for quality in range(95, 5, -5):
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if out.tell() <= num_bytes:
            return out.getvalue()
    raise ValueError(f"{height} x {width} pixels do not fit in {num_bytes} bytes")


def question(seed: int, num_words: int = 10) -> str:
    """Draw a question whose first words differ between seeds."""
    rng = random.Random(seed)
    return f"{seed}: " + " ".join(rng.choices(WORDS, k=num_words)) + "?"


def chat_body(
    text: str,
    picture: bytes | None = None,
    *,
    max_tokens: int,
    system: str | None = SYSTEM,
    mime: str = "image/jpeg",
    **extra: Any,
) -> bytes:
    """Return the body of a chat request: picture, question, greedy, exactly `max_tokens`."""
    content: list[dict[str, Any]] = []
    if picture is not None:
        url = f"data:{mime};base64,{base64.b64encode(picture).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": text})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    body = {
        "model": "nano",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return json.dumps(body | extra).encode()


def chat_bodies(kind: str, seed: int, count: int, max_tokens: int, **extra: Any) -> list[bytes]:
    """Return `count` bodies.

    Args:
        kind: "text", "picture" (nothing is shared between two prompts but the first tokens of the
            chat template), "shared" (as "picture", after one long system message), or "large"
            (pictures that take long to decode, but are resized to few pixels).
        seed: of the first request; the following ones count on.
        count: number of requests.
        max_tokens: of each.
        **extra: more fields of each body.

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind not in ("text", "picture", "shared", "large"):
        raise ValueError(f"kind {kind!r} is none of text, picture, shared, large")
    if kind == "large":
        extra["max_pixels"] = 112 * 112
    bodies = []
    for number in range(seed, seed + count):
        # The system message comes first: without a number of its own it would be a shared prefix.
        system = SHARED_SYSTEM if kind == "shared" else f"{number}. {SYSTEM}"
        side = LARGE if kind == "large" else 224
        picture = None if kind == "text" else jpeg(number, side, side)
        bodies.append(
            chat_body(question(number), picture, max_tokens=max_tokens, system=system, **extra)
        )
    return bodies
