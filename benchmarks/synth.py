"""Throughput of the synthetic data: examples per second and core, by task family. One JSON line.

    python benchmarks/synth.py [--count 3000]

Times are CPU seconds of this process, so that other load does not matter. `cold` starts with an
empty glyph cache; `warm` is measured after the tables of all fonts and sizes were cached.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

from qwen2vl.synth import FAMILIES, Mixture, render, sample
from qwen2vl.synth.fonts import glyphs


def measure(mixture: Mixture, seed: int, count: int) -> float:
    """Sample and render `count` examples; return examples per second."""
    start = time.process_time()
    for index in range(count):
        render(sample(seed, index, mixture))
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=3000)
    count = parser.parse_args().count
    line: dict[str, object] = {"benchmark": "synth", "machine": platform.processor() or "cpu"}
    for family in FAMILIES:
        mixture = Mixture(weights={family: 1.0}, max_questions=3)
        glyphs.cache_clear()
        cold = measure(mixture, 1, count)
        measure(mixture, 2, 3 * count)
        warm = measure(mixture, 3, count)
        line[family] = {"cold": round(cold), "warm": round(warm)}
    cells = Mixture(weights={"text": 1.0}, layout="cells", fonts="mono2", text_length=(1, 8))
    line["cells"] = {"warm": round(measure(cells, 1, count))}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
