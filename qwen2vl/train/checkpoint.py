"""Save and resume, exactly: weights, moments, the guard's history, and the next step's number.

    runs/nano/
      step-000500/   shard-00001-....safetensors  one a rank     state.json  the manifest
      step-001000/   ...                                         (the last `keep` stay)

Written in the background by torch.distributed.checkpoint, in its safetensors layout: every rank
its own parts, and any other number of ranks reads what it needs of them. Files go aside, are
flushed and read back for the manifest, which comes last; then the folder gets its name, so that a
folder with this name is whole. The schedule is a pure function, so the step's number is all there
is to say about data. No pickle. Several machines need one file system. Next room: export.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from qwen2vl.data.config import MANNERS
from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.train.config import TrainConfig, dump

__all__ = [
    "MANIFEST",
    "Saver",
    "latest",
    "make_folder",
    "read",
    "read_state",
    "read_step",
    "shapes",
    "verify",
]

logger = logging.getLogger(__name__)

MANIFEST = "state.json"

NAMED = 4  # differences that an error names
LONGEST = 40  # characters of a value in it

Found = TypeVar("Found")

# What a run learns, and how; all else may change from leg to leg. Workers, minutes and reports
# change no bit by that; ranks, accumulate, compile and recompute may change the last ones.
_BINDING = (
    *("stages", "seed", "optim", "dtype", "init", "model", "adapter", "min_pixels", "max_pixels"),
)

_NAME = re.compile(r"step-(\d{6,})")

# A run of one process is what we mean: nobody needs to be told at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


def make_folder(folder: Path) -> None:
    """Make the folder of a run, before any work is done for it.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder: {error.strerror}; give another, out=FOLDER"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written to; give another folder, out=FOLDER")


class Saver:
    """Writes a run's checkpoints, one at a time, while the run goes on."""

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        """Keep the last `keep` checkpoints in `folder`."""
        self.folder = folder
        self.keep = keep
        self.ranks = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Begin to write checkpoint `step` (steps done so far), as the tensors are now.

        Returns when they are copied to the CPU; every rank must call it, with its own parts.

        Args:
            step: names the folder; one that is there already is left as it is.
            tensors: DTensors, or tensors that all ranks have alike or under names of their own.
            facts: for the manifest, beside the step.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        target = self.folder / f"step-{step:06d}"
        if target.is_dir():
            return target
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copies = stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        stager.close()
        assert not isinstance(copies, Future), "asked to copy before it returns"
        manifest = {"step": step, **facts}
        self._pending = self._thread.submit(self._write, target, copies, manifest)
        return target

    def wait(self) -> None:
        """Return when what was begun is on disk.

        Raises:
            CheckpointError: the disk is full, or no longer writable.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let the thread end; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, target: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        aside = target.with_name(f".{target.name}.partial")
        try:
            self._first(lambda: _make_empty(aside))
            state_dict_saver.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True),
                process_group=self.ranks.saving,
                no_dist=self.ranks.mesh is None,
            )
            parts = self._together(lambda: self._digests(aside))
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            self._first(lambda: _finish(aside, target, {**manifest, "files": files}))
        except (OSError, SafetensorError, CheckpointException) as error:
            if self.ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"{target}: cannot be saved: {_reason(error)}; free some space and start again: "
                "the run goes on from the checkpoint before"
            ) from error
        if self.ranks.rank == 0:
            self._drop_old()

    def _first(self, act: Callable[[], None]) -> None:
        """Let the first rank act, and the others wait for it."""
        self._together(act if self.ranks.rank == 0 else lambda: None)

    def _together(self, act: Callable[[], Found]) -> list[Found]:
        """Let every rank act, and give what each found; where one fails, all do."""
        if self.ranks.saving is None:
            return [act()]
        found, failed = None, ""
        try:
            found = act()
        except OSError as error:
            failed = _reason(error)
        told: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(told, (found, failed), group=self.ranks.saving)
        if reasons := [reason for _, reason in told if reason]:
            raise OSError(reasons[0])
        return [part for part, _ in told]

    def _digests(self, folder: Path) -> dict[str, list[Any]]:
        """Read back a share of what all ranks wrote: name -> [bytes, digest]."""
        names = sorted(path.name for path in folder.iterdir())
        return {n: _measure(folder / n) for n in names[self.ranks.rank :: self.ranks.size]}

    def _drop_old(self) -> None:
        """Drop what is older than the last `keep` checkpoints whose files are all there."""
        whole = [path for path in _all(self.folder) if _is_complete(path)]
        if len(whole) < self.keep:
            return
        for path in _all(self.folder):
            if path == whole[-self.keep]:
                return
            shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """Find the checkpoint with the most steps, or None."""
    found = _all(folder)
    return found[-1] if found else None


def read_state(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint: its step, the run's config, the model's, the files.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        state = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"]), "config": dict(state["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"no readable {MANIFEST}") from error


def read_step(path: Path, config: TrainConfig) -> int:
    """Read how many steps a checkpoint has done.

    Raises:
        CheckpointError: it belongs to a run that differs in what it learns or how, or is damaged.
    """
    state = read_state(path)
    own = json.loads(dump(config))
    differ = [d for key in _BINDING for d in _differing(own[key], state["config"].get(key), key)]
    if differ:
        more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
        raise CheckpointError(
            f"{path} was made with other values of {', '.join(differ[:NAMED])}{more}; resume with "
            "the same, or begin another run with out=FOLDER"
        )
    return state["step"]


def verify(path: Path, ranks: Ranks) -> None:
    """Compare a checkpoint's files with its manifest; each rank reads a share.

    Raises:
        CheckpointError: a file is missing or holds something else.
    """
    files = sorted(read_state(path).get("files", {}).items())
    for name, entry in files[ranks.rank :: ranks.size]:
        if not (path / name).is_file() or _measure(path / name) != entry:
            raise _damaged(path, f"{name} is not what was written")


def shapes(path: Path) -> dict[str, torch.Size]:
    """List the tensors of a checkpoint, whole as they are across ranks.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, SafetensorError) as error:
        raise _damaged(path, _reason(error)) from error
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr] - tensors only


