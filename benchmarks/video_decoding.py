"""CPU time of decoding sampled frames: what they depend on, against all frames up to the last.

    python benchmarks/video_decoding.py [--rounds 7] [--seconds 120]

The clip is H.264, 854 x 480, 30 fps, 2 B-frames, with a keyframe every 250 or every 30 frames; it
is encoded into the user's cache folder the first time (a minute of CPU time each). One frame is
sampled every 10, 2 and 0.5 seconds, by a reader that decodes the packets that the frames depend on,
and by one that decodes the file from its start, as every reader did before and as both fall back
to. Interleaved; seconds of processor time of all threads from opening to the last frame, medians,
and the median of the ratios of neighbors. Frames are compared. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from record import format_result

from qwen2vl.files import atomic_file, user_cache_dir
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_reader import PyAVVideoReader

HEIGHT, WIDTH, FPS = 480, 854, 30
SPACINGS = (10.0, 2.0, 0.5)  # seconds


def cached_clip(gop: int, seconds: int) -> Path:
    """Return a clip of a moving picture with grain, in which a square moves."""
    path = user_cache_dir() / "benchmarks" / f"clip-{WIDTH}x{HEIGHT}-{seconds}s-gop{gop}.mp4"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    soft = soft.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (2 * HEIGHT, 2 * WIDTH, 3))
    picture = (np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)
    options = {"g": str(gop), "bf": "2", "sc_threshold": "0", "threads": "1"}
    with atomic_file(path) as partial, av.open(str(partial), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(seconds * FPS):
            y = int(HEIGHT / 2 * (1 + np.sin(i / 47)))
            x = int(WIDTH / 2 * (1 + np.cos(i / 61)))
            pixels = np.ascontiguousarray(picture[y : y + HEIGHT, x : x + WIDTH])
            left = 5 * i % (WIDTH - 80)
            pixels[100:180, left : left + 80] ^= 255
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def decode(path: Path, spacing: float, *, from_start: bool) -> tuple[float, float, bytes]:
    """Decode a frame every `spacing` seconds; return CPU seconds, seconds, and a digest."""
    cpu, clock, digest = time.process_time(), time.monotonic(), sha256()
    reader = PyAVVideoReader(Media(content=path), MediaLimits(), "clip")
    if from_start:
        reader._packets = None
    step = round(spacing * FPS)
    for pixels in reader.frames_at(range(0, len(reader.metadata.timestamps), step), np.array):
        digest.update(pixels.data)
    return time.process_time() - cpu, time.monotonic() - clock, digest.digest()


def measure(path: Path, spacing: float, rounds: int) -> dict[str, float]:
    """Time both readers interleaved; check that their frames are equal."""
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(rounds):
        digests = set()
        for from_start in (True, False) if number % 2 else (False, True):
            *seconds, digest = decode(path, spacing, from_start=from_start)
            times[from_start].append((seconds[0], seconds[1]))
            digests.add(digest)
        assert len(digests) == 1, "the frames differ"
    pairs = list(zip(times[False], times[True], strict=True))
    return {
        "cpu_s": round(statistics.median(cpu for cpu, _ in times[False]), 2),
        "from_start_cpu_s": round(statistics.median(cpu for cpu, _ in times[True]), 2),
        "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 2),
        "clock_ratio": round(statistics.median(a[1] / b[1] for a, b in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=120)
    args = parser.parse_args()
    numbers: dict[str, Any] = {"rounds": args.rounds}
    for gop in (250, 30):
        path = cached_clip(gop, args.seconds)
        for spacing in SPACINGS:
            numbers[f"gop_{gop}_every_{spacing:g}_s"] = measure(path, spacing, args.rounds)
    print(format_result(numbers))


if __name__ == "__main__":
    main()
