"""Key hints: names of other trainers are answered with the key here, and the answer works."""

from __future__ import annotations

import re

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.recipes import load_recipe
from qwen2vl.train import key_hints
from qwen2vl.train.config import override


def answer(recipe: str, item: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(load_recipe(recipe), [item])
    return str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "item", "expected"),
    [
        ("lora", "lr=3e-3", "write optim.lr=3e-3"),
        ("lora", "learning_rate=2e-4", "write optim.lr=2e-4"),
        ("lora", "optim.learning_rate=2e-4", "write optim.lr=2e-4"),
        ("lora", "Learning-Rate=2e-4", "write optim.lr=2e-4"),
        ("lora", "num_train_epochs=3", "write epochs=3"),
        ("lora", "max_steps=60", "write stages.0.steps=60"),
        ("lora", "warmup_steps=5", "write optim.warmup_steps=5"),
        ("lora", "warmup_ratio=0.03", "write optim.warmup_steps=15, which is 0.03 of 500 steps"),
        ("lora", "warmup_ratio=x", "write optim.warmup_steps=N"),
        ("lora", "weight_decay=0.1", "write optim.weight_decay=0.1"),
        ("lora", "lora_r=8", "write adapter.rank=8"),
        ("lora", "lora_rank=8", "write adapter.rank=8"),
        ("lora", "lora_alpha=8", "write adapter.alpha=8"),
        ("lora", "output=x", "write output_dir=x"),
        ("lora", "eval_steps=10", "write evaluation.eval_steps=10"),
        ("lora", "val_set_size=0.05", "write validation=0.05"),
        ("lora", "dataset=a.jsonl", "write data=a.jsonl"),
        ("lora", "model_name_or_path=nano", "write model=nano"),
        ("lora", "bf16=true", "write dtype=bfloat16"),
        ("lora", "cutoff_len=2048", "write data.max_tokens=N"),
        ("lora", "data.max_length=2048", "write data.max_tokens=N"),
        ("lora", "gradient_checkpointing=true", "write activation_checkpointing.text=full"),
        ("lora", "epochs=3", "`qwen2vl train` computes the steps"),
        (
            "lora",
            "per_device_train_batch_size=4",
            "bins of up to 8,192 tokens (data.max_tokens), and a step has 1 of them over all GPUs; "
            "write data.global_batch_size=N, in bins",
        ),
        ("full_finetune", "lora_r=8", "full_finetune trains no adapter; the recipes lora and"),
        ("tiny", "batch_size=4", "a step of words has stages.0.global_batch_size=N"),
        (
            "tiny",
            "max_steps=4",
            "each stage of tiny has its own number: stages.0.steps=10 (words), stages.1.steps=10",
        ),
        ("lora", "rank=8", "write adapter.rank=8"),
        ("lora", "oversize=drop", "write data.oversize=drop"),
        ("lora", "decay_ratio=0.5", "write stages.0.decay_ratio=0.5"),
        ("lora", "adaptr.rank=8", "did you mean adapter?"),
    ],
)
def test_the_right_key_is_named(recipe: str, item: str, expected: str) -> None:
    assert expected in answer(recipe, item)


# Keys that do not take a 2.
VALUES = {
    "adapter.target_modules": '["visual.*"]',
    "compile": "true",
    "optim.decay_type": "linear",
    "report_to": "jsonl",
}


@pytest.mark.parametrize("name", sorted(key_hints._KEY_OF))
def test_every_answer_with_a_key_is_accepted(name: str) -> None:
    key = key_hints._KEY_OF[name]
    value = VALUES.get(key, "2")
    written = re.search(r"write (\S+=.+)$", answer("lora", f"{name}={value}"))
    assert written is not None
    if key != "epochs":  # needs the data, see test_epochs.py
        override(load_recipe("lora"), [written[1]])


def test_names_are_listed_once() -> None:
    names = [name for names in key_hints._NAMES_ELSEWHERE.values() for name in names.split()]
    names += [*key_hints._ANSWERS, *key_hints._STEP_NAMES, *key_hints._BATCH_NAMES]
    assert len(set(names)) == len(names)
