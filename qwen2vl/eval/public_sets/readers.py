"""Readers of published files: parquet, TSV with base64 images, JSON and JSON lines.

Each yields rows as mappings, few at a time, since files have gigabytes. pyarrow (extra `data`) is
imported only when a parquet file is read.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2vl.errors import ConfigError, InputError

__all__ = ["read_json_rows", "read_parquet_rows", "read_tsv_rows"]

LONGEST_REFERENCE = 64  # an image column of at most so many characters names another row
ROWS_AT_A_TIME = 16  # of parquet; a row may have seven images


def read_parquet_rows(path: str | Path, **constants: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file; images come as {"bytes", "path"}.

    Args:
        path: the file.
        constants: columns to add to each row, as `task_type` of MVBench.

    Raises:
        ConfigError: pyarrow is not installed.
        InputError: the file cannot be read.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow: pip install 'qwen2vl[data]'"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    yield {**row, **constants}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet: {error}") from error


def read_tsv_rows(path: str | Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a TSV file of VLMEvalKit; all columns are texts, absent ones "".

    An image that names another row, by its index, is replaced by that row's image; that row must
    come first, as in the published files.

    Raises:
        InputError: the file cannot be read, or an image names a row that has not come yet.
    """
    csv.field_size_limit(sys.maxsize)
    images: dict[str, str] = {}  # of rows that have one; others may name them
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, dialect="excel-tab", restval=""):
                image = row.get("image", "")
                if 0 < len(image) <= LONGEST_REFERENCE:
                    if image not in images:
                        raise InputError(
                            f"{path}, row {row.get('index')}: its image is that of row {image}, "
                            "which has not come yet"
                        )
                    row["image"] = images[image]
                elif image:
                    images[row.get("index", "")] = image
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as TSV: {error}") from error


def read_json_rows(path: str | Path, **constants: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file with a list of objects, or of JSON lines.

    Args:
        path: the file.
        constants: columns to add to each row, as `task_type` of MVBench.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = text.splitlines() if not text.lstrip().startswith("[") else ()
        listed = [json.loads(x) for x in lines if x.strip()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    for row in listed:
        yield {**row, **constants}
