"""2,000 mixed requests on nano, finished, aborted or failed: no resource leaks. Slow."""

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
from tests.engine.test_llm import random_image, random_video, user

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc"),
]

REQUESTS = 2000
BATCH_SIZE = 8
MIB = 1024**2


class Resources(NamedTuple):
    """Memory, objects, threads and open files of this process."""

    mib: float
    objects: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> Resources:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE") / MIB,
            len(gc.get_objects()),
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
        )


def random_conversation(rng: random.Random) -> list[dict[str, Any]]:
    """Draw a conversation: text only, a shared image, a video, or a second turn."""
    text = " ".join(rng.choices(["what", "is", "this", "red", "circle", "where"], k=5))
    image = random_image(28 * rng.randint(2, 4), 28 * rng.randint(2, 4), rng.randrange(60))
    kind = rng.randrange(10)
    if kind < 3:
        return [user(text)]
    if kind < 7:
        return [user(text, image)]
    if kind < 8:
        return [user(text, random_video(rng.randint(2, 6)))]
    return [user("What is this?", image), {"role": "assistant", "content": text}, user(text)]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0, 0, 1.0]),
        repetition_penalty=rng.choice([None, 1.2]),
        seed=rng.randrange(100),
        max_tokens=rng.randint(1, 12),
        n=rng.choice([1, 1, 1, 2]),
        stop=rng.choice([(), ("e",)]),
        adapter=rng.choice([None, None, "a"]),
    )


def run_batch(llm: LLM, rng: random.Random) -> None:
    """Run a batch of requests; abort one on the way, and let a step fail occasionally."""
    forward = llm.engine_core.runner._forward

    def failing(chunks: Any) -> Any:
        if rng.random() < 0.01:
            raise MemoryError
        return forward(chunks)

    llm.engine_core.runner._forward = failing
    requests = []
    for _ in range(BATCH_SIZE):
        try:
            prompt, params, _ = llm.prepare(random_conversation(rng), random_params(rng))
        except Qwen2VLError:
            continue
        requests += llm.create_requests(prompt, params)
    for request in requests:
        llm.engine_core.scheduler.add_request(request)
    for number in range(10_000):
        if number == 3 and rng.random() < 0.3:
            llm.abort(rng.choice(requests))
        if not llm.engine_core.scheduler.has_unfinished_requests:
            break
        llm.step()
    assert not llm.engine_core.scheduler.has_unfinished_requests
    llm.engine_core.runner._forward = forward


def test_no_leaks_over_2000_mixed_requests(tmp_path: Path) -> None:
    model, processor = load("nano", dtype="float32")
    write_adapter(tmp_path / "a", model, (*TEXT, *VISION))
    config = EngineConfig(
        kv_cache_tokens=2048,
        max_num_batched_tokens=256,
        max_num_encoder_patches=128,
        num_speculative_tokens=3,
        encoder_cache_bytes=MIB // 2,
        encoder_cache_dir=tmp_path / "embeddings",
        encoder_cache_disk_bytes=2 * MIB,
        item_cache_bytes=MIB,
    )
    llm = LLM(model, processor, engine=config, adapters={"a": tmp_path / "a"})
    rng = random.Random(0)
    resources: list[Resources] = []
    for batch in range(REQUESTS // BATCH_SIZE):
        run_batch(llm, rng)
        pool = llm.engine_core.scheduler.pool
        assert (
            pool.num_used_blocks == 0 and not llm.engine_core.runner.encoder_cache._num_references
        )
        assert sum(cache.capacity for cache in llm.engine_core.runner.caches.values()) <= 2048
        if batch % 25 == 24:
            resources.append(Resources.now())
    early, late = resources[2], resources[-1]  # after 600 requests every cache is full
    assert late.threads <= early.threads, resources
    assert late.files <= early.files, resources
    assert late.objects < 1.02 * early.objects, resources
    assert late.mib < early.mib + 24, resources
    disk_bytes = sum(
        path.stat().st_size for path in (tmp_path / "embeddings").rglob("*") if path.is_file()
    )
    assert disk_bytes <= 3 * MIB
    llm.reset_caches()
    assert (
        not llm.engine_core.runner.caches
        and llm.engine_core.runner.encoder_cache.cache.stats.num_bytes == 0
    )
