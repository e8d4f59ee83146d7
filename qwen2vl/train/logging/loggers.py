"""Metric loggers besides metrics.jsonl: TensorBoard and Weights & Biases.

A record is nested and loggers take named scalars, so that "families" of a record becomes curves
such as `families/text/loss`. Both packages are extras, imported if a config asks for them
(`report_to=tensorboard`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.errors import ConfigError

if TYPE_CHECKING:  # imports torch, which `qwen2vl plot` does not need
    from qwen2vl.train.config import TrainConfig

__all__ = ["MetricLogger", "check_logger_package", "flatten_scalars", "open_loggers"]

MetricLogger = Callable[[Mapping[str, Any]], None]


def open_loggers(config: TrainConfig) -> list[MetricLogger]:
    """Open the logger that `config.report_to` names; a resumed run continues its curves.

    Raises:
        ConfigError: its package is not installed.
    """
    if config.report_to == "tensorboard":
        return [_tensorboard_logger(Path(config.folder) / "tensorboard")]
    if config.report_to == "wandb":
        return [_wandb_logger(config)]
    return []


def check_logger_package(config: TrainConfig) -> None:
    """Check that the package of `config.report_to` is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    if config.report_to != "jsonl" and find_spec(config.report_to) is None:
        raise _missing_package(config.report_to)


def flatten_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a record into finite scalars, named by their path."""
    return {name: value for name, value in _flatten(record, "") if math.isfinite(value)}


def _flatten(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(child, f"{path}/{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _tensorboard_logger(folder: Path) -> MetricLogger:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise _missing_package("tensorboard") from error
    writer = SummaryWriter(str(folder))

    def write(record: Mapping[str, Any]) -> None:
        for name, value in flatten_scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def _wandb_logger(config: TrainConfig) -> MetricLogger:
    try:
        import wandb  # type: ignore[import-not-found] - an extra
    except ImportError as error:
        raise _missing_package("wandb") from error
    from qwen2vl.train.config import dump

    folder = Path(config.folder)
    run = wandb.init(
        project="qwen2vl",
        name=config.name,
        # The run id is derived from the folder, so that a resumed run continues its curves.
        id=hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(folder),
        config=json.loads(dump(config)),
    )

    def write(record: Mapping[str, Any]) -> None:
        run.log(flatten_scalars(record), step=record["step"])

    return write


def _missing_package(package: str) -> ConfigError:
    return ConfigError(
        f"report_to={package}: the package {package} is not installed; "
        f"pip install 'qwen2vl[{package}]', or omit report_to=: metrics.jsonl is always written"
    )
