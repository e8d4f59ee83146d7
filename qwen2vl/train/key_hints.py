"""Key hints: the answer to an unknown `key=value`, also where the key is another trainer's name.

    learning_rate=2e-4          write optim.lr=2e-4
    warmup_ratio=0.03           write optim.warmup_steps=15, which is 0.03 of 500 steps
    per_device_train_batch_size=8    a step has 1 bin of up to 8,192 tokens; write data.global_...

Names of transformers (TrainingArguments, TRL, PEFT), axolotl, LLaMA-Factory and ms-swift. They are
answered, not accepted: several of them mean something else there, such as a batch size in
conversations, and one spelling of a setting is enough in scripts and in logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2vl.train.config import TrainConfig

__all__ = ["SHORT_KEYS", "describe_unknown_key"]

# Keys of the command line that are no field of TrainConfig.
SHORT_KEYS = ("data", "epochs", "model", "validation")

# Key here -> its names elsewhere, with the same meaning and the same values.
_NAMES_ELSEWHERE = {
    "optim.lr": "lr learning_rate",
    "optim.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "optim.weight_decay": "wd",
    "optim.max_grad_norm": "gradient_clipping clip_grad grad_clip max_norm",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.decay_type": "lr_scheduler_type lr_scheduler scheduler",
    "adapter.rank": "r lora_r lora_rank lora_dim",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "lora_target lora_target_modules",
    "adapter.init": "adapter_name_or_path lora_model_dir adapters",
    "data": "dataset dataset_name dataset_path dataset_dir datasets data_path data_file train_file",
    "model": "model_name_or_path model_path base_model model_id model_name pretrained",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "validation": "val_set_size val_size split_dataset_ratio test_size validation_split eval_split "
    "eval_dataset val_dataset validation_file",
    "output_dir": "output out output_path save_dir",
    "evaluation.eval_steps": "evaluation_steps eval_every eval_interval val_interval",
    "logging_steps": "log_steps log_interval log_every",
    "save_steps": "checkpoint_steps save_interval save_every",
    "save_total_limit": "keep_checkpoints max_checkpoints",
    "num_workers": "dataloader_num_workers workers",
    "num_threads": "threads torch_num_threads",
    "seed": "random_seed",
    "compile": "torch_compile",
    "report_to": "logger",
    "name": "run_name",
    "gradient_accumulation_steps": "grad_accum grad_accumulation gradient_accumulation accum_steps",
}
_KEY_OF = {other: key for key, names in _NAMES_ELSEWHERE.items() for other in names.split()}

# Names elsewhere that are set otherwise here -> the answer.
_ANSWERS: dict[str, str] = {}
for _names, _text in {
    "cutoff_len max_length max_seq_length max_seq_len model_max_length sequence_len seq_len": (
        "conversations are packed into bins and never cut; write data.max_tokens=N, the tokens of "
        "a bin, and data.oversize=resize or drop for those that are larger"
    ),
    "gradient_checkpointing activation_checkpoint": (
        "write activation_checkpointing.text=full for the decoder and "
        "activation_checkpointing.visual=full for the vision tower"
    ),
    "bf16 mixed_precision precision torch_dtype": (
        "write dtype=bfloat16 (the default: float32 weights, bfloat16 matmuls) or dtype=float32"
    ),
    "fp16 float16": "there is no float16 training; write dtype=bfloat16 or dtype=float32",
    "packing sample_packing": "sequence packing is always on; data.max_tokens=N sets a bin's size",
    "load_in_4bit load_in_8bit quantization_bit quant_bits": (
        "4-bit base weights are the recipe qlora, or adapter.quantize_base=nf4_double"
    ),
    "resume resume_from_checkpoint": (
        "the same command resumes from the last checkpoint in its output_dir"
    ),
    "overwrite_output_dir": (
        "a run resumes what its folder holds; write output_dir=FOLDER to begin another"
    ),
    "finetuning_type train_type tuner use_lora lora": (
        "the recipe sets it: qwen2vl train lora, qlora or full_finetune"
    ),
    "freeze_vit freeze_vision_tower freeze_vision freeze_llm freeze_aligner": (
        r"write stages.0.rules=[PATTERN, MULTIPLE OF THE LEARNING RATE] pairs, 0 freezes, as "
        r"""'stages.0.rules=[["visual\\..*", 0], [".*", 1]]'"""
    ),
    "deepspeed fsdp num_gpus nproc_per_node": (
        "start the command with torchrun --nproc-per-node N -m qwen2vl train, which shards weights "
        "with FSDP2"
    ),
    "eval_strategy evaluation_strategy do_eval": (
        "write evaluation.eval_steps=N, and validation=0.05 or validation=FILE for stages with data"
    ),
    "save_strategy": "write save_steps=N",
    "epochs": (
        "it depends on the data: `qwen2vl train` computes the steps, and in Python "
        "qwen2vl.train.epochs.set_epochs does"
    ),
    "max_samples num_samples": (
        "write data.sources.0.repeats=0.1 to use a fixed tenth of the samples in an epoch"
    ),
    "template chat_template": "the chat template is the model's; rows may hold OpenAI messages",
    "attn_implementation flash_attn": "attention has no option; the device decides",
}.items():
    _ANSWERS |= dict.fromkeys(_names.split(), _text)

_STEP_NAMES = ("steps", "max_steps", "num_steps", "num_train_steps", "train_steps", "total_steps")
_RATIO_NAMES = ("warmup_ratio", "warmup_fraction", "warmup")
_BATCH_NAMES = (
    *("batch_size", "micro_batch_size", "train_batch_size", "per_device_train_batch_size"),
    *("per_device_batch_size", "global_batch_size"),
)


def describe_unknown_key(config: TrainConfig, name: str, node: Any, *, key: str, value: str) -> str:
    """Return what to write instead of `key`, since `name`, a part of it, is no field of `node`.

    Args:
        config: of the run, which decides about the number of stages and of steps.
        name: the part of the key that is not known.
        node: the part of the config that has no field of this name.
        key: as it was given, with all its parts.
        value: as it was given.
    """
    if key.endswith(name):
        name = name.replace("-", "_").lower()
        if answer := _answer(config, name, value):
            return answer
        if paths := sorted(set(_paths_of(config, name))):
            return f"write {' or '.join(f'{path}={value}' for path in paths)}"
    names = [f.name for f in fields(node)] + list(SHORT_KEYS) * (node is config)
    matches = get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]}?" if matches else f"known are {', '.join(names)}"


def _answer(config: TrainConfig, name: str, value: str) -> str:
    """Return the answer to another trainer's name; empty if it is none."""
    if name in _STEP_NAMES:
        return _describe_steps(config, value)
    if name in _RATIO_NAMES:
        return _describe_warmup_ratio(config, value)
    if name in _BATCH_NAMES:
        return _describe_batch_size(config)
    if name in _ANSWERS:
        return _ANSWERS[name]
    key = _KEY_OF.get(name, "")
    if key.startswith("adapter.") and config.adapter is None:
        return f"{config.name} trains no adapter; the recipes lora and qlora have {key}={value}"
    return f"write {key}={value}" if key else ""


