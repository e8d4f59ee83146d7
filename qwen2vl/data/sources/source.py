"""Sample sources: random access to JSON lines, parquet, packed text and the synthetic world.

    rows.jsonl  rows.json  part-*.parquet  store/  oss://bucket/rows.jsonl  easy-vqa  Mixture

A source has a length, reads any sample by index in any process, and has a fingerprint of its
content, under which tables of lengths are cached. Remote text files are copied to the local cache,
media stay where they are. Neither tokens nor media sizes are computed here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import Sample, SampleError, parse_row
from qwen2vl.data.sources.packaged import check_packaged, is_packaged, open_packaged
from qwen2vl.data.sources.packed_text import STORE_FILE, TokenStore
from qwen2vl.data.sources.parquet import ParquetSource
from qwen2vl.data.sources.synthetic import SyntheticSource
from qwen2vl.data.sources.text_files import index_lines, list_to_lines
from qwen2vl.data.storage import Storage, is_remote
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.files import atomic_file, touch
from qwen2vl.processor.tokenizer import Tokenizer

__all__ = ["JsonLinesSource", "SampleSource", "check_packaged_source", "open_source"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
READ_CHUNK = 1 << 24  # bytes


class SampleSource(Protocol):
    """Random access to the samples of one source."""

    media_root: str  # base of relative media paths

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Return an id of the content, which changes with it."""
        ...

    def name(self, index: int) -> str:
        """Return where a sample is from, for messages; it need not be readable."""
        ...

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one sample; without `pixels`, rendered media need only have the right sizes.

        Raises:
            SampleError: it cannot be read.
        """
        ...


class JsonLinesSource:
    """JSON lines files: one object per line."""

    def __init__(
        self, paths: Sequence[Path], media_root: str, names: Sequence[str] | None = None
    ) -> None:
        """Index the lines of all files and hash their content, in one read.

        Args:
            paths: local files, or local copies.
            media_root: base of relative media paths.
            names: of the original files, for messages; default: the paths.

        Raises:
            InputError: a file is missing or empty.
        """
        self.paths, self.media_root = list(paths), media_root
        self._names = [str(path) for path in paths] if names is None else list(names)
        self._line_spans: list[np.ndarray] = []
        digest = blake2b(digest_size=16)
        for path in self.paths:
            self._line_spans.append(index_lines(path, digest))
        self._digest = digest.hexdigest()
        self._offsets = np.cumsum([0, *map(len, self._line_spans)])
        if not len(self):
            raise InputError(
                f"{self._names[0]} holds no line; write one conversation a line, as "
                '{"messages": [{"role": "user", "content": "..."}, '
                '{"role": "assistant", "content": "..."}]} (docs/training.md has all formats)'
            )

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def fingerprint(self) -> str:
        """Return the hash of all bytes."""
        return self._digest

    def name(self, index: int) -> str:
        """Return the name of a sample: file and line number."""
        file_index, line = self._locate(index)
        name = self._names[file_index].rpartition("/")[2]
        return f"{name}:{self._line_spans[file_index][line, 0]}"

    def read(self, index: int, *, pixels: bool = True) -> Sample:
        """Read one line."""
        file_index, line = self._locate(index)
        _, start, stop = self._line_spans[file_index][line].tolist()
        with self.paths[file_index].open("rb") as file:
            file.seek(start)
            raw = file.read(stop - start)
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise SampleError("text", f"byte {error.start} of the line is not UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise SampleError("text", f"the line is not JSON: {error}") from error
        return parse_row(row, self.name(index))

    def _locate(self, index: int) -> tuple[int, int]:
        file_index = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return file_index, index - int(self._offsets[file_index])


def open_source(
    source: SourceConfig,
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    cache_dir: Path,
    seed: int,
    default_system: float,
) -> SampleSource:
    """Open a configured source, in the format that its path has.

    Args:
        source: what to open.
        data: options of fetching, and max_tokens of a bin.
        tokenizer: of the model; packed text must have been written with it.
        cache_dir: cache folder for local copies of remote text files.
        seed: of the synthetic world.
        default_system: share of synthetic conversations with the default system prompt.

    Raises:
        InputError: it is missing, empty or damaged.
        ConfigError: unsupported or mixed formats, a package is missing, or a packaged dataset was
            not fetched, must not be trained on, or was given a media_root.
    """
    if source.mixture is not None:
        return SyntheticSource(
            source.mixture, source.num_samples, seed=seed, default_system=default_system
        )
    if is_packaged(source.path):
        check_packaged_source(source)
        return open_packaged(source.path)
    if (Path(source.path).expanduser() / STORE_FILE).is_file():
        folder = Path(source.path).expanduser()
        return TokenStore(folder, tokenizer, max_tokens=data.max_tokens // 8 * 8)
    storage = Storage(max_retries=data.max_retries, timeout=data.fetch_timeout)
    paths = storage.list_files(source.path, JSON_SUFFIXES + PARQUET_SUFFIXES)
    media_root = source.media_root or _parent_of(paths[0] if paths else source.path)
    if paths and all(name.endswith(PARQUET_SUFFIXES) for name in paths):
        return ParquetSource(paths, storage, media_root)
    if paths and all(name.endswith(JSON_SUFFIXES) for name in paths):
        return JsonLinesSource(
            [list_to_lines(_fetch_text(name, storage, cache_dir), cache_dir) for name in paths],
            media_root,
            paths,
        )
    suffixes = ", ".join(JSON_SUFFIXES + PARQUET_SUFFIXES)
    raise ConfigError(
        f"{source.path}: found {', '.join(paths) or 'nothing'}; give files of one kind "
        f"({suffixes}), or a folder that `qwen2vl pack-text` wrote{_conversion_of(paths)}"
    )


def check_packaged_source(source: SourceConfig) -> None:
    """Check a source whose path is the name of a dataset of `qwen2vl fetch-data`.

    Raises:
        ConfigError: the dataset was not fetched, must not be trained on, or was given a media_root.
    """
    check_packaged(source.path)
    if source.media_root:
        raise ConfigError(
            f"data={source.path}: media_root={source.media_root} is for files whose media paths "
            "are relative, this dataset has its own images; remove media_root, or give "
            f"./{source.path} for a folder of that name"
        )


def _conversion_of(paths: Sequence[str]) -> str:
    """Return how to make a file that can be read, for common kinds of others."""
    for path in paths:
        name = path.rpartition("/")[2]
        stem, _, suffix = name.rpartition(".")
        if suffix == "gz":
            return f"; unpack it first: `gunzip {name}`"
        if suffix in ("csv", "tsv"):
            separator = ', sep="\\t"' if suffix == "tsv" else ""
            return (
                f'; convert it first: pandas.read_csv("{name}"{separator}).to_json("{stem}.jsonl", '
                'orient="records", lines=True)'
            )
    return ""


def _parent_of(address: str) -> str:
    if is_remote(address):
        return address.rpartition("/")[0]
    return str(Path(address).expanduser().parent)


def _fetch_text(name: str, storage: Storage, cache_dir: Path) -> Path:
    """Copy a remote text file to the cache, once for each of its versions."""
    if not is_remote(name):
        return Path(name).expanduser()
    key = blake2b(f"{name} {storage.version(name)}".encode(), digest_size=8).hexdigest()
    path = cache_dir / "text" / f"{key}-{name.rpartition('/')[2]}"
    if not touch(path):
        with storage.open(name) as source, atomic_file(path) as partial, partial.open("wb") as file:
            shutil.copyfileobj(source, file, READ_CHUNK)
    return path
