"""An adapter for nano on letters it reads badly: minutes of training until half of the errors left.

    python benchmarks/lora_nano.py [--minutes 10] [--leg 0.5] [--font EBGaramond12-Regular.otf]

Lines and pages in a font that no training of nano has seen are drawn into a folder; the recipe
`lora` is run on it in legs; after each, other lines in that font are read by the merged model, and
the share of characters wrong is compared with what nano itself leaves wrong. The font is one of the
judging families: what comes out is thrown away. Only training counts as time, the start of each leg
included. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from record import line

import qwen2vl
from qwen2vl.eval.metrics import edit_distance, normalize
from qwen2vl.recipes import lora
from qwen2vl.synth import Example, Mixture, render, sample
from qwen2vl.synth.families.text import sample_text, write_line
from qwen2vl.train.config import override
from qwen2vl.train.loop import train

TRAINING = Mixture(weights={"text": 1.0}, fonts="mono2", text_length=(1, 16), max_width=448)
TRAIN_SEED, TEST_SEED = 1, 2
PAGE_LINES = (1, 4)

SETTINGS = (
    "optim.lr=2e-3",
    "optim.warmup=10",
    "stages.0.steps=100000",
    "stages.0.decay=0",
    "stages.0.weighting=root",
    'adapter.targets=[".*"]',
    "adapter.dropout=0",
    "data.max_tokens=4096",
    "device=cpu",
    "log_every=20",
    "save_every=100000",
    "workers=1",
)


def examples(seed: int, count: int, font: str, lines: tuple[int, int]) -> list[Example]:
    """Draw what the world would, in a font that it does not know."""
    made: list[Example] = []
    for index in range(count):
        rng = Random(f"{font} {seed} {index}")
        spec = sample(seed, index, TRAINING)
        text = "\n".join(sample_text(rng, TRAINING, font) for _ in range(rng.randint(*lines)))
        picture = write_line(rng, TRAINING, text, font)
        question = replace(spec.questions[0], answer=picture.text)
        made.append(render(replace(spec, pictures=(picture,), questions=(question,))))
    return made


def write(folder: Path, made: list[Example]) -> Path:
    """Write conversations as a person would have them: pictures in files, a line each."""
    rows: list[str] = []
    for number, example in enumerate(made):
        name = f"{number:05d}.png"
        asked, answered = example.messages
        words = [part for part in asked["content"] if part["type"] == "text"]
        (shown,) = [part["image"] for part in asked["content"] if part["type"] == "image"]
        Image.fromarray(shown).save(folder / name)
        content = [{"type": "image", "image": name}, *words]
        rows.append(json.dumps({"messages": [{"role": "user", "content": content}, answered]}))
    path = folder / "letters.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def errors(model: str | Path, shown: list[Example]) -> float:
    """Read lines with a model: the share of characters wrong."""
    llm = qwen2vl.LLM(model)
    params = qwen2vl.SamplingParams(max_tokens=64, temperature=0)
    answers = llm.chat([example.prompt for example in shown], params)
    truths = [example.truth[0].answer for example in shown]
    wrong = sum(
        edit_distance(normalize(answer.text), normalize(truth))
        for answer, truth in zip(answers, truths, strict=True)
    )
    return wrong / sum(len(normalize(truth)) for truth in truths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--leg", type=float, default=0.5)
    parser.add_argument("--font", default="EBGaramond12-Regular.otf")
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args()
    shown = examples(TEST_SEED, given.questions, given.font, (1, 1))
    before = errors("nano", shown)
    print(f"nano leaves {before:.1%} of the characters wrong", flush=True)
    numbers: dict[str, Any] = {"font": given.font, "before": round(before, 4), "curve": []}
    spent, after = 0.0, before
    with tempfile.TemporaryDirectory(prefix="lora-nano-") as name:
        folder = Path(name)
        data = write(folder, examples(TRAIN_SEED, given.examples, given.font, PAGE_LINES))
        words = ["model=nano", f"data={data}", f"data.cache={folder}/cache", f"out={folder}/run"]
        config = override(lora.recipe(), [*words, *SETTINGS, f"minutes={given.leg}"])
        while spent < 60 * given.minutes and after > before / 2:
            began = time.monotonic()
            model = train(config)
            spent += time.monotonic() - began
            after = errors(model, shown)
            numbers["curve"].append([round(spent / 60, 2), round(after, 4)])
            print(f"{spent / 60:5.1f} min  {model.name}  {after:.1%}", flush=True)
    numbers |= {"after": round(after, 4), "minutes": round(spent / 60, 2)}
    print(line({**numbers, "is_halved": after <= before / 2}))


if __name__ == "__main__":
    main()
