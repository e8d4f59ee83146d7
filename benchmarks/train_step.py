"""One training step of nano: beside transformers, and with pictures drawn while it trains.

    python benchmarks/train_step.py [--only plain|live] [--examples 48] [--rounds 7]

`plain`: the same conversations and weights, bfloat16 autocast and optimizers; transformers (sdpa)
is given them padded to the right, its pixels normalized and its positions computed before its time
begins. Both go by turns, and the losses of the first step are compared. `live`: steps per hour
while another process draws and packs, over the same batches drawn before. One line for results.md.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import line
from torch import Tensor
from transformers import Qwen2VLConfig as ReferenceConfig
from transformers import Qwen2VLForConditionalGeneration as Reference

from qwen2vl.data.preprocess import Example
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.parallel.mesh import join
from qwen2vl.recipes.nano import ALL, WORLD, recipe
from qwen2vl.synth import render, sample
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loader.dataloader import Batches, batches
from qwen2vl.train.logging.metrics import Metrics, families_of
from qwen2vl.train.loop import one_step
from qwen2vl.train.optim.optimizers import Optimizers
from qwen2vl.train.state import Run, build

IGNORED = -100  # a label that carries no loss, in transformers
BLOCK = 25  # steps of `live` in one go
WARM = 6  # of them not measured: more than the loader prepares ahead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["plain", "live"])
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.only != "live":
            numbers["plain"] = beside_transformers(given.examples, given.rounds, Path(folder))
        if given.only != "plain":
            numbers["live"] = drawn_live(given.examples, given.rounds, Path(folder))
    print(line(numbers))


def config_of(examples: int, folder: Path, *, compiled: bool) -> TrainConfig:
    """Cut the last large stage out of nano's recipe, at the weights that are shipped."""
    stage = Stage(name="world", steps=10_000, examples=examples, rules=ALL, mixture=WORLD)
    return replace(
        recipe(), init="nano", stages=(stage,), out=str(folder), device="cpu", compile=compiled
    )


def begun(config: TrainConfig) -> Run:
    """Build a run that has its optimizers."""
    with join("cpu") as ranks:
        run = build(config, ranks)
    run.begin_stage()
    return run


def drawn(run: Run, count: int) -> list[list[Example]]:
    """Draw the conversations of some steps, one list for each."""
    stage = run.config.stages[0]
    assert stage.mixture is not None
    specs = (sample(7, index, stage.mixture) for index in range(count * stage.examples))
    examples = (
        Example(run.processor(render(spec).messages, for_training=True), spec.family)
        for spec in specs
    )
    return [list(islice(examples, stage.examples)) for _ in range(count)]


# ---- beside transformers


class Theirs:
    """transformers with nano's weights and our optimizers."""

    def __init__(self, run: Run) -> None:
        config = ReferenceConfig(**run.model.config.to_dict("float32"))
        config._attn_implementation = "sdpa"
        self.config = run.model.config
        self.model = Reference(config).train()
        self.model.load_state_dict(_their_names(run.model.state_dict()), strict=True)
        scales = {name: 1.0 for name, _ in self.model.named_parameters()}
        self.optimizers = Optimizers(self.model, scales, run.config.optim)

    def padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Lay conversations side by side, each padded to the longest."""
        prompts = [example.input for example in examples]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        ids_BT = torch.full((len(prompts), longest), self.config.bos_token_id)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        mask_BT = torch.zeros_like(ids_BT)
        positions_3BT = torch.zeros(3, *ids_BT.shape, dtype=torch.long)
        pixels: dict[str, list[Tensor]] = {}
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            ids_BT[row, :length] = torch.tensor(prompt.input_ids)
            mask_BT[row, :length] = 1
            supervised = torch.tensor(prompt.loss_mask)
            labels_BT[row, :length] = ids_BT[row, :length].where(supervised, IGNORED)
            positions_3BT[:, row, :length] = prompt.position_ids_3T
            for item in prompt.items:
                kind = ("pixel_values", "image_grid_thw")
                if item.kind == "video":
                    kind = ("pixel_values_videos", "video_grid_thw")
                normal_NP = normalize_pixels(item.patches_NP, self.config.vision)
                pixels.setdefault(kind[0], []).append(normal_NP)
                pixels.setdefault(kind[1], []).append(torch.tensor([list(item.grid)]))
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "labels": labels_BT,
            "position_ids": positions_3BT,
            **{name: torch.cat(parts) for name, parts in pixels.items()},
        }

    def step(self, batch: dict[str, Tensor]) -> float:
        """Move the weights once; returns the loss."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizers.clip()
        self.optimizers.step(0.01)
        return loss.item()


