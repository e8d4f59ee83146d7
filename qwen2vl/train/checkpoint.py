"""Checkpoints for exact resuming: weights, optimizer states, spike-guard history, RNG, step.

    runs/nano/
      step-000500/   shard-00001-....safetensors  one per rank   state.json  the manifest
      step-001000/   ...                                         (the last `save_total_limit`)

Saved asynchronously by torch.distributed.checkpoint (DCP), as safetensors without pickle: every
rank writes its own shards, and a run with any other world size reads what it needs of them. Files
are written to a partial folder, flushed, and read back for their digests; the manifest comes last,
then the folder is renamed, so that a folder of this name is complete. The data order is a pure
function of the step, so no data loader state is stored. Several machines need a shared file system.
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
from contextlib import ExitStack
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

from qwen2vl.data.config import IO_OPTIONS
from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.files import atomic_folder, partial_folder
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.train.config import TrainConfig, dump

__all__ = [
    "MANIFEST",
    "CheckpointSaver",
    "create_run_folder",
    "describe_continuation",
    "latest_checkpoint",
    "load_tensors",
    "read_manifest",
    "read_resume_step",
    "read_step",
    "tensor_shapes",
    "verify",
]

logger = logging.getLogger(__name__)

MANIFEST = "state.json"

MAX_NAMED_DIFFERENCES = 4  # in an error text
MAX_VALUE_CHARS = 40  # of a config value in an error text

Result = TypeVar("Result")

# What must not change when a run is resumed; all else may. Workers, time limits and logging do not
# change the result; world size, gradient accumulation, torch.compile and activation checkpointing
# may change its rounding.
_FIXED_FIELDS = (
    *("stages", "seed", "optim", "dtype", "init", "model", "adapter", "min_pixels", "max_pixels"),
)

_STEP_FOLDER = re.compile(r"step-(\d{6,})")

# DCP would warn at every checkpoint of a single-process run, which is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


def create_run_folder(folder: Path) -> None:
    """Create the folder of a run, before any work is done for it.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made a folder: {error.strerror}; give another, output_dir=FOLDER"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written to; give another folder, output_dir=FOLDER")


