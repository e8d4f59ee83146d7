"""2,000 mixed requests on nano: answered, cancelled, failed, and nothing has grown. Slow."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.errors import Qwen2VLError
from qwen2vl.loading import load
from tests.adapters import TEXT, VISION, write_adapter
from tests.engine.test_llm import clip, picture, user

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc"),
]

REQUESTS = 2000
TOGETHER = 8
MIB = 1024**2


class Held(NamedTuple):
    """What a process holds."""

    mib: float
    objects: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE") / MIB,
            len(gc.get_objects()),
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
        )


def question(rng: random.Random) -> list[dict[str, Any]]:
    """Draw a conversation: of words, a picture that others show too, a clip, or a second turn."""
    words = " ".join(rng.choices(["what", "is", "this", "red", "circle", "where"], k=5))
    shown = picture(28 * rng.randint(2, 4), 28 * rng.randint(2, 4), rng.randrange(60))
    kind = rng.randrange(10)
    if kind < 3:
        return [user(words)]
    if kind < 7:
        return [user(words, shown)]
    if kind < 8:
        return [user(words, clip(rng.randint(2, 6)))]
    return [user("What is this?", shown), {"role": "assistant", "content": words}, user(words)]


def wish(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0, 1.0]),
        repetition_penalty=rng.choice([None, 1.2]),
        seed=rng.randrange(100),
        max_tokens=rng.randint(1, 12),
        n=rng.choice([1, 1, 1, 2]),
        stop=rng.choice([(), ("e",)]),
        adapter=rng.choice([None, None, "a"]),
    )


def live(llm: LLM, rng: random.Random) -> None:
    """Answer some requests at once; cancel one on the way, and let a step fail now and then."""
    forward = llm.runner._forward

    def failing(chunks: Any) -> Any:
        if rng.random() < 0.01:
            raise MemoryError
        return forward(chunks)

    llm.runner._forward = failing
    sequences = []
    for _ in range(TOGETHER):
        try:
            prompt, params, _ = llm.prepare(question(rng), wish(rng))
        except Qwen2VLError:
            continue
        sequences += llm.sequences(prompt, params)
    for sequence in sequences:
        llm.scheduler.add(sequence)
    for number in range(10_000):
        if number == 3 and rng.random() < 0.3:
            llm.cancel(rng.choice(sequences))
        if not llm.scheduler.has_work:
            break
        llm.step()
    assert not llm.scheduler.has_work
    llm.runner._forward = forward


def test_nothing_grows_over_2000_mixed_requests(tmp_path: Path) -> None:
    model, processor = load("nano", dtype="float32")
    write_adapter(tmp_path / "a", model, (*TEXT, *VISION))
    config = EngineConfig(
        cache_tokens=2048,
        max_step_tokens=256,
        max_step_patches=128,
        num_drafts=3,
        vision_cache_bytes=MIB // 2,
        vision_cache_dir=tmp_path / "rows",
        vision_disk_bytes=2 * MIB,
        item_cache_bytes=MIB,
    )
    llm = LLM.of(model, processor, engine=config, adapters={"a": tmp_path / "a"})
    rng = random.Random(0)
    held: list[Held] = []
    for batch in range(REQUESTS // TOGETHER):
        live(llm, rng)
        pool = llm.scheduler.pool
        assert pool.num_busy == 0 and not llm.runner.shelf._holds
        assert sum(cache.capacity for cache in llm.runner.caches.values()) <= 2048
        if batch % 25 == 24:
            held.append(Held.now())
    early, late = held[2], held[-1]  # after 600 requests every cache is full
    assert late.threads <= early.threads, held
    assert late.files <= early.files, held
    assert late.objects < 1.02 * early.objects, held
    assert late.mib < early.mib + 24, held
    rows = sum(path.stat().st_size for path in (tmp_path / "rows").rglob("*") if path.is_file())
    assert rows <= 3 * MIB
    llm.forget()
    assert not llm.runner.caches and llm.runner.shelf.cache.stats.num_bytes == 0
