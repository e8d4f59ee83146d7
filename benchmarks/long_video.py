"""Long videos: memory, decoding and encoding of one hour against ten minutes.

    python benchmarks/long_video.py [--minutes 10 60]

A clip of 1280 x 720 pixels, 10 frames a second, H.264, is made once for each length, into the cache
folder. Each is asked about in a process of its own, by a random model of few parameters, with two
frames a second and equal tokens a frame pair, the budget lifted. Measured are the peak of resident
memory less the bytes of the KV cache, beyond that of the process before it opens the clip; the
frame pairs encoded; and those encoded when a clip that is a minute longer is asked about next.
Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from record import format_result

from qwen2vl.files import atomic_file, user_cache_dir

FOLDER = user_cache_dir() / "benchmarks" / "long_video"
WIDTH, HEIGHT, RATE = 1280, 720, 10
FPS = 2.0
FRAME_PIXELS = 8 * 28 * 28  # of a sampled frame: 8 vision tokens a pair
MIB = 2**20


def make_clip(minutes: int) -> Path:
    """Encode a clip in which a square moves, and every minute looks different."""
    import av

    path = FOLDER / f"{minutes}.mp4"
    if path.is_file():
        return path
    with atomic_file(path) as partial, av.open(str(partial), "w", format="mp4") as output:
        options = {"preset": "ultrafast", "g": "250"}
        stream = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(minutes * 60 * RATE):
            luma = np.full((HEIGHT * 3 // 2, WIDTH), 128, np.uint8)
            luma[:HEIGHT] = 40 + index // (60 * RATE) * 13 % 150
            left, top = index * 7 % (WIDTH - 80), index * 3 % (HEIGHT - 80)
            luma[top : top + 80, left : left + 80] = index * 5 % 256
            frame = av.VideoFrame.from_ndarray(luma, format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def measure(minutes: int) -> dict[str, Any]:
    """Ask about the clip, then about the longer one; run in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from qwen2vl.engine import LLM, EngineConfig, SamplingParams
    from tests.parity.reference import random_model
    from tests.tiny import tiny_config, tiny_processor

    pairs = minutes * 60
    tiny = tiny_config()
    config = replace(tiny, text=replace(tiny.text, max_position_embeddings=2**20))
    llm = LLM(
        random_model(config),
        tiny_processor(),
        engine=EngineConfig(kv_cache_tokens=(pairs + 600) * 12, encoder_cache_bytes=64 * MIB),
    )
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    def ask(path: Path) -> Any:
        part = {"video": str(path), "frame_interval": 1 / FPS, "max_frames": 100_000}
        part |= {"total_pixels": 10**10}
        part |= {"max_pixels": FRAME_PIXELS, "min_pixels": FRAME_PIXELS, "segment_frames": 64}
        content = [part, {"type": "text", "text": "What moves?"}]
        return llm.chat([{"role": "user", "content": content}], greedy)[0]

    def encoded() -> int:
        stats = llm.stats()
        return stats.encoder_cache_queries - stats.encoder_cache_hits

    llm.chat([{"role": "user", "content": "Hello"}], greedy)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    answer = ask(make_clip(minutes))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    caches = llm.engine_core.runner.caches.values()
    kv_bytes = sum(tensor.nbytes for cache in caches for tensor in cache.slots)
    first = encoded()
    ask(make_clip(minutes + 1))
    return {
        "tokens": answer.video_tokens,
        "seconds": round(seconds, 1),
        "peak_without_kv_mib": round((peak - kv_bytes) / MIB, 1),
        "above_idle_mib": round((peak - kv_bytes - idle) / MIB, 1),
        "kv_mib": round(kv_bytes / MIB, 1),
        "encoded": first,
        "encoded_of_one_minute_more": encoded() - first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=int, nargs="+", default=[10, 60])
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return
    results: dict[str, Any] = {}
    for minutes in args.minutes:
        make_clip(minutes), make_clip(minutes + 1)
        command = [sys.executable, __file__, "--worker", str(minutes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        results[f"{minutes}_minutes"] = json.loads(done.stdout.splitlines()[-1])
    print(format_result(results))


if __name__ == "__main__":
    main()
