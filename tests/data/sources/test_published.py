"""Files of packaged datasets: only the published ones are read."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from qwen2vl.data.sources.published import read_published
from qwen2vl.errors import InputError

REMEDY = "delete its folder and fetch the dataset again: qwen2vl fetch-data easy-vqa"


def test_absent_and_altered_files_name_the_command(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    digest = sha256(b"published").hexdigest()
    with pytest.raises(InputError, match=f"cannot be read: No such file or directory; {REMEDY}"):
        read_published(path, digest, dataset="easy-vqa")
    path.write_bytes(b"published!")
    with pytest.raises(InputError, match=f"is not the published file of easy-vqa.*; {REMEDY}"):
        read_published(path, digest, dataset="easy-vqa")
    path.write_bytes(b"published")
    assert read_published(path, digest, dataset="easy-vqa") == b"published"
