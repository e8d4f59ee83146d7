"""Probes of nano's recipe: short trainings of equal compute that differ in one choice each.

    python benchmarks/nano_probes.py out/probes [--only base bytes ...] [--teraflops 100]

Every probe trains the first stages of the recipe from scratch, on as many conversations as its
FLOPs pay for (forward and backward of the model, so that the speed of the hour does not matter), on
`ranks` processes of one thread each. All are then judged on the same held-out conversations of the
stage `fonts`: nats a conversation (of all answer tokens, so that tokenizers can be compared), and
the share of conversations in which every token has the highest probability. A finished probe is not
repeated. Prints a table, and a line for results.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import format_result

from qwen2vl.flops import build_flop_counter
from qwen2vl.recipes import nano
from qwen2vl.train.config import MeshConfig, Stage, TrainConfig
from qwen2vl.train.evaluate import held_out_batches
from qwen2vl.train.init import build_meta_model, build_model
from qwen2vl.train.loader.dataloader import BatchDataset
from qwen2vl.train.loop import train
from qwen2vl.train.loss import token_loss

SHARES = {"words": 0.05, "cells": 0.35, "fonts": 0.6}  # of a probe's FLOPs, by stage
BATCH_SIZE = 64  # conversations; with those of the recipe, a probe would have too few steps
WARMUP_STEPS = 40
NUM_JUDGED = 512  # held-out conversations
BYTE_VOCAB_SIZE = 704  # bytes, letters of Europe, special tokens
BATCHES_COUNTED = 4  # of a stage, to know its FLOPs a conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One choice, by what it changes in the common configuration."""

    question: str
    change: Callable[[TrainConfig], TrainConfig] = lambda config: config
    shares: Mapping[str, float] | None = None  # in place of SHARES


def shaped(width: int, depth: int) -> Callable[[TrainConfig], TrainConfig]:
    """Return the change to towers of this width and depth, with heads of 64 channels."""

    def change(config: TrainConfig) -> TrainConfig:
        assert config.model is not None
        heads = width // 64
        vision = replace(
            config.model.vision, depth=depth, embed_dim=width, num_heads=heads, hidden_size=width
        )
        text = replace(
            config.model.text,
            hidden_size=width,
            intermediate_size=round(2.75 * width / 32) * 32,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else 1,
        )
        return replace(config, model=replace(config.model, vision=vision, text=text))

    return change


def learning_rate(value: float) -> Callable[[TrainConfig], TrainConfig]:
    """Return the change to this peak learning rate."""
    return lambda config: replace(config, optim=replace(config.optim, lr=value))


def large_batches(config: TrainConfig) -> TrainConfig:
    """Return the configuration with batches of 160 conversations."""
    stages = tuple(replace(stage, global_batch_size=160) for stage in config.stages)
    return replace(config, stages=stages)


def one_question(config: TrainConfig) -> TrainConfig:
    """Return the configuration with a single question about each picture."""
    return replace(
        config,
        stages=tuple(
            replace(stage, mixture=replace(stage.mixture, max_questions=1))
            if stage.mixture is not None
            else stage
            for stage in config.stages
        ),
    )


def without_merges(config: TrainConfig) -> TrainConfig:
    """Return the configuration with a tokenizer of bytes, and no embeddings beyond them."""
    assert config.model is not None
    text = replace(config.model.text, vocab_size=BYTE_VOCAB_SIZE)
    return replace(config, num_merges=0, model=replace(config.model, text=text))


