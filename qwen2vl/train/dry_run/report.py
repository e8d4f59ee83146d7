"""What a run would do, found out without a model: `qwen2vl train RECIPE --dry-run`.

Data are opened, measured and packed as for the run itself, so a dry run is also the preparation of
a real one. It tells what comes how often, what is bad, how full and how even bins are, how long a
pass is, what a step takes of a rank's memory, and shows samples token by token, with what is learned
from. It must not know weights. Next room: cli/dry_run.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from qwen2vl.data.dataset import Corpus
from qwen2vl.data.lengths import Progress
from qwen2vl.data.preprocess import rounded
from qwen2vl.errors import ConfigError
from qwen2vl.loading import load_processor
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.dry_run.activation_memory import Shape
from qwen2vl.train.dry_run.memory import Memory, bare_model, memory_of_step
from qwen2vl.train.init import fresh_processor
from qwen2vl.train.loader.data_order import check_shares, stage_seed
from qwen2vl.train.loader.dataloader import Batches, processor_of, workers_here
from qwen2vl.train.optim.optimizers import check_moves

__all__ = [
    "Piece",
    "SourceFacts",
    "StageFacts",
    "check_run",
    "memory_of_world",
    "open_processor",
    "pieces",
    "preview",
    "seconds_left",
]

RANKS = (2, 4, 8)  # that the balance is told for
ALONE_AND_TOGETHER = (1, 8)  # ranks that memory is told for


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """One source, as a stage will read it."""

    name: str
    samples: int
    entries: int  # in a pass
    tokens: int  # of a pass
    targets: int  # of a pass
    bad: Mapping[str, int]  # reason -> samples


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """One stage that reads data."""

    name: str
    steps: int
    sources: Sequence[SourceFacts]
    bins: int  # of a pass
    bins_per_step: int
    max_tokens: int
    fill: float  # share of the bins' capacity that holds tokens
    imbalance: Mapping[int, float]  # ranks -> the tower's time over that of equal shares
    shrunk: int  # samples whose pictures are made smaller to fit
    tokens_per_step: float
    memory: Mapping[int, Memory]  # ranks -> what a step takes of each
    samples: Sequence[tuple[str, ModelInput]]  # a few, to be looked at

    @property
    def passes(self) -> float:
        """How often the stage goes through its data."""
        return self.steps * self.bins_per_step / self.bins


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighboring tokens of one kind, as text."""

    text: str
    learned: bool


def open_processor(config: TrainConfig) -> Processor:
    """Make what feeds the run's model, without the model.

    Raises:
        ConfigError: the run has nothing to begin from.
        CheckpointError: `init` names no folder with a model.
    """
    if config.init:
        return load_processor(config.init)
    if config.model is None:
        raise ConfigError(f"run {config.name}: nothing to begin from; give model=FOLDER")
    with tempfile.TemporaryDirectory() as folder:
        return fresh_processor(config, config.model, Path(folder) / "tokenizer")


def check_run(config: TrainConfig, processor: Processor) -> None:
    """Refuse what a run could not begin with, before anything is measured.

    Raises:
        ConfigError: a rule or a pattern of the adapter matches nothing, rules that leave nothing
            to move, or steps that cannot be shared.
    """
    model = bare_model(config, processor.config)
    for stage in config.stages:
        check_moves(model, stage)
    check_shares(config, int(os.environ.get("WORLD_SIZE", "1")))


