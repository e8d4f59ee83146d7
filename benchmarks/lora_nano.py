"""A LoRA adapter for nano on a font it reads badly: minutes of training until half the errors.

    python benchmarks/lora_nano.py [--minutes 10] [--minutes-per-run 0.5]
                                   [--font EBGaramond12-Regular.otf]

Lines and pages in a font that nano was not trained on are rendered into a folder. The recipe `lora`
is run on it in several invocations; after each, the merged model reads other lines in that font,
and its character error rate is compared with nano's. The font is one of the families reserved for
evaluation, so the trained model is discarded. Only training is timed, including the startup of each
invocation. Prints one line for results.md.
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
from record import format_result

import qwen2vl
from qwen2vl.eval.metrics import edit_distance, normalize_answer
from qwen2vl.recipes import lora
from qwen2vl.synth import Mixture, SyntheticExample, render, sample
from qwen2vl.synth.families.text import sample_text, write_line
from qwen2vl.train.config import override
from qwen2vl.train.loop import train

TRAIN_MIXTURE = Mixture(weights={"text": 1.0}, fonts="mono2", text_length=(1, 16), max_width=448)
TRAIN_SEED, TEST_SEED = 1, 2
PAGE_LINES = (1, 4)

SETTINGS = (
    "optim.lr=2e-3",
    "optim.warmup_steps=10",
    "stages.0.steps=100000",
    "stages.0.decay_ratio=0",
    "stages.0.weighting=root",
    'adapter.target_modules=[".*"]',
    "adapter.dropout=0",
    "data.max_tokens=4096",
    "device=cpu",
    "logging_steps=20",
    "save_steps=100000",
    "num_workers=1",
)


def render_examples(
    seed: int, num_examples: int, font: str, lines: tuple[int, int]
) -> list[SyntheticExample]:
    """Render samples of the synthetic world in a font that it does not use."""
    examples: list[SyntheticExample] = []
    for index in range(num_examples):
        rng = Random(f"{font} {seed} {index}")
        spec = sample(seed, index, TRAIN_MIXTURE)
        text = "\n".join(sample_text(rng, TRAIN_MIXTURE, font) for _ in range(rng.randint(*lines)))
        picture = write_line(rng, TRAIN_MIXTURE, text, font)
        question = replace(spec.questions[0], answer=picture.text)
        examples.append(render(replace(spec, pictures=(picture,), questions=(question,))))
    return examples


def write_dataset(folder: Path, examples: list[SyntheticExample]) -> Path:
    """Write conversations as a user's data set: image files and one JSON line each."""
    rows: list[str] = []
    for index, example in enumerate(examples):
        name = f"{index:05d}.png"
        user_message, assistant_message = example.messages
        text_parts = [part for part in user_message["content"] if part["type"] == "text"]
        (image,) = [part["image"] for part in user_message["content"] if part["type"] == "image"]
        Image.fromarray(image).save(folder / name)
        content = [{"type": "image", "image": name}, *text_parts]
        rows.append(
            json.dumps({"messages": [{"role": "user", "content": content}, assistant_message]})
        )
    path = folder / "letters.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def character_error_rate(model: str | Path, examples: list[SyntheticExample]) -> float:
    """Return a model's character error rate on single lines."""
    llm = qwen2vl.LLM(model)
    params = qwen2vl.SamplingParams(max_tokens=64, temperature=0)
    answers = llm.chat([example.prompt for example in examples], params)
    references = [example.truth[0].answer for example in examples]
    num_errors = sum(
        edit_distance(normalize_answer(answer.text), normalize_answer(reference))
        for answer, reference in zip(answers, references, strict=True)
    )
    return num_errors / sum(len(normalize_answer(reference)) for reference in references)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--minutes-per-run", type=float, default=0.5)
    parser.add_argument("--font", default="EBGaramond12-Regular.otf")
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    test_examples = render_examples(TEST_SEED, args.questions, args.font, (1, 1))
    cer_before = character_error_rate("nano", test_examples)
    print(f"nano: character error rate {cer_before:.1%}", flush=True)
    numbers: dict[str, Any] = {"font": args.font, "before": round(cer_before, 4), "curve": []}
    spent, cer_after = 0.0, cer_before
    with tempfile.TemporaryDirectory(prefix="lora-nano-") as name:
        folder = Path(name)
        data = write_dataset(
            folder, render_examples(TRAIN_SEED, args.examples, args.font, PAGE_LINES)
        )
        overrides = [
            "model=nano",
            f"data={data}",
            f"data.cache_dir={folder}/cache",
            f"output_dir={folder}/run",
        ]
        config = override(
            lora.recipe(), [*overrides, *SETTINGS, f"max_minutes={args.minutes_per_run}"]
        )
        while spent < 60 * args.minutes and cer_after > cer_before / 2:
            start = time.monotonic()
            model = train(config)
            spent += time.monotonic() - start
            cer_after = character_error_rate(model, test_examples)
            numbers["curve"].append([round(spent / 60, 2), round(cer_after, 4)])
            print(f"{spent / 60:5.1f} min  {model.name}  {cer_after:.1%}", flush=True)
    numbers |= {"after": round(cer_after, 4), "minutes": round(spent / 60, 2)}
    print(format_result({**numbers, "is_halved": cer_after <= cer_before / 2}))


if __name__ == "__main__":
    main()