def read(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors` in place, each rank its parts, whatever the number of ranks that wrote.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or cannot be read.
    """
    try:
        state_dict_loader.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=ranks.control,
            no_dist=ranks.mesh is None,
        )
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        KeyError,
        ValueError,
        CheckpointException,
    ) as error:
        raise CheckpointError(
            f"{path}: the checkpoint does not fit this run; delete it to resume before it"
        ) from error


def _all(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted((int(m[1]), p) for m, p in named)]


def _make_empty(folder: Path) -> None:
    # What a killed run left behind here was never finished, and may be of another number of ranks.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(aside: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, and give the folder its name once everything is on disk."""
    with (aside / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(target)


def _measure(path: Path) -> list[Any]:
    """Give the size and digest of a file."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return [path.stat().st_size, digest.hexdigest()]


def _is_complete(path: Path) -> bool:
    """Tell whether all files of the manifest are there, in their size."""
    try:
        files = read_state(path).get("files", {})
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (CheckpointError, OSError):
        return False


def _differing(own: Any, saved: Any, path: str) -> Iterator[str]:
    """Name what differs in a config; a field that an older version did not have had its default."""
    if isinstance(own, dict) and isinstance(saved, dict):
        for key in own:
            if key in saved.keys() - MANNERS:
                yield from _differing(own[key], saved[key], f"{path}.{key}")
    elif isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        for index, (mine, theirs) in enumerate(zip(own, saved, strict=True)):
            yield from _differing(mine, theirs, f"{path}.{index}")
    elif own != saved:
        yield f"{path} ({_short(saved)}, now {_short(own)})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged checkpoint ({how}); delete it to resume before it")


def _reason(error: BaseException) -> str:
    """Find words for what went wrong; other ranks' failures come wrapped."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
