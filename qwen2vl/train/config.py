"""Training configuration: one frozen TrainConfig, built by a recipe, with `key=value` overrides.

A run is a list of stages. A Stage sets which parameters are trained and at which multiple of the
learning rate (ordered rules, the first full match wins), what they are trained on (a Mixture of the
synthetic world, or data) and for how many steps. (Qwen2-VL sec. 2.2: the three published stages.)
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.data.config import DataConfig, SourceConfig, parse_sources
from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.synth import Mixture
from qwen2vl.train.key_hints import describe_unknown_key

__all__ = [
    "FROZEN",
    "ActivationCheckpointingConfig",
    "EvaluationConfig",
    "MeshConfig",
    "OptimConfig",
    "Rules",
    "Stage",
    "TrainConfig",
    "dump",
    "override",
]

FROZEN: float = 0.0  # the learning-rate multiple of frozen parameters

# What `validation=` sets where nothing else is given.
EVALUATIONS_PER_RUN = 10
MAX_VALIDATION_EXAMPLES = 256  # their batches are kept in memory

Rules = tuple[tuple[str, float], ...]
Node = TypeVar("Node")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. Muon updates the matrices in blocks, AdamW the rest."""

    name: Literal["muon", "adamw", "sgd"] = "muon"  # adamw, sgd: for every parameter
    lr: float = 2e-3  # peak; the multiple of a stage's rule scales it
    warmup_steps: int = 100  # at the start of each stage
    weight_decay: float = 0.01  # matrices only
    momentum: float = 0.95  # Muon, SGD
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW
    eps: float = 1e-8  # AdamW
    max_grad_norm: float = 1.0  # clip the global gradient norm to this
    decay_type: Literal["linear", "cosine"] = "linear"  # shape of a stage's LR decay
    min_lr_factor: float = 0.1  # of the peak LR, at the end of a stage's decay
    # Skip a step whose loss or norm is so many deviations above those of the last 128; 0 = off.
    spike_sigmas: float = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Device mesh: how the ranks that torchrun started shard and replicate the weights (FSDP2)."""

    dp_replicate: int = 1  # replicas, each sharded over world size / dp_replicate ranks
    frozen: Literal["shard", "replicate"] = "shard"  # parameters that every stage freezes
    reshard_after_forward: bool = True  # free a block's weights until its backward


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationCheckpointingConfig:
    """Activation checkpointing: which blocks recompute their activations in the backward."""

    visual: Literal["none", "full", "selective"] = "none"  # selective saves expensive outputs
    text: Literal["none", "full", "selective"] = "none"  # of the decoder blocks
    every_n_blocks: int = 1  # checkpoint one block of every n, store the others


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training: loss on held-out conversations, and the mini suite."""

    eval_steps: int = 500  # steps between two evaluations, one is after the last; 0 = never
    num_examples: int = 64  # held-out conversations; synthetic ones use another seed
    path: str = ""  # a file of held-out conversations, as of a source; needed for stages with data
    num_questions: int = 0  # of each part of the mini suite; 0 = do not run the suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a run: training data, trainable parameters, number of steps.

    Raises:
        ConfigError: there is neither a mixture nor data, or `steps` is negative.
    """

    name: str  # in reports and metrics
    steps: int  # optimizer steps
    global_batch_size: int = 0  # conversations in one optimizer step, with a mixture
    mixture: Mixture | None = None  # of the procedural world
    data: DataConfig | None = None  # read from files instead
    rules: Rules = ((r".*", 1.0),)  # (pattern, multiple of optim.lr, or FROZEN)
    decay_ratio: float = 0.0  # share of the steps, at the end, in which the LR decays
    min_pixels: int = 0  # of an image, in place of the model's own limit; 0 = the model's
    default_system: float = 0.3  # share of conversations with the default system prompt
    # Loss weight of a target: 1, 1 / (targets of its conversation), or the square root of that.
    weighting: Literal["token", "sample", "root"] = "root"

    def __post_init__(self) -> None:
        if self.mixture is None and self.data is None:
            raise ConfigError(f"stage {self.name}: give a mixture of the world, or data")
        if self.steps < 0:
            raise ConfigError(f"stage {self.name}: steps is {self.steps}, must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The configuration of one run; with the version of the code it determines every bit.

    Raises:
        ConfigError: no stage has a step, or a number is below its minimum.
    """

    name: str  # of the run's folder and in metrics
    stages: tuple[Stage, ...]  # in the order in which they run
    model: Qwen2VLConfig | None = None  # initialized at random, unless `init` is given
    init: str = ""  # pretrained model to start from, as in --model, with its config and tokenizer
    adapter: LoraConfig | None = None  # LoRA factors to train; the rules freeze the base weights
    num_merges: int = 0  # of a new model's BPE, learned from synthetic questions; 0 = bytes only
    min_pixels: int = 16 * 784  # of a randomly initialized model's preprocessor_config.json
    max_pixels: int = 1024 * 784  # of the same file
    output_dir: str = ""  # checkpoints and metrics; default runs/<name>
    seed: int = 0  # of weights, synthetic samples and the order of data
    optim: OptimConfig = OptimConfig()
    gradient_accumulation_steps: int = 1  # batches on each rank that share a step's global batch
    mesh: MeshConfig = MeshConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    # Of matmuls; weights stay float32. auto: bfloat16 where the device has it, else float32.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "cpu"  # cpu, cuda, cuda:1; under torchrun each rank takes its own GPU
    compile: bool = False  # torch.compile: half a minute to start, then about a quarter faster
    num_workers: int = 1  # data loader processes on each rank; 0 = in the training process
    num_threads: int = 0  # torch.set_num_threads; 0 = all available CPUs
    max_minutes: float = 0.0  # save a checkpoint and stop after this time; 0 = no limit
    logging_steps: int = 20  # steps between two log lines
    logging_seconds: float = 30.0  # on slow machines: log after this time, at the end of a step
    # metrics.jsonl is always written; "jsonl" writes nothing else.
    report_to: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"
    peak_tflops: float = 0.0  # of one device, for MFU; 0 = the published figure, where known
    evaluation: EvaluationConfig = EvaluationConfig()
    save_steps: int = 500  # steps between two checkpoints
    save_total_limit: int = 2  # checkpoints kept on disk

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError(
                f"run {self.name}: its stages have no step to take; give stages.0.steps=N"
            )
        minimums = {
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": 1,
        }
        for name, minimum in {
            **minimums,
            "logging_seconds": 0,
            "max_minutes": 0,
            "num_workers": 0,
            "num_threads": 0,
        }.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name):g}, must be {minimum} or more")

    @property
    def folder(self) -> str:
        """The folder of checkpoints and metrics."""
        return self.output_dir or f"runs/{self.name}"

    @property
    def steps(self) -> int:
        """The total number of optimizer steps."""
        return sum(stage.steps for stage in self.stages)


