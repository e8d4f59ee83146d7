"""Sample checks of a dry run: samples of every source are decoded and prepared, as in training.

Measuring reads headers only, so that a damaged image is first found when it is decoded. A dry run
prepares the first sample of a source, some at equal distances after it, and those with the highest
vision cost, and compares their lengths with the measured ones. Those that fail are bad samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen2vl.data.bin_planner import describe_remedy
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.preprocess import BadSample
from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import ModelInput

__all__ = ["SampleCheck", "check_samples", "choose_entries", "raise_if_bad"]

NUM_SPREAD = 8  # samples of each source, at equal distances
NUM_COSTLIEST = 2  # samples of each source, of the highest vision cost
MAX_NAMED_SAMPLES = 3  # that an error lists


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCheck:
    """What came of the samples that a dry run prepared."""

    num_checked: int
    bad: Sequence[BadSample]  # good by their headers
    max_bad_fraction: float  # of the data config
    shown: Sequence[tuple[str, ModelInput]]  # a few good ones of each source, by name


def check_samples(dataset: PackedDataset, num_shown: int) -> SampleCheck:
    """Decode and prepare samples of every source.

    Args:
        dataset: of a stage.
        num_shown: samples of each source to return.
    """
    bad: list[BadSample] = []
    shown: list[tuple[str, ModelInput]] = []
    num_checked = 0
    for first, last in zip(
        dataset.offsets[:-1].tolist(), dataset.offsets[1:].tolist(), strict=True
    ):
        good: list[tuple[str, ModelInput]] = []
        for entry in choose_entries(dataset.tokens[first:last], _vision_cost(dataset, first, last)):
            num_checked += 1
            examples, failed = dataset.read([first + entry])
            bad += failed
            _, name = dataset.name_of(first + entry)
            good += [(name, example.input) for example in examples]
        shown += [good[i] for i in _spread(len(good), num_shown)]
    return SampleCheck(
        num_checked=num_checked,
        bad=bad,
        max_bad_fraction=dataset.data.max_bad_fraction,
        shown=shown,
    )


def choose_entries(tokens: np.ndarray, vision_cost: np.ndarray) -> list[int]:
    """Choose the samples of a source to prepare, in the order of the file.

    Args:
        tokens: (number of samples,), 0 for a bad or dropped one, which is not chosen.
        vision_cost: (number of samples,).
    """
    good = np.flatnonzero(tokens)
    spread = good[_spread(len(good), NUM_SPREAD)]
    costliest = good[np.argsort(-vision_cost[good], kind="stable")[:NUM_COSTLIEST]]
    return sorted({*spread.tolist(), *costliest.tolist()})


def raise_if_bad(check: SampleCheck) -> None:
    """Refuse data of whose prepared samples more are bad than the limit allows.

    Raises:
        InputError: too many; the first few are named.
    """
    if len(check.bad) <= check.max_bad_fraction * check.num_checked:
        return
    names = "; ".join(f"{sample.id}: {sample.text}" for sample in check.bad[:MAX_NAMED_SAMPLES])
    raise InputError(
        f"{len(check.bad):,} of {check.num_checked:,} samples that were decoded are bad, the limit "
        f"is {check.max_bad_fraction:.2%}; {names}; "
        f"{describe_remedy(len(check.bad), check.num_checked)}"
    )


def _spread(num: int, num_chosen: int) -> list[int]:
    """Choose indices below `num` at equal distances, the first and the last among them."""
    if num <= num_chosen:
        return list(range(num))
    return np.linspace(0, num - 1, num_chosen).round().astype(np.int64).tolist()


def _vision_cost(dataset: PackedDataset, first: int, last: int) -> np.ndarray:
    return np.concatenate([table.vision for table in dataset.lengths])[first:last]
