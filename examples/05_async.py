"""Stream answers to many callers at once: python examples/05_async.py [MODEL]."""

from __future__ import annotations

import asyncio
import sys

from qwen2vl import LLM, AsyncLLM, SamplingParams


async def caller(engine: AsyncLLM, word: str) -> None:
    """Ask about one word; the pieces of the answer are shown as they came."""
    question = f"What is {word} backwards?"
    messages = [{"role": "user", "content": question}]
    answer = await engine.ask(messages, SamplingParams(temperature=0, max_tokens=32))
    pieces = [delta.text async for delta in answer]
    (completion,) = await answer.completions()
    print(f"{question} {'|'.join(pieces)} ({completion.finish_reason})")


async def serve(engine: AsyncLLM) -> None:
    await asyncio.gather(*(caller(engine, word) for word in ("apple", "bridge", "candle")))


def main(model: str = "nano") -> None:
    engine = AsyncLLM(LLM(model))
    asyncio.run(serve(engine))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
