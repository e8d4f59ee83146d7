"""Identity of a model: its bytes and options, and neither its path nor its name alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen2vl.cli.evaluation.model_identity import local_identity, server_identity
from qwen2vl.errors import Qwen2VLError
from tests.folders import write_tiny


def options(model: Path, **changes: object) -> dict[str, object]:
    given = {"model": str(model), "adapters": (), "dtype": "auto", "quantize": None}
    return {**given, "compile": False, **changes}


def test_a_copy_is_the_same_model_and_a_changed_byte_is_another(tmp_path: Path) -> None:
    first, copy = tmp_path / "a" / "model", tmp_path / "b" / "model"
    first.parent.mkdir()
    write_tiny(first)
    shutil.copytree(first, copy)
    assert local_identity(options(first)) == local_identity(options(copy))
    assert str(tmp_path) not in str(local_identity(options(first)))
    (weights,) = copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert local_identity(options(first)) != local_identity(options(copy))


def test_options_that_change_the_answers_are_part_of_it(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    plain = local_identity(options(tmp_path / "model"))
    for changes in (
        *({"dtype": "float32"}, {"quantize": "int8"}, {"kv_cache_dtype": "int8"}),
        {"adapters": (str(tmp_path),)},
    ):
        assert local_identity(options(tmp_path / "model", **changes)) != plain


def test_an_absent_option_is_its_default(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    identity = local_identity(options(tmp_path / "model"))
    assert (identity["dtype"], identity["quantize"], identity["compile"]) == ("auto", None, False)
    assert local_identity({"model": str(tmp_path / "model")}) == identity
    none = dict.fromkeys(("dtype", "quantize", "compile", "kv_cache_dtype"))
    assert local_identity(options(tmp_path / "model", **none)) == identity
    # As in files of earlier versions, which had no such option.
    assert local_identity(options(tmp_path / "model", kv_cache_dtype="auto")) == identity
    assert "kv_cache_dtype" not in identity


def test_an_absent_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Qwen2VLError):
        local_identity(options(tmp_path / "none"))


def test_a_server_is_known_by_its_model() -> None:
    assert server_identity("nano") == {"name": "nano", "server": True}
