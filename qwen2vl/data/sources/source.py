"""Bodies of samples, read by number: JSON lines, parquet, packed text, and the world.

    rows.jsonl  rows.json  part-*.parquet  store/  oss://bucket/rows.jsonl  Mixture

A source knows how many samples it has, reads any of them in any order and in any process, and
names its content, so that tables of lengths can be kept. Words come to this machine, media stay
where they are. It must not know tokens or sizes. Next rooms: prepare.py, lengths.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.disk_cache import used
from qwen2vl.data.formats import Sample, SampleError, read_row
from qwen2vl.data.sources.packed_text import STORE, TokenStore
from qwen2vl.data.sources.parquet import Parquet
from qwen2vl.data.sources.synthetic import World
from qwen2vl.data.storage import Storage, is_remote
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.tokenizer import Tokenizer

__all__ = ["JsonLines", "Samples", "open_source"]

LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
_PIECE = 1 << 24  # bytes read at a time


class Samples(Protocol):
    """What the other rooms need of any source."""

    base: str  # where relative names of media begin

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Name the content: another one, another name."""
        ...

    def name(self, index: int) -> str:
        """Say where a sample stands, whether it can be read or not."""
        ...

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one sample; without `pixels` only the sizes of drawn media need be right.

        Raises:
            SampleError: it cannot be read.
        """
        ...


class JsonLines:
    """Files with one JSON object a line."""

    def __init__(self, paths: Sequence[Path], base: str) -> None:
        """Find where lines begin, and hash what they hold, in one pass.

        Raises:
            InputError: a file is missing or empty.
        """
        self.paths, self.base = list(paths), base
        self._spans: list[np.ndarray] = []
        whole = blake2b(digest_size=16)
        for path in self.paths:
            self._spans.append(_lines_of(path, whole))
        self._digest = whole.hexdigest()
        self._first = np.cumsum([0, *map(len, self._spans)])
        if not len(self):
            raise InputError(f"{self.paths[0]} holds no line")

    def __len__(self) -> int:
        return int(self._first[-1])

    def fingerprint(self) -> str:
        """Name the content by all of its bytes."""
        return self._digest

    def name(self, index: int) -> str:
        """Name the file and the line."""
        file, line = self._place(index)
        return f"{self.paths[file].name}:{self._spans[file][line, 0]}"

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one line."""
        number, line = self._place(index)
        _, start, stop = self._spans[number][line].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SampleError("text", f"byte {error.start} of the line is not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise SampleError("text", f"the line is not JSON: {error}") from error
        return read_row(row, self.name(index))

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])


def open_source(
    source: Source,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    cache: Path,
    seed: int,
    default_system: float,
) -> Samples:
    """Open what a config names, by what it is.

    Args:
        source: of the config.
        data: of the same config: manners of fetching, length of a bin.
        tokenizer: of the model; packed text must be its own.
        cache: folder where text from elsewhere is kept.
        seed: of the world.
        default_system: share of the world's conversations with the default system sentence.

    Raises:
        InputError: it is missing, empty or damaged.
        ConfigError: nothing can read it, or a package is missing.
    """
    if source.mixture is not None:
        return World(source.mixture, source.samples, seed=seed, default_system=default_system)
    if (Path(source.path).expanduser() / STORE).is_file():
        folder = Path(source.path).expanduser()
        return TokenStore(folder, tokenizer, longest=data.max_tokens // 8 * 8)
    storage = Storage(retries=data.retries, seconds=data.fetch_seconds)
    found = storage.listing(source.path, LINES + PARQUET)
    base = source.media or _folder_of(found[0] if found else source.path)
    if found and all(name.endswith(PARQUET) for name in found):
        return Parquet(found, storage, base)
    if found and all(name.endswith(LINES) for name in found):
        return JsonLines([_lines(_local(name, storage, cache), cache) for name in found], base)
    kinds = ", ".join(LINES + PARQUET)
    raise ConfigError(
        f"{source.path}: found {', '.join(found) or 'nothing'}; give files of one kind ({kinds}), "
        "or a folder that `qwen2vl pack-text` wrote"
    )


def _folder_of(address: str) -> str:
    if is_remote(address):
        return address.rpartition("/")[0]
    return str(Path(address).expanduser().parent)


def _local(name: str, storage: Storage, cache: Path) -> Path:
    """Bring a file of text to this machine, once for each version of it."""
    if not is_remote(name):
        return Path(name).expanduser()
    key = blake2b(f"{name} {storage.version(name)}".encode(), digest_size=8).hexdigest()
    path = cache / "text" / f"{key}-{name.rpartition('/')[2]}"
    if not used(path):
        with storage.open(name) as source:
            _whole(path, lambda file: shutil.copyfileobj(source, file, _PIECE))
    return path


def _lines(path: Path, cache: Path) -> Path:
    """Write a file that is one JSON list, as LLaVA's are, as lines; others stay as they are."""
    if path.suffix != ".json":
        return path
    try:
        info = path.stat()
        with path.open("rb") as file:
            if file.read(64).lstrip()[:1] != b"[":
                return path
        key = blake2b(f"{path.resolve()} {info.st_size} {info.st_mtime_ns}".encode(), digest_size=8)
        target = cache / "text" / f"{key.hexdigest()}-{path.stem}.jsonl"
        if not used(target):
            rows = json.loads(path.read_text(encoding="utf-8"))
            _whole(
                target, lambda file: file.writelines(f"{json.dumps(r)}\n".encode() for r in rows)
            )
    except OSError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; is it cut short?") from error
    return target


def _whole(path: Path, write: Any) -> None:
    """Write a file aside and rename it, so that a file of this name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            write(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _lines_of(path: Path, whole: Any) -> np.ndarray:
    """List (number, first byte, end) of the lines that are not empty, and hash the file."""
    ends: list[np.ndarray] = []
    size = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                whole.update(piece)
                found = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n"))
                ends.append(found + size + 1)
                size += len(piece)
    except OSError as error:
        raise InputError(f"{path}: no such file, or no permission; check the path") from error
    cuts = np.unique(np.concatenate([np.zeros(1), *ends, np.array([size])]).astype(np.int64))
    spans = np.stack((np.arange(1, len(cuts)), cuts[:-1], cuts[1:]), axis=1)
    return spans[spans[:, 2] - spans[:, 1] > 2]
