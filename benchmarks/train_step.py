"""Time of a training step of nano: against transformers, and with live rendering of its data.

    python benchmarks/train_step.py [--only plain|live] [--examples 48] [--rounds 7]

`plain`: the same conversations, weights, bfloat16 autocast and optimizers; transformers (sdpa) gets
the conversations padded on the right, with pixels normalized and positions computed outside of the
timed part. Both alternate, and the losses of the first step are compared. `live`: step time while
another process renders and packs, relative to the same batches prepared before. Prints one line for
results.md.
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
from record import format_result
from torch import Tensor
from transformers import Qwen2VLConfig as ReferenceConfig
from transformers import Qwen2VLForConditionalGeneration as Reference

from qwen2vl.data.preprocess import TrainingExample
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.parallel.mesh import init_distributed
from qwen2vl.recipes.nano import TRAIN_ALL, WORLD, recipe
from qwen2vl.synth import render, sample
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loader.dataloader import BatchDataset, iterate_batches
from qwen2vl.train.logging.metrics import Metrics, metric_families
from qwen2vl.train.loop import train_step
from qwen2vl.train.optim.optimizers import Optimizers
from qwen2vl.train.state import TrainState, build_train_state

IGNORE_INDEX = -100  # transformers' label of unsupervised tokens
STEPS_PER_BLOCK = 25  # consecutive steps of `live`
NUM_WARMUP_STEPS = 6  # of them untimed: more than the loader prefetches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["plain", "live"])
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "live":
            numbers["plain"] = compare_with_transformers(args.examples, args.rounds, Path(folder))
        if args.only != "plain":
            numbers["live"] = compare_live_rendering(args.examples, args.rounds, Path(folder))
    print(format_result(numbers))


def stage_config(examples: int, folder: Path, *, compiled: bool) -> TrainConfig:
    """Return nano's recipe with its last large stage only, from the shipped weights."""
    stage = Stage(
        name="world", steps=10_000, global_batch_size=examples, rules=TRAIN_ALL, mixture=WORLD
    )
    return replace(
        recipe(),
        init="nano",
        stages=(stage,),
        output_dir=str(folder),
        device="cpu",
        compile=compiled,
    )


def started_state(config: TrainConfig) -> TrainState:
    """Build a training state with its optimizers."""
    with init_distributed("cpu") as distributed:
        state = build_train_state(config, distributed)
    state.start_stage()
    return state


def render_steps(state: TrainState, count: int) -> list[list[TrainingExample]]:
    """Render the conversations of `count` steps, one list per step."""
    stage = state.config.stages[0]
    assert stage.mixture is not None
    specs = (sample(7, index, stage.mixture) for index in range(count * stage.global_batch_size))
    examples = (
        TrainingExample(state.processor(render(spec).messages, for_training=True), spec.family)
        for spec in specs
    )
    return [list(islice(examples, stage.global_batch_size)) for _ in range(count)]


# ---- against transformers


class TransformersTrainer:
    """transformers with nano's weights and this package's optimizers."""

    def __init__(self, state: TrainState) -> None:
        config = ReferenceConfig(**state.model.config.to_dict("float32"))
        config._attn_implementation = "sdpa"
        self.config = state.model.config
        self.model = Reference(config).train()
        self.model.load_state_dict(_transformers_names(state.model.state_dict()), strict=True)
        scales = {name: 1.0 for name, _ in self.model.named_parameters()}
        self.optimizers = Optimizers(self.model, scales, state.config.optim)

    def pad(self, examples: Sequence[TrainingExample]) -> dict[str, Tensor]:
        """Return the conversations as a batch, each padded to the longest."""
        prompts = [example.input for example in examples]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        ids_BT = torch.full((len(prompts), longest), self.config.bos_token_id)
        labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
        mask_BT = torch.zeros_like(ids_BT)
        positions_3BT = torch.zeros(3, *ids_BT.shape, dtype=torch.long)
        pixels: dict[str, list[Tensor]] = {}
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            ids_BT[row, :length] = torch.tensor(prompt.input_ids)
            mask_BT[row, :length] = 1
            supervised = torch.tensor(prompt.loss_mask)
            labels_BT[row, :length] = ids_BT[row, :length].where(supervised, IGNORE_INDEX)
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
        """Take one optimizer step; return the loss."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizers.clip_grad_norm()
        self.optimizers.step(0.01)
        return loss.item()


def _transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = {"visual": "model.visual.", "model": "model.language_model."}
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        prefix, _, rest = name.partition(".")
        named[prefixes[prefix] + rest] = value.clone()
    named["lm_head.weight"] = named["model.language_model.embed_tokens.weight"]
    return named


class Trainer:
    """The step of this package's training loop, with its metrics."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.metrics = Metrics(
            Path(state.config.folder) / "metrics.jsonl",
            distributed=state.distributed,
            families=metric_families(state.config),
        )

    def step(self, batch: Batch) -> float:
        """Take one optimizer step; return the loss."""
        train_step(self.state, [batch], self.metrics, 0.0)
        line = self.metrics.report(step=self.state.step, steps=10_000, stage="world", skipped=0)
        return float(line["loss"])