def _their_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    rooms = {"visual": "model.visual.", "model": "model.language_model."}
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        room, _, rest = name.partition(".")
        named[rooms[room] + rest] = value.clone()
    named["lm_head.weight"] = named["model.language_model.embed_tokens.weight"]
    return named


class Ours:
    """Our own loop's step, with its metrics."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.metrics = Metrics(
            Path(run.config.folder) / "metrics.jsonl",
            ranks=run.ranks,
            families=families_of(run.config),
        )

    def step(self, batch: Batch) -> float:
        """Move the weights once; returns the loss."""
        one_step(self.run, [batch], self.metrics, 0.0)
        line = self.metrics.report(step=self.run.step, steps=10_000, stage="world", skipped=0)
        return float(line["loss"])


def beside_transformers(examples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Step both by turns; milliseconds and how often ours goes into theirs."""
    runs = {
        name: begun(config_of(examples, folder / name, compiled=name == "compiled"))
        for name in ("plain", "compiled")
    }
    for run in runs.values():
        Path(run.config.folder).mkdir(parents=True)
    theirs, ours = Theirs(runs["plain"]), {name: Ours(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in ("theirs", *ours)}
    losses: dict[str, float] = {}
    padded = whole = 0
    for number, drawing in enumerate(drawn(runs["plain"], rounds + 1)):
        batch = pack(drawing, pad_id=runs["plain"].model.config.bos_token_id)
        side_by_side = theirs.padded(drawing)
        padded += side_by_side["input_ids"].numel()
        whole += int(side_by_side["attention_mask"].sum())
        for name in sorted(times, reverse=bool(number % 2)):
            began = time.perf_counter()
            loss = theirs.step(side_by_side) if name == "theirs" else ours[name].step(batch)
            if number:
                times[name].append(1e3 * (time.perf_counter() - began))
            else:  # the first is for compiling, and for what both must agree in
                losses[name] = loss
    middle = {name: median(values) for name, values in times.items()}
    return {
        "theirs_ms": round(middle["theirs"]),
        "ours_ms": round(middle["plain"]),
        "compiled_ms": round(middle["compiled"]),
        "ratio": round(middle["theirs"] / middle["plain"], 2),
        "ratio_compiled": round(middle["theirs"] / middle["compiled"], 2),
        "losses": {name: round(loss, 4) for name, loss in losses.items()},
        "padded_share": round(100 * (1 - whole / padded), 1),
    }


# ---- live


def drawn_live(examples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Step through batches that another process draws, then through the same from memory."""
    config = config_of(examples, folder / "live", compiled=True)
    run = begun(config)
    Path(config.folder).mkdir(parents=True)
    ours = Ours(run)
    seconds: dict[str, list[float]] = {"live": [], "before": []}
    for number in range(max(1, rounds // 2)):
        first = number * BLOCK
        table = Batches(config, run.processor, {})
        kept = [table[index] for index in range(first, first + BLOCK)]
        live = islice(batches(config, run.processor, first), BLOCK)
        order = {"live": live, "before": iter(kept)}
        for name in sorted(order, reverse=bool(number % 2)):
            seconds[name].append(_seconds(ours, order[name]))
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "live_ms": round(1e3 * middle["live"]),
        "before_ms": round(1e3 * middle["before"]),
        "steps_kept": round(middle["before"] / middle["live"], 3),
    }


def _seconds(ours: Ours, ready: Iterator[Batch]) -> float:
    """Time a step, waiting for its batch included."""
    for batch in islice(ready, WARM):
        ours.step(batch)
    began = time.perf_counter()
    count = 0
    for batch in ready:
        ours.step(batch)
        count += 1
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