class CheckpointSaver:
    """Saves checkpoints asynchronously, one at a time, in a background thread."""

    def __init__(
        self, folder: Path, save_total_limit: int, distributed: DistributedContext
    ) -> None:
        """Keep the last `save_total_limit` checkpoints in `folder`."""
        self.folder = folder
        self.save_total_limit = save_total_limit
        self.distributed = distributed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Start to write the checkpoint of `step` (steps done so far), and return its folder.

        Returns once the tensors are copied to the CPU. Every rank must call it, with its shards.

        Args:
            step: in the name of the folder; an existing folder is left as it is.
            tensors: DTensors, or tensors that are equal on all ranks or have a name per rank.
            metadata: for the manifest, beside the step.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        target = self.folder / f"step-{step:06d}"
        if target.is_dir():
            return target
        stager = DefaultStager(StagingOptions(False, False, False, False))
        staged = stager.stage({name: tensor.detach() for name, tensor in tensors.items()})
        stager.close()
        assert not isinstance(staged, Future), "staging is synchronous"
        manifest = {"step": step, **metadata}
        self._pending = self._thread.submit(self._write, target, staged, manifest)
        return target

    def wait(self) -> None:
        """Wait until the pending checkpoint is on disk.

        Raises:
            CheckpointError: the disk is full, or no longer writable.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the pending checkpoint, and end the thread; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, target: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        try:
            # Rank 0 creates the folder, deletes it after a failure on any rank, and renames it.
            with ExitStack() as stack:
                self._on_first_rank(lambda: stack.enter_context(atomic_folder(target, fsync=True)))
                self._write_files(partial_folder(target), tensors, manifest)
                self._on_first_rank(stack.close)
        except (OSError, SafetensorError, CheckpointException) as error:
            raise CheckpointError(
                f"{target}: cannot be saved: {_failure_reason(error)}; free some space and start "
                "again: the run resumes from the checkpoint before"
            ) from error
        if self.distributed.rank == 0:
            self._delete_old()

    def _write_files(
        self, folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]
    ) -> None:
        """Write every rank's shards, and then the manifest with the digests of all files."""
        state_dict_saver.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=self.distributed.checkpoint_group,
            no_dist=self.distributed.mesh is None,
        )
        digests_by_rank = self._on_all_ranks(lambda: self._digests(folder))
        files = {n: entry for digests in digests_by_rank for n, entry in sorted(digests.items())}
        text = json.dumps({**manifest, "files": files}, indent=1)
        self._on_first_rank(lambda: (folder / MANIFEST).write_text(text, encoding="utf-8"))

    def _on_first_rank(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the other ranks wait."""
        self._on_all_ranks(action if self.distributed.rank == 0 else lambda: None)

    def _on_all_ranks(self, action: Callable[[], Result]) -> list[Result]:
        """Run `action` on every rank, and return all results; if one rank fails, all raise."""
        if self.distributed.checkpoint_group is None:
            return [action()]
        result, failure = None, ""
        try:
            result = action()
        except OSError as error:
            failure = _failure_reason(error)
        results: list[Any] = [None] * self.distributed.world_size
        dist.all_gather_object(results, (result, failure), group=self.distributed.checkpoint_group)
        if reasons := [reason for _, reason in results if reason]:
            raise OSError(reasons[0])
        return [rank_result for rank_result, _ in results]

    def _digests(self, folder: Path) -> dict[str, list[Any]]:
        """Read back this rank's share of all files written: name -> [bytes, digest]."""
        names = sorted(path.name for path in folder.iterdir())
        return {
            n: _size_and_digest(folder / n)
            for n in names[self.distributed.rank :: self.distributed.world_size]
        }

    def _delete_old(self) -> None:
        """Delete checkpoints older than the last `save_total_limit` complete ones."""
        complete = [path for path in _list_checkpoints(self.folder) if _is_complete(path)]
        if len(complete) < self.save_total_limit:
            return
        for path in _list_checkpoints(self.folder):
            if path == complete[-self.save_total_limit]:
                return
            shutil.rmtree(path, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step, or None."""
    checkpoints = _list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint: step, config of the run and of the model, files.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        state = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {**state, "step": int(state["step"]), "config": dict(state["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged_checkpoint(path, f"no readable {MANIFEST}") from error


def read_step(path: Path, config: TrainConfig) -> int:
    """Read the step of a checkpoint, after a comparison of its config with `config`.

    Raises:
        CheckpointError: a field that must not change differs, or the checkpoint is damaged.
    """
    state = read_manifest(path)
    current = json.loads(dump(config))
    differences = [
        difference
        for key in _FIXED_FIELDS
        for difference in _config_differences(current[key], state["config"].get(key), key)
    ]
    if differences:
        remainder = (
            f" and {len(differences) - MAX_NAMED_DIFFERENCES} more"
            if len(differences) > MAX_NAMED_DIFFERENCES
            else ""
        )
        raise CheckpointError(
            f"{path} was made with other values of "
            f"{', '.join(differences[:MAX_NAMED_DIFFERENCES])}{remainder}; resume with "
            f"the same, or {describe_continuation(path.parent, state['step'])}"
        )
    return state["step"]


def read_resume_step(config: TrainConfig) -> int:
    """Read the step at which a run would resume, 0 without a checkpoint; raises as `read_step`."""
    path = latest_checkpoint(Path(config.folder))
    return 0 if path is None else read_step(path, config)


def describe_continuation(folder: Path, step: int) -> str:
    """Tell how to begin another run, and from the result in `folder` if there is one of `step`."""
    text = "begin another run with output_dir=FOLDER"
    for key, kind in (("adapter.init", "adapter"), ("model", "model")):
        if (result := folder / f"{kind}-{step:06d}").is_dir():
            return f"{text} ({key}={result} starts it from this result)"
    return text


def verify(path: Path, distributed: DistributedContext) -> None:
    """Compare the files of a checkpoint with its manifest; each rank reads its share.

    Raises:
        CheckpointError: a file is missing, or its size or digest differs.
    """
    files = sorted(read_manifest(path).get("files", {}).items())
    for name, entry in files[distributed.rank :: distributed.world_size]:
        if not (path / name).is_file() or _size_and_digest(path / name) != entry:
            raise _damaged_checkpoint(path, f"{name} is not what was written")


def tensor_shapes(path: Path) -> dict[str, torch.Size]:
    """Return the full shape of every tensor in a checkpoint, whatever its sharding.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    except (OSError, SafetensorError) as error:
        raise _damaged_checkpoint(path, _failure_reason(error)) from error
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr] - tensors only


def load_tensors(path: Path, tensors: dict[str, Tensor], distributed: DistributedContext) -> None:
    """Load `tensors` in place, each rank its shards, from a checkpoint of any world size.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or cannot be read.
    """
    try:
        state_dict_loader.load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=distributed.cpu_group,
            no_dist=distributed.mesh is None,
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


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(m, p) for p in folder.iterdir() if (m := _STEP_FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted((int(m[1]), p) for m, p in matches)]


def _size_and_digest(path: Path) -> list[Any]:
    """Return the size in bytes and the digest of a file."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def _is_complete(path: Path) -> bool:
    """Return whether all files of the manifest exist with their size."""
    try:
        files = read_manifest(path).get("files", {})
        return all((path / name).stat().st_size == size for name, (size, _) in files.items())
    except (CheckpointError, OSError):
        return False


def _config_differences(current: Any, saved: Any, path: str) -> Iterator[str]:
    """Yield what differs; a field missing in `saved`, of an older version, had its default."""
    if isinstance(current, dict) and isinstance(saved, dict):
        for key in current:
            if key in saved.keys() - IO_OPTIONS:
                yield from _config_differences(current[key], saved[key], f"{path}.{key}")
    elif isinstance(current, list) and isinstance(saved, list) and len(current) == len(saved):
        for index, (current_item, saved_item) in enumerate(zip(current, saved, strict=True)):
            yield from _config_differences(current_item, saved_item, f"{path}.{index}")
    elif current != saved:
        yield f"{path} ({_shorten(saved)}, now {_shorten(current)})"


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def _damaged_checkpoint(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged checkpoint ({reason}); delete it to resume before it")


def _failure_reason(error: BaseException) -> str:
    """Return the reason as text; DCP wraps the failures of other ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
