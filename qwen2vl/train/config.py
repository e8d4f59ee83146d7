"""What a run is: one frozen TrainConfig, built by a recipe, overridden by `key=value` words.

A run is a list of stages. A stage says which parameters move (ordered rules, first full match
wins), what the world shows (a Mixture) and for how long. It must not know how anything is done.
(Qwen2-VL sec. 2.2: the three published stages.) Next room: schedule.py.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.data.config import DataConfig, Source
from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.synth import Mixture

__all__ = [
    "FROZEN",
    "MeshConfig",
    "OptimConfig",
    "ProbeConfig",
    "RecomputeConfig",
    "Rules",
    "Stage",
    "TrainConfig",
    "dump",
    "override",
]

FROZEN: float = 0.0  # a rule's rate that keeps its parameters as they are

Rules = tuple[tuple[str, float], ...]
Node = TypeVar("Node")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """How weights move. By Muon: the matrices inside blocks, and by AdamW everything else."""

    method: Literal["muon", "adamw", "sgd"] = "muon"  # the last two move everything alike
    lr: float = 2e-3  # peak; a rule's number multiplies it
    warmup: int = 100  # steps, at the start of each stage
    weight_decay: float = 0.01  # matrices only
    momentum: float = 0.95  # Muon, SGD
    beta1: float = 0.9  # AdamW
    beta2: float = 0.98  # AdamW
    eps: float = 1e-8  # AdamW
    clip: float = 1.0  # largest norm of all gradients together
    fall: Literal["linear", "cosine"] = "linear"  # shape of a stage's decay
    floor: float = 0.1  # of the peak rate, where a stage's decay ends
    spike_sigmas: float = 6.0  # a loss or norm this far above the last 128 moves nothing; 0 = off


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How the processes of one run, as torchrun starts them, share the weights."""

    replicate: int = 1  # copies of the whole model, each sharded over ranks / replicate
    frozen: Literal["shard", "replicate"] = "shard"  # what no stage of the run moves
    reshard: bool = True  # free a block's weights between forward and backward


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeConfig:
    """What the backward computes again instead of keeping it (activation checkpointing)."""

    visual: Literal["none", "block", "selective"] = "none"  # selective keeps what is dear
    text: Literal["none", "block", "selective"] = "none"
    every: int = 1  # one block of so many is computed again, the others are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """What a run is asked between steps, on conversations it does not learn from."""

    every: int = 500  # steps; 0 = never
    examples: int = 64  # conversations; of the world, others than training sees
    path: str = ""  # a file of conversations instead, as in Source; a stage with data needs one
    questions: int = 0  # of each part of the mini suite; 0 = leave the suite out


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of a run: what is shown, what may move, for how many steps.

    Raises:
        ConfigError: there is nothing to show.
    """

    name: str
    steps: int
    examples: int = 0  # conversations in one optimizer step, where a mixture is shown
    mixture: Mixture | None = None  # what the procedural world shows
    data: DataConfig | None = None  # what is read instead
    rules: Rules = ((r".*", 1.0),)  # (pattern, multiple of optim.lr, or FROZEN)
    decay: float = 0.0  # share of the steps, at the end, in which the rate falls to optim.floor
    min_pixels: int = 0  # of a picture, instead of the model's own limit; 0 = the model's
    default_system: float = 0.3  # share of conversations with the default system sentence
    # Weight of a target: 1, or 1 / (targets of its conversation), or the root of that.
    weighting: Literal["token", "sample", "root"] = "root"

    def __post_init__(self) -> None:
        if self.mixture is None and self.data is None:
            raise ConfigError(f"stage {self.name}: give a mixture of the world, or data")
        if self.steps < 0:
            raise ConfigError(f"stage {self.name}: steps is {self.steps}, must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run, complete: with the code's version it determines every bit of the result.

    Raises:
        ConfigError: there is no step to take, or a number that means nothing.
    """

    name: str
    stages: tuple[Stage, ...]
    model: Qwen2VLConfig | None = None  # built fresh from this, unless `init` is given
    init: str = ""  # a model to start from, as in --model; its config and tokenizer are kept
    adapter: LoraConfig | None = None  # low-rank factors to train; rules freeze what is beneath
    min_pixels: int = 16 * 784  # of a fresh model's preprocessor_config.json
    max_pixels: int = 1024 * 784
    out: str = ""  # where checkpoints go; default runs/<name>
    seed: int = 0
    optim: OptimConfig = OptimConfig()
    accumulate: int = 1  # batches in one optimizer step and rank; they share the step's examples
    mesh: MeshConfig = MeshConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the products; weights stay float32
    device: str = "cpu"
    compile: bool = False  # fused kernels: half a minute to begin, then about a quarter faster
    workers: int = 1  # processes that render and pack; 0 = inside the loop
    threads: int = 0  # compute threads; 0 = torch's choice
    minutes: float = 0.0  # stop with a checkpoint after so long; 0 = run to the end
    log_every: int = 20  # steps
    log: Literal["jsonl", "tensorboard", "wandb"] = "jsonl"  # where else; JSON lines in any case
    peak_tflops: float = 0.0  # of one device, for MFU; 0 = as published, where it is known
    probe: ProbeConfig = ProbeConfig()
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints that stay on disk

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigError(
                f"run {self.name}: its stages have no step to take; give stages.0.steps=N"
            )
        least = {"accumulate": 1, "log_every": 1, "save_every": 1, "keep": 1}
        for name, low in {**least, "minutes": 0, "workers": 0, "threads": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name} is {getattr(self, name):g}, must be {low} or more")

    @property
    def folder(self) -> str:
        """Where this run keeps its checkpoints and metrics."""
        return self.out or f"runs/{self.name}"

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def dump(config: TrainConfig) -> str:
    """Write the resolved config as JSON, as it is kept beside every checkpoint."""
    plain = asdict(replace(config, model=None))
    plain["model"] = config.model.to_dict("float32") if config.model else None
    return json.dumps(plain, indent=1)