PROBES = {
    "base": Probe(question="the recipe: 600 merges, width 256, depth 5, 0.002"),
    "bytes": Probe(question="no merges", change=without_merges),
    "narrow": Probe(question="width 192, depth 4", change=shaped(192, 4)),
    "wide": Probe(question="width 320, depth 4", change=shaped(320, 4)),
    "lr-low": Probe(question="learning rate 0.001", change=learning_rate(1e-3)),
    "lr-high": Probe(question="learning rate 0.004", change=learning_rate(4e-3)),
    "large-batch": Probe(question="batches of 160 conversations", change=large_batches),
    "one-question": Probe(question="one question a picture", change=one_question),
    "no-cells": Probe(question="no curriculum", shares={"words": 0.0, "cells": 0.0, "fonts": 1.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--only", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--teraflops", type=float, default=100.0, help="of one probe")
    parser.add_argument("--ranks", type=int, default=2, help="processes of one thread")
    parser.add_argument("--worker", choices=PROBES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(args.worker, args.folder, args.teraflops)
        return
    rows = {}
    for name in args.only:
        result = args.folder / name / "result.json"
        if not result.is_file():
            launch(name, args.folder, args.teraflops, args.ranks)
        rows[name] = json.loads(result.read_text(encoding="utf-8"))
        print_row(name, rows[name])
    print(format_result({"teraflops": args.teraflops, "probes": rows}))


def launch(name: str, folder: Path, teraflops: float, ranks: int) -> None:
    """Train and judge one probe in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [__file__, str(folder), "--worker", name, "--teraflops", str(teraflops)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_worker(name: str, folder: Path, teraflops: float) -> None:
    """Train one probe on this rank; rank 0 judges it and writes its result."""
    logging.disable(logging.WARNING)
    config = probe_config(name, folder / name, 1e12 * teraflops)
    start = time.perf_counter()
    exported = train(config)
    seconds = time.perf_counter() - start
    if os.environ.get("RANK", "0") != "0":
        return
    result = {
        **judge(replace(config, model=None, init=str(exported))),
        "conversations": sum(stage.steps * stage.global_batch_size for stage in config.stages),
        "minutes": round(seconds / 60, 1),
    }
    (folder / name / "result.json").write_text(json.dumps(result), encoding="utf-8")


def probe_config(name: str, folder: Path, flops: float) -> TrainConfig:
    """Return the configuration of a probe, with as many steps as its FLOPs pay for."""
    probe, recipe = PROBES[name], nano.recipe()
    shares = SHARES if probe.shares is None else probe.shares
    config = probe.change(
        replace(
            recipe,
            name=f"probe-{name}",
            output_dir=str(folder / "run"),
            stages=tuple(
                replace(stage, steps=1, global_batch_size=BATCH_SIZE, default_system=0.0)
                for stage in recipe.stages
                if shares.get(stage.name)
            ),
            optim=replace(recipe.optim, warmup_steps=WARMUP_STEPS),
            num_threads=1,
            mesh=MeshConfig(reshard_after_forward=False),
            evaluation=replace(recipe.evaluation, eval_steps=0),
        )
    )
    stages = []
    for index, stage in enumerate(config.stages):
        cost = flops_per_conversation(config, index) * stage.global_batch_size
        steps = round(shares[stage.name] * flops / cost)
        stages.append(replace(stage, steps=steps, decay_ratio=0.3 * (stage.name == "fonts")))
    return replace(config, stages=tuple(stages))


def flops_per_conversation(config: TrainConfig, index: int) -> float:
    """Return the FLOPs of a stage's conversation: forward and backward, all weights trained."""
    stage: Stage = replace(config.stages[index], global_batch_size=32, steps=BATCHES_COUNTED)
    with tempfile.TemporaryDirectory() as folder:
        own = replace(config, stages=(stage,), output_dir=folder)
        meta = build_meta_model(own)
    counter = build_flop_counter(meta.model)
    dataset = BatchDataset(own, meta.processor, {})
    costs = [counter.count(dataset[number].flop_counts()).model for number in range(len(dataset))]
    return sum(costs) / (32 * len(costs))


@torch.inference_mode()
def judge(config: TrainConfig) -> dict[str, Any]:
    """Return nats a conversation and the share of right ones, in all and by family."""
    stage = replace(
        next(stage for stage in nano.recipe().stages if stage.name == "fonts"), default_system=0.0
    )
    judged = replace(
        config,
        stages=(stage,),
        evaluation=replace(config.evaluation, eval_steps=1, num_examples=NUM_JUDGED),
    )
    model, processor, _ = build_model(judged)
    nats: dict[str, list[float]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in held_out_batches(judged, 0, processor):
        output = token_loss(batch.forward(model.eval()), model.lm_head_weight, batch, 1.0)
        for index, family in enumerate(batch.families):
            own = batch.example_index_R == index
            nats[family].append(output.losses_R[own].sum().item())
            right[family].append(bool(output.is_correct_R[own].all()))
    return {
        "nats": mean_of(nats),
        "right": mean_of(right),
        "families": {
            family: [mean_of({family: nats[family]}), mean_of({family: right[family]})]
            for family in sorted(nats)
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def mean_of(values: Mapping[str, list[float]] | Mapping[str, list[bool]]) -> float:
    """Return the mean of all values of all families, rounded."""
    flat = [value for own in values.values() for value in own]
    return round(sum(flat) / len(flat), 4)


def print_row(name: str, row: Mapping[str, Any]) -> None:
    families = "  ".join(
        f"{family} {nats:.2f} {right:.0%}" for family, (nats, right) in row["families"].items()
    )
    cells = [
        f"{name:13s} {row['parameters'] / 1e6:4.1f} M  {row['conversations']:6d} conversations",
        f"{row['minutes']:4.1f} min  {row['nats']:.3f} nats  {row['right']:.1%} right",
    ]
    print("  ".join([*cells, families, f"({PROBES[name].question})"]), flush=True)


if __name__ == "__main__":
    main()
