"""Worker of checkouts.py: reads names of figures, measures each, prints its milliseconds.

Figures, all of nano: `step_overhead` (a step of eight requests less the model's forward and
logits), `first_token` (one image and a question), `decode` (a token of one request), `train_step`.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import engine as engine_benchmark
import numpy as np
import torch
import train_step as train_benchmark

from qwen2vl import LLM, SamplingParams

QUESTION = "What color is the largest shape in this picture, and where does it stand?"


def image_question(seed: int) -> list[dict[str, Any]]:
    """Ask about an image that was not asked about before."""
    pixels = np.random.default_rng(seed).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


class Figures:
    """The measurements, in milliseconds; models are loaded when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._llm: LLM | None = None
        self._train: Callable[[], float] | None = None
        self._seed = 0

    def _loaded_llm(self) -> LLM:
        if self._llm is None:
            self._llm = LLM("nano", dtype="float32")
        return self._llm

    def step_overhead(self) -> float:
        return float(engine_benchmark.overhead(LLM("nano", dtype="float32"), 60)["overhead_ms"])

    def first_token(self) -> float:
        params = SamplingParams(temperature=0, max_tokens=1)
        times = []
        for _ in range(8):
            self._seed += 1
            began = perf_counter()
            self._loaded_llm().chat(image_question(self._seed), params)
            times.append(perf_counter() - began)
        return 1000 * median(times)

    def decode(self) -> float:
        params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
        (answer,) = self._loaded_llm().chat([{"role": "user", "content": "Repeat this."}], params)
        return 1000 * answer.seconds.decode / 127

    def train_step(self) -> float:
        if self._train is None:
            self._train = self._training()
        return median(self._train() for _ in range(3))

    def _training(self) -> Callable[[], float]:
        config = train_benchmark.stage_config(24, self._folder, compiled=False)
        state = train_benchmark.started_state(config)
        Path(state.config.folder).mkdir(parents=True)
        trainer = train_benchmark.Trainer(state)
        pad_id = state.model.config.bos_token_id
        steps = train_benchmark.render_steps(state, 4)
        batches = cycle([train_benchmark.pack_batch(step, pad_id=pad_id) for step in steps])

        def step() -> float:
            batch = next(batches)
            began = perf_counter()
            trainer.step(batch)
            return 1000 * (perf_counter() - began)

        return step


def main() -> None:
    """Answer the driver until it closes the input."""
    torch.set_num_threads(int(sys.argv[1]))
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        figures = Figures(Path(folder) / "run")
        for request in sys.stdin:
            milliseconds = getattr(figures, request.strip())()
            print(json.dumps({"ms": milliseconds}), flush=True)


if __name__ == "__main__":
    main()