def dump(config: TrainConfig) -> str:
    """Return the resolved config as JSON, as every checkpoint stores it."""
    values = asdict(replace(config, model=None))
    values["model"] = config.model.to_dict("float32") if config.model else None
    return json.dumps(values, indent=1)


def override(config: Node, overrides: Sequence[str]) -> Node:
    """Apply `key=value` overrides such as `optim.lr=1e-3` or `stages.0.steps=500`.

    Values are parsed by the type of the field they replace. `stages.N.data=PATH` sets PATH as the
    only source, `PATH,PATH` several; `data=PATH` and `data.KEY=VALUE` apply to every stage that
    reads data; `model=FOLDER` sets `init`; `validation=0.05`, a number of conversations, or a file
    sets what stages with data are evaluated on (see `_set_validation`).

    Raises:
        ConfigError: no "=", an unknown key (the error names the right one), or a bad value.
    """
    validation: str | None = None
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r} has no '='; write key=value, as optim.lr=1e-3")
        if key == "validation" and isinstance(config, TrainConfig):
            validation = value
            continue
        for path in _expand_key(config, key):
            config = _replace_at(config, path, _Override(config, key, value))
    # Last, since the default of evaluation.eval_steps depends on the number of steps.
    if validation is not None:
        assert isinstance(config, TrainConfig)
        keys = {item.partition("=")[0] for item in overrides}
        return _set_validation(config, validation, keys)
    return config


class _Override(NamedTuple):
    """One override, for errors that name it and the remedy."""

    config: Any  # before it
    key: str
    value: str


