"""Preconditions of a run, checked by the run and its dry run before anything is announced or read.

Local data files, packaged datasets, the adapter to start from and the package of `report_to` must
exist; addresses of remote data are first looked up when the data are opened.
"""

from __future__ import annotations

from pathlib import Path

from qwen2vl.data.sources.packaged import TRAINING_SETS, is_packaged
from qwen2vl.data.sources.source import check_packaged_source
from qwen2vl.data.storage import Storage
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.logging.loggers import check_logger_package
from qwen2vl.weights import read_adapter

__all__ = ["check_preconditions"]


def check_preconditions(config: TrainConfig, recipe: TrainConfig) -> None:
    """Check that what a run reads exists, and that its metrics can be logged.

    Args:
        config: of the run.
        recipe: the same before any override: its own data files are only examples of paths.

    Raises:
        InputError: a file of the data or of the evaluation does not exist.
        CheckpointError: `adapter.init` is no folder of an adapter.
        ConfigError: the package of `report_to` is not installed; a packaged dataset was not
            fetched, must not be trained on, was given a media_root, or is to be evaluated on.
    """
    check_logger_package(config)
    for stage_index, stage in enumerate(config.stages):
        if stage.steps:
            _check_data(config, stage, recipe.stages[stage_index])
    _check_validation(config.evaluation.path)
    if config.adapter is not None and config.adapter.init:
        read_adapter(config.adapter.init)  # headers only


def _check_validation(path: str) -> None:
    """Check that the evaluation reads a file; a name of a dataset would open its training set."""
    if is_packaged(path):
        raise ConfigError(
            f"validation={path}: is the name of a dataset of `qwen2vl fetch-data`, which can only "
            "be given as data; give validation=0.05 to hold a share of the data out, or "
            f"./{path} for a file or folder of that name"
        )
    if path and not _exists(path):
        raise InputError(
            f"validation={path}: no such file; give a file of conversations, or validation=0.05 "
            "to hold a share of the data out"
        )


def _check_data(config: TrainConfig, stage: Stage, recipe_stage: Stage) -> None:
    sources = () if stage.data is None else stage.data.sources
    for source in sources:
        if is_packaged(source.path):
            check_packaged_source(source)
            continue
        if not source.path or _exists(source.path):
            continue
        if recipe_stage.data is not None and recipe_stage.data.sources == sources:
            raise InputError(
                f"{config.name} reads data: give data=FILE, since {source.path}, which its recipe "
                "names, does not exist"
            )
        raise InputError(
            f"{source.path}: no such file; check the path, or give the name of a training set of "
            f"`qwen2vl fetch-data`: {', '.join(TRAINING_SETS)}"
        )


def _exists(path: str) -> bool:
    """Return whether a local path or pattern names something; addresses are not looked up."""
    if "://" in path or Path(path).expanduser().exists():
        return True
    return "*" in path and bool(Storage().list_files(path, ()))
