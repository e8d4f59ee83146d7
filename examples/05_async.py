"""Streaming to concurrent callers with AsyncLLM: python examples/05_async.py [MODEL]."""

from __future__ import annotations

import asyncio
import sys

from qwen2vl import LLM, AsyncLLM, SamplingParams


async def caller(engine: AsyncLLM, word: str) -> None:
    """Ask one question; print the streamed pieces of the output."""
    question = f"What is {word} backwards?"
    messages = [{"role": "user", "content": question}]
    stream = await engine.stream(messages, SamplingParams(temperature=0, max_tokens=32))
    pieces = [delta.text async for delta in stream]
    (completion,) = await stream.completions()
    print(f"{question} {'|'.join(pieces)} ({completion.finish_reason})")


async def run_callers(engine: AsyncLLM) -> None:
    await asyncio.gather(*(caller(engine, word) for word in ("apple", "bridge", "candle")))


def main(model: str = "nano") -> None:
    engine = AsyncLLM(LLM(model))
    asyncio.run(run_callers(engine))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
