"""Where a run's lines go besides its JSON file: TensorBoard, or Weights & Biases.

A line is nested; what they show are numbers with a name, so "families" of a line becomes curves
such as `families/text/loss`. Both are extras of the package, imported when a config asks for them
(`log=tensorboard`). It must not know what the numbers mean. Back up: metrics.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2vl.errors import ConfigError
from qwen2vl.train.config import TrainConfig, dump

__all__ = ["Sink", "open_sinks", "scalars"]

Sink = Callable[[Mapping[str, Any]], None]


def open_sinks(config: TrainConfig) -> list[Sink]:
    """Open what `config.log` names; a run that is resumed goes on in the same curves.

    Raises:
        ConfigError: its package is not installed.
    """
    if config.log == "tensorboard":
        return [_tensorboard(Path(config.folder) / "tensorboard")]
    if config.log == "wandb":
        return [_wandb(config)]
    return []


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a line into finite numbers, named by their path."""
    return {name: value for name, value in _walk(line, "") if math.isfinite(value)}


def _walk(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}/{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _tensorboard(folder: Path) -> Sink:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(str(folder))

    def write(line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _wandb(config: TrainConfig) -> Sink:
    try:
        import wandb  # type: ignore[import-not-found] - an extra
    except ImportError as error:
        raise _missing("wandb") from error
    folder = Path(config.folder)
    run = wandb.init(
        project="qwen2vl",
        name=config.name,
        # The same folder is the same run, so that a leg after the first goes on in its curves.
        id=hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(folder),
        config=json.loads(dump(config)),
    )

    def write(line: Mapping[str, Any]) -> None:
        run.log(scalars(line), step=line["step"])

    return write


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f"log={package}: the package {package} is not installed; "
        f"pip install 'qwen2vl[{package}]', or leave log= out: metrics.jsonl is always written"
    )