def override(config: Node, words: Sequence[str]) -> Node:
    """Apply `key=value` words such as `optim.lr=1e-3` or `stages.2.steps=500`.

    Values are parsed by the type of the field they replace. A path stands for data with this one
    source; `data=PATH` and `data.KEY=VALUE` mean every stage that reads data, and `model=FOLDER`
    the model to start from.

    Raises:
        ConfigError: a word without "=", an unknown key (the nearest is named), a bad value.
    """
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"override {word!r} has no '='; write key=value, as optim.lr=1e-3")
        for path in _paths(config, key):
            config = _put(config, path, value, key)
    return config


def _paths(config: Any, key: str) -> list[list[str]]:
    """Spell short words out: `data` is that of every stage that has any, `model` is `init`."""
    path = key.split(".")
    if path == ["model"] and isinstance(config, TrainConfig):
        return [["init"]]
    if path[0] != "data" or not isinstance(config, TrainConfig):
        return [path]
    reading = [["stages", str(i), *path] for i, s in enumerate(config.stages) if s.data is not None]
    if not reading:
        raise ConfigError(
            f"override {key}: no stage of {config.name} reads data; write stages.0.data=FILE to "
            "let one do so"
        )
    return reading


def _put(node: Any, path: list[str], value: str, key: str) -> Any:
    """Rebuild `node` with the field at `path` replaced."""
    head, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(f"override {key}: {head!r} is not one of 0 to {len(node) - 1}")
        i = int(head)
        return (*node[:i], _put(node[i], rest, value, key), *node[i + 1 :])
    names = [f.name for f in fields(node)]
    if head not in names:
        names += ["data"] * isinstance(node, TrainConfig)  # a short word, see `_paths`
        near = get_close_matches(head, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
        if isinstance(node, TrainConfig) and head in {f.name for f in fields(Stage)}:
            hint = f"it belongs to a stage, the first's is stages.0.{head}"
        raise ConfigError(f"override {key}: unknown key {head!r}; {hint}")
    old = getattr(node, head)
    if rest:
        if not is_dataclass(old) and not isinstance(old, tuple):
            raise ConfigError(f"override {key}: {head!r} has no parts")
        return replace(node, **{head: _put(old, rest, value, key)})
    kind = get_type_hints(type(node))[head]
    if DataConfig in get_args(kind):
        sources = (Source(path=value),)
        new = DataConfig(sources=sources) if old is None else replace(old, sources=sources)
        return replace(node, **{head: new})
    return replace(node, **{head: _parse(value, kind, key)})


def _parse(value: str, kind: Any, key: str) -> Any:
    """Read `value` as the type the field declares."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            raise ConfigError(f"override {key}: {value!r} is not one of {', '.join(choices)}")
        return value
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    if kind is str:
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if get_origin(kind) is tuple and isinstance(parsed, list):
        return _as_tuples(parsed)
    if isinstance(parsed, Mapping) and get_origin(kind) in (dict, Mapping):
        return parsed
    if kind is float and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return float(parsed)
    if isinstance(kind, type) and type(parsed) is kind:
        return parsed
    raise ConfigError(f"override {key}: {value!r} is not a {getattr(kind, '__name__', kind)}")


def _as_tuples(value: Any) -> Any:
    """Rules are tuples of tuples; JSON knows lists only."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