def _describe_steps(config: TrainConfig, value: str) -> str:
    stages = [(i, stage) for i, stage in enumerate(config.stages) if stage.steps]
    if len(stages) == 1:
        return f"write stages.{stages[0][0]}.steps={value}"
    keys = ", ".join(f"stages.{i}.steps={stage.steps} ({stage.name})" for i, stage in stages)
    return f"each stage of {config.name} has its own number: {keys}"


def _describe_warmup_ratio(config: TrainConfig, value: str) -> str:
    longest = max(stage.steps for stage in config.stages)
    try:
        steps = math.ceil(float(value) * longest)
    except (ValueError, OverflowError):
        return "write optim.warmup_steps=N, the steps at the start of each stage"
    return f"write optim.warmup_steps={steps}, which is {value} of {longest:,} steps"


def _describe_batch_size(config: TrainConfig) -> str:
    """Tell what a step has; a number of conversations becomes no number of bins."""
    stage = next(stage for stage in config.stages if stage.steps)
    if stage.data is None:
        index = config.stages.index(stage)
        return f"a step of {stage.name} has stages.{index}.global_batch_size=N conversations"
    return (
        f"conversations are packed into bins of up to {stage.data.max_tokens:,} tokens "
        f"(data.max_tokens), and a step has {stage.data.global_batch_size} of them over all GPUs; "
        "write data.global_batch_size=N, in bins"
    )


def _paths_of(config: TrainConfig, name: str) -> Iterator[str]:
    """Yield the keys of the parts of the config that have a field of this name."""
    parts: list[tuple[str, Any]] = [
        (f.name, getattr(config, f.name)) for f in fields(config) if f.name != "model"
    ]
    parts += [(f"stages.{i}", stage) for i, stage in enumerate(config.stages)]
    parts += [("data", stage.data) for stage in config.stages if stage.data is not None]
    for path, part in parts:
        if is_dataclass(part) and name in _field_names(part):
            yield f"{path}.{name}"


def _field_names(node: Any) -> Sequence[str]:
    return [f.name for f in fields(node)]
