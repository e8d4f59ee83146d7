"""Small integers beside bfloat16: what they cost in answers, and save in time.

    python benchmarks/quantised.py [--only quality | speed] [--examples 64]

quality: nano reads the questions of the mini suite with their true answers; its odds for each token
of an answer are compared with those that it has unrounded in float32: the Kullback-Leibler
divergence in nats, the share of tokens whose likeliest word is the same, and the share that is
right. speed: one block of the 2B's decoder for 1, 8 and 308 tokens, all precisions by turns, each
on several copies so that no cache holds them. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import line
from torch import Tensor

from qwen2vl.adapt.join import siblings
from qwen2vl.adapt.quantise import is_of_decoder, quantise_layers, recipe
from qwen2vl.adapt.rows import multiply_single_rows
from qwen2vl.config import PRESETS
from qwen2vl.convert import quantise_folder
from qwen2vl.data.example import Example
from qwen2vl.eval.mini import build
from qwen2vl.geometry import AttnMeta
from qwen2vl.load import load
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.processor.processor import Processor
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.train.pack import Batch, pack

PARTS = "text shapes counting relations find name_box motion two_pictures".split()
QUESTIONS = 50  # of each part
AT_ONCE = 25  # conversations of one forward

LAYERS = 8  # copies of the block: 750 MB in bfloat16
ROUNDS = {1: 15, 8: 9, 308: 3}  # tokens -> how often


def batches(processor: Processor) -> Iterator[Batch]:
    """Lay out the questions of the suite with their answers."""
    examples = [
        Example(processor(render(case.spec).messages, for_training=True), part)
        for part in PARTS
        for case in build(part).cases[:QUESTIONS]
    ]
    for start in range(0, len(examples), AT_ONCE):
        yield pack(examples[start : start + AT_ONCE], pad_id=processor.config.bos_token_id)


@torch.inference_mode()
def log_odds(model: Qwen2VL, questions: list[Batch]) -> Tensor:
    """Compute the log-probabilities of all words, at each token of each answer."""
    rows: list[Tensor] = []
    for batch in questions:
        hidden_TD = batch.run(model)
        rows.append(model.logits(hidden_TD[batch.target_index_R]).float().log_softmax(-1))
    return torch.cat(rows)


def quality(num_examples: int) -> dict[str, Any]:
    whole, processor = load("nano", dtype="float32")
    questions = list(batches(processor))
    truth_R = torch.cat([batch.targets_R for batch in questions])
    want_RV = log_odds(whole, questions)
    found: dict[str, Any] = {"tokens": len(truth_R)}

    def compare(name: str, model: Qwen2VL) -> None:
        got_RV = log_odds(model, questions)
        divergence_R = (want_RV.exp() * (want_RV - got_RV)).sum(-1)
        words_R = got_RV.argmax(-1)
        found[name] = {
            "divergence": round(float(divergence_R.mean()), 5),
            "same": round(100 * float((words_R == want_RV.argmax(-1)).float().mean()), 1),
            "right": round(100 * float((words_R == truth_R).float().mean()), 1),
        }

    compare("float32", whole)
    compare("bfloat16", load("nano", dtype="bfloat16")[0])
    compare("int8", load("nano", dtype="bfloat16", quantize="int8")[0])
    compare("int4", load("nano", dtype="bfloat16", quantize="int4")[0])
    mixture = Mixture(questions=3)
    drawn = [render(sample(20240918, i, mixture)).messages for i in range(num_examples)]
    shown = [processor(messages, add_generation_prompt=False) for messages in drawn]
    with tempfile.TemporaryDirectory() as folder:
        quantise_folder("nano", Path(folder) / "nano", "int4", examples=shown)
        compare("int4_calibrated", load(Path(folder) / "nano", dtype="bfloat16")[0])
    return found


def decoder(mode: str | None) -> Qwen2VL:
    """Build some blocks of the 2B's decoder with random weights, and nearly no words."""
    full = PRESETS["2B"]
    config = replace(
        full,
        text=replace(full.text, num_hidden_layers=LAYERS, vocab_size=64),
        vision=replace(full.vision, depth=1),
        image_token_id=1,
        video_token_id=2,
    )
    with torch.device("meta"):
        model = Qwen2VL(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    for names, kind in siblings(recipe(model, mode)) if mode else ():  # type: ignore[arg-type]
        if is_of_decoder(names[0]):
            quantise_layers(model, names, kind)
    multiply_single_rows(model)
    return model.eval()


def step(model: Qwen2VL, tokens: int) -> Callable[[], object]:
    """Prepare a step: up to 8 sequences of 100 tokens get another, or one prompt is read."""
    ids_T = torch.zeros(tokens, dtype=torch.int64)
    if tokens > 8:
        positions_3T = torch.arange(tokens).expand(3, -1)
        return lambda: model(ids_T, positions_3T, AttnMeta.build([tokens]))
    text, past = model.config.text, 99
    caches = [KVCache.allocate(text, 128, torch.bfloat16, "cpu") for _ in range(tokens)]
    meta = AttnMeta.build([1] * tokens, [past + 1] * tokens)

    def decode() -> None:
        for cache in caches:
            cache.length = past
        model(ids_T, torch.full((3, tokens), past), meta, caches=caches)

    return decode


@torch.inference_mode()
def speed() -> dict[str, Any]:
    models = {mode or "bfloat16": decoder(mode) for mode in (None, "int8", "int4")}
    found: dict[str, Any] = {}
    for tokens, rounds in ROUNDS.items():
        runs = {name: step(model, tokens) for name, model in models.items()}
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        found[f"block_of_{tokens}"] = {
            f"{name}_ms": round(1000 * seconds / LAYERS, 2) for name, seconds in best.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["quality", "speed"])
    parser.add_argument("--examples", type=int, default=64)
    given = parser.parse_args()
    numbers: dict[str, Any] = {}
    if given.only != "speed":
        numbers["quality"] = quality(given.examples)
    if given.only != "quality":
        numbers["speed"] = speed()
    print(line(numbers))


if __name__ == "__main__":
    main()