def preview(
    config: TrainConfig,
    processor: Processor,
    *,
    show: int = 2,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[StageFacts]:
    """Prepare the data of each stage that reads any, and tell about them.

    Raises:
        InputError: data are missing, damaged, too large for a bin, or too many are bad.
    """
    for number, stage in enumerate(config.stages):
        if stage.data is None:
            continue
        corpus = Corpus.open(
            stage.data,
            processor_of(stage, processor),
            seed=stage_seed(config, number),
            default_system=stage.default_system,
            workers=workers_here(config),
            progress=progress,
        )
        memory = _memory(config, processor, stage, corpus)
        yield _facts(stage.name, stage.steps, corpus, memory, show)


def memory_of_world(config: TrainConfig, processor: Processor, number: int) -> dict[int, Memory]:
    """Predict for some numbers of ranks what a stage of the world takes, by its first step.

    Raises:
        ConfigError: as `memory_of_step`.
        FontError: a font of the world is not installed.
    """
    stage = config.stages[number]
    first = sum(before.steps for before in config.stages[:number]) * config.accumulate
    found: dict[int, Memory] = {}
    for ranks in _told_ranks(config):
        if stage.steps and stage.examples >= ranks * config.accumulate:
            batch = Batches(config, processor, {}, ranks=ranks)[first]
            shape = Shape.of(batch)
            found[ranks] = memory_of_step(config, processor.config, stage, shape, ranks=ranks)
    return found


def seconds_left(config: TrainConfig, tokens: float) -> float | None:
    """Estimate by the run's own last report; None where it has not reported yet."""
    path = Path(config.folder) / "metrics.jsonl"
    try:
        lines = map(json.loads, reversed(path.read_text(encoding="utf-8").splitlines()))
        # What a probe has found stands between reports.
        return tokens / next(speed for line in lines if (speed := line.get("tokens_per_second")))
    except (OSError, ValueError, StopIteration):
        return None


def pieces(sample: ModelInput, tokenizer: Tokenizer, pads: tuple[int, ...]) -> Iterator[Piece]:
    """Turn a sample back into text, what is learned apart; runs of placeholders become one word."""
    assert sample.loss_mask is not None
    told = zip(sample.input_ids, sample.loss_mask, strict=True)
    for (learned, pad), group in groupby(told, lambda t: (t[1], t[0] if t[0] in pads else 0)):
        ids = [token for token, _ in group]
        text = tokenizer.decode(ids[:1] if pad else ids, keep="all")
        yield Piece(f"{text} x {len(ids)} " if pad else text, learned)


def _told_ranks(config: TrainConfig) -> list[int]:
    """Choose the numbers of ranks: some common ones, and those that torchrun has started."""
    asked = {*ALONE_AND_TOGETHER, int(os.environ.get("WORLD_SIZE", "1"))}
    return sorted(ranks for ranks in asked if ranks % config.mesh.replicate == 0)


def _memory(
    config: TrainConfig, processor: Processor, stage: Stage, corpus: Corpus
) -> dict[int, Memory]:
    found: dict[int, Memory] = {}
    for ranks in _told_ranks(config):
        together, rest = divmod(corpus.data.bins, ranks * config.accumulate)
        if not rest and together <= len(corpus.plan):
            shape = _largest(corpus, together)
            found[ranks] = memory_of_step(config, processor.config, stage, shape, ranks=ranks)
    return found


def _largest(corpus: Corpus, together: int) -> Shape:
    """Lay the dearest bins of the plan, so many at a time, into one batch."""
    side = corpus.processor.config.vision.patch_size
    lengths: list[int] = []
    frames: list[int] = []
    targets = 0
    for entry in corpus.plan.entries[: corpus.plan.starts[together]].tolist():
        if not corpus.tokens[entry]:
            continue
        lengths.append(rounded(int(corpus.tokens[entry])))
        targets += int(corpus.targets[entry])
        most = corpus.shrunk.get(entry, 0) // side**2
        for t, h, w in corpus.grids(entry).tolist():
            frames += [min(h * w, most) if most else h * w] * t
    return Shape(tuple(sorted(lengths)), tuple(sorted(frames)), targets)


def _facts(
    name: str, steps: int, corpus: Corpus, memory: Mapping[int, Memory], show: int
) -> StageFacts:
    plan, data = corpus.plan, corpus.data
    tokens = int(corpus.tokens[plan.entries].sum(dtype=np.int64))
    return StageFacts(
        name=name,
        steps=steps,
        sources=[_source(number, corpus) for number in range(len(corpus.sources))],
        bins=len(plan),
        bins_per_step=data.bins,
        max_tokens=data.max_tokens,
        fill=tokens / (len(plan) * data.max_tokens),
        imbalance={n: plan.imbalance(n) for n in RANKS if data.bins % n == 0 and n <= len(plan)},
        shrunk=len(corpus.shrunk),
        tokens_per_step=tokens * data.bins / len(plan),
        memory=memory,
        samples=_some(corpus, show),
    )


def _source(number: int, corpus: Corpus) -> SourceFacts:
    first, last = corpus.first[number : number + 2].tolist()
    own = corpus.plan.entries[(corpus.plan.entries >= first) & (corpus.plan.entries < last)]
    table = corpus.lengths[number]
    return SourceFacts(
        name=corpus.labels[number],
        samples=len(table),
        entries=len(own),
        tokens=int(corpus.tokens[own].sum(dtype=np.int64)),
        targets=int(corpus.targets[own].sum(dtype=np.int64)),
        bad=Counter(reason for reason, _ in table.bad.values()),
    )


def _some(corpus: Corpus, show: int) -> list[tuple[str, ModelInput]]:
    """Prepare the first good samples of each source."""
    found: list[tuple[str, ModelInput]] = []
    for number, first in enumerate(corpus.first[:-1].tolist()):
        good = (i for i in range(len(corpus.lengths[number])) if corpus.tokens[first + i])
        for index, _ in zip(good, range(show), strict=False):
            examples, _bad = corpus.read([first + index])
            name = corpus.sources[number].name(index)
            found += [(name, example.input) for example in examples]
    return found