def _set_validation(config: TrainConfig, value: str, given: Collection[str]) -> TrainConfig:
    """Hold conversations of the data out, or name a file of others, and evaluate on them.

    Settings of the evaluation that are not among the `given` keys follow: ten evaluations a run if
    the recipe has none, and of a split as many conversations as it has, 256 at most.
    """
    evaluation = config.evaluation
    if "evaluation.eval_steps" not in given and not 0 < evaluation.eval_steps <= config.steps:
        evaluation = replace(evaluation, eval_steps=-(-config.steps // EVALUATIONS_PER_RUN))
    try:
        size = float(value)
    except ValueError:
        size = 0.0
        evaluation = replace(evaluation, path=value)
    else:
        evaluation = replace(evaluation, path="")
        if "evaluation.num_examples" not in given:
            num_examples = int(size) if 1 <= size < math.inf else MAX_VALIDATION_EXAMPLES
            evaluation = replace(evaluation, num_examples=max(1, num_examples))
    if size and all(stage.data is None for stage in config.stages):
        raise ConfigError(
            f"validation={value}: no stage of {config.name} reads data; those of synthetic data "
            "are evaluated on samples of another seed (evaluation.eval_steps=N)"
        )
    stages = tuple(
        stage
        if stage.data is None
        else replace(stage, data=replace(stage.data, validation_size=size))
        for stage in config.stages
    )
    return replace(config, stages=stages, evaluation=evaluation)


def _expand_key(config: Any, key: str) -> list[list[str]]:
    """Expand the short keys: `data` of every stage that reads data, `model` to `init`."""
    path = key.split(".")
    if path == ["model"] and isinstance(config, TrainConfig):
        return [["init"]]
    if path[0] != "data" or not isinstance(config, TrainConfig):
        return [path]
    stage_paths = [
        ["stages", str(i), *path] for i, s in enumerate(config.stages) if s.data is not None
    ]
    if not stage_paths:
        raise ConfigError(
            f"override {key}: no stage of {config.name} reads data; write stages.0.data=FILE to "
            "let one do so"
        )
    return stage_paths


def _replace_at(node: Any, path: list[str], item: _Override) -> Any:
    """Return `node` with the field at `path` replaced."""
    head, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(_unknown_index(node, head, rest, item))
        i = int(head)
        return (*node[:i], _replace_at(node[i], rest, item), *node[i + 1 :])
    if head not in {f.name for f in fields(node)}:
        raise ConfigError(_unknown_key(node, head, item))
    current = getattr(node, head)
    field_type = get_type_hints(type(node))[head]
    if rest:
        if head == "adapter" and current is None:
            raise ConfigError(
                f"override {item.key}: {item.config.name} trains no adapter; use the recipe lora "
                "or qlora"
            )
        if not is_dataclass(current) and not isinstance(current, tuple):
            raise ConfigError(f"override {item.key}: {head!r} has no parts")
        return replace(node, **{head: _replace_at(current, rest, item)})
    if DataConfig in get_args(field_type):
        sources = parse_sources(item.value, item.key)
        data_config = (
            DataConfig(sources=sources) if current is None else replace(current, sources=sources)
        )
        return replace(node, **{head: data_config})
    if is_dataclass(current):
        names = [f.name for f in fields(current)]
        raise ConfigError(
            f"override {item.key}: it has the parts {', '.join(names)}; set one, as "
            f"{item.key}.{names[0]}={item.value}"
        )
    return replace(node, **{head: _parse_value(item.value, field_type, item.key)})


def _unknown_index(node: tuple[Any, ...], head: str, rest: list[str], item: _Override) -> str:
    """Name the items of a list, where the key has none of their numbers."""
    parents = item.key.split(".")
    parents = parents[: len(parents) - len(rest) - 1]
    items = f"{len(node)} item" + "s" * (len(node) != 1)
    example = ".".join([*parents, "0", *(rest if head.isdigit() else [head, *rest])])
    several = ""
    if parents[-1] == "sources":
        several = f", or give all sources at once: {'.'.join(parents[:-1])}=FILE,FILE"
    return (
        f"override {item.key}: {'.'.join(parents)} has {items}, numbered from 0, and {head!r} is "
        f"no such number; write {example}={item.value}{several}"
    )


def _unknown_key(node: Any, head: str, item: _Override) -> str:
    text = f"override {item.key}: unknown key {head!r}; "
    if isinstance(item.config, TrainConfig):
        return text + describe_unknown_key(item.config, head, node, key=item.key, value=item.value)
    return text + f"known are {', '.join(f.name for f in fields(node))}"


def _parse_value(value: str, field_type: Any, key: str) -> Any:
    """Parse `value` as the type that the field declares."""
    if get_origin(field_type) is Literal:
        choices = get_args(field_type)
        if value not in choices:
            raise ConfigError(f"override {key}: {value!r} is not one of {', '.join(choices)}")
        return value
    if get_origin(field_type) in (Union, types.UnionType):
        field_type = next(arg for arg in get_args(field_type) if arg is not type(None))
    if field_type is str:
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if get_origin(field_type) is tuple and isinstance(parsed, list):
        is_sources = SourceConfig in get_args(field_type)
        return parse_sources(value, key) if is_sources else _as_tuples(parsed)
    if isinstance(parsed, Mapping) and get_origin(field_type) in (dict, Mapping):
        return parsed
    if field_type is float and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return float(parsed)
    if isinstance(field_type, type) and type(parsed) is field_type:
        return parsed
    raise ConfigError(f"override {key}: {value!r} is not {_describe_type(value, field_type, key)}")


def _describe_type(value: str, field_type: Any, key: str) -> str:
    """Describe the type of a field, and how a list is written; of names, with those in `value`."""
    if get_origin(field_type) is not tuple:
        return f"of type {getattr(field_type, '__name__', field_type)}"
    names = [name.strip(" []()'\"") for name in value.split(",")]
    example = json.dumps([name for name in names if name] or ["A", "B"])
    if key.endswith("rules"):
        example = '[["PATTERN", MULTIPLE], ...]'
    return f"a list; write it as JSON, in quotes: '{key}={example}'"


def _as_tuples(value: Any) -> Any:
    """Turn JSON lists into tuples, as the fields of `rules` are."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