def compare_with_transformers(examples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Alternate the steps of both; return milliseconds and their ratio."""
    states = {
        name: started_state(stage_config(examples, folder / name, compiled=name == "compiled"))
        for name in ("plain", "compiled")
    }
    for state in states.values():
        Path(state.config.folder).mkdir(parents=True)
    reference, trainers = (
        TransformersTrainer(states["plain"]),
        {name: Trainer(state) for name, state in states.items()},
    )
    times: dict[str, list[float]] = {name: [] for name in ("theirs", *trainers)}
    losses: dict[str, float] = {}
    num_padded = num_tokens = 0
    for index, examples_of_step in enumerate(render_steps(states["plain"], rounds + 1)):
        batch = pack_batch(examples_of_step, pad_id=states["plain"].model.config.bos_token_id)
        padded_batch = reference.pad(examples_of_step)
        num_padded += padded_batch["input_ids"].numel()
        num_tokens += int(padded_batch["attention_mask"].sum())
        for name in sorted(times, reverse=bool(index % 2)):
            start = time.perf_counter()
            loss = reference.step(padded_batch) if name == "theirs" else trainers[name].step(batch)
            if index:
                times[name].append(1e3 * (time.perf_counter() - start))
            else:  # the first step compiles, and gives the losses to compare
                losses[name] = loss
    medians = {name: median(values) for name, values in times.items()}
    return {
        "theirs_ms": round(medians["theirs"]),
        "ours_ms": round(medians["plain"]),
        "compiled_ms": round(medians["compiled"]),
        "ratio": round(medians["theirs"] / medians["plain"], 2),
        "ratio_compiled": round(medians["theirs"] / medians["compiled"], 2),
        "losses": {name: round(loss, 4) for name, loss in losses.items()},
        "padded_share": round(100 * (1 - num_tokens / num_padded), 1),
    }


# ---- live


def compare_live_rendering(examples: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Time steps on batches that a worker renders, and on the same batches from memory."""
    config = stage_config(examples, folder / "live", compiled=True)
    state = started_state(config)
    Path(config.folder).mkdir(parents=True)
    trainer = Trainer(state)
    seconds: dict[str, list[float]] = {"live": [], "before": []}
    for round_index in range(max(1, rounds // 2)):
        first = round_index * STEPS_PER_BLOCK
        dataset = BatchDataset(config, state.processor, {})
        prepared = [dataset[index] for index in range(first, first + STEPS_PER_BLOCK)]
        live = islice(iterate_batches(config, state.processor, first), STEPS_PER_BLOCK)
        order = {"live": live, "before": iter(prepared)}
        for name in sorted(order, reverse=bool(round_index % 2)):
            seconds[name].append(_seconds(trainer, order[name]))
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "live_ms": round(1e3 * medians["live"]),
        "before_ms": round(1e3 * medians["before"]),
        "steps_kept": round(medians["before"] / medians["live"], 3),
    }


def _seconds(trainer: Trainer, batches: Iterator[Batch]) -> float:
    """Return the mean seconds of a step, including the wait for its batch."""
    for batch in islice(batches, NUM_WARMUP_STEPS):
        trainer.step(batch)
    start = time.perf_counter()
    count = 0
    for batch in batches:
        trainer.step(batch)
        count += 1
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
