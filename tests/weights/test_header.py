"""Damaged safetensors files are refused from their header, before a tensor is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.header import TORCH_DTYPES, TensorInfo, build_header, read_header


def build_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Build a file by hand; `header` may be text that is not JSON."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> Any:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def check_refused(path: Path, content: bytes, text: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_of_a_valid_file(path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, path, {"x": "y"})
    assert read_header(path) == {
        "a": TensorInfo("F32", (2, 3), 0, 24),
        "b": TensorInfo("BF16", (5,), 24, 34),
    }


@given(
    tensors=st.dictionaries(
        st.text('ab.é"\\', min_size=1, max_size=5),
        st.tuples(
            st.sampled_from(list(TORCH_DTYPES.values())),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        max_size=6,
    )
)
def test_built_headers_equal_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("built") / "model.safetensors"
    saved = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file(saved, path, {"format": "pt"})
    header, infos = build_header(tensors)
    assert path.read_bytes()[: len(header)] == header
    assert read_header(path) == infos


def test_empty_tensors_and_scalars(path: Path) -> None:
    save_file({"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, path)
    shapes = {name: info.shape for name, info in read_header(path).items()}
    assert shapes == {"none": (0, 4), "one": ()}


@pytest.mark.parametrize("cut", [1, 100, 1_000_000])
def test_truncated_file_reports_the_missing_bytes(path: Path, cut: int) -> None:
    save_file({"a": torch.zeros(300_000)}, path)
    check_refused(
        path, path.read_bytes()[:-cut], rf"truncated, {cut:,} of 1,200,000 bytes are missing"
    )


def test_every_truncation_is_detected(path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    for size in range(len(content)):
        check_refused(path, content[:size], "fetch it again")


def test_trailing_bytes_are_refused(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)
    check_refused(path, path.read_bytes() + b"123", "3 bytes follow the last tensor")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "0 bytes are no safetensors file"),
        (build_file("{}", length=2**40), "its header would be 1,099,511,627,776 bytes long"),
        (
            build_file("{}", length=99_999_999),
            "truncated inside its header, at least 99,999,997 bytes",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
        (b"PK\x03\x04" + b"\x00\x00\x08\x08" * 9, "looks like a pickle of torch.save"),
        (b"<!DOCTYPE html><html>Too many requests</html>", "a text or a web page"),
        (build_file("[" * 100_000), "not valid JSON"),
        (build_file('{"a": '), "not valid JSON"),
        (
            build_file("\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "{"),
            "not valid",
        ),
        (build_file("[1]"), "not a JSON object"),
        (build_file('{"a": 1, "a": 2}'), "not valid JSON"),
        (build_file({"a": 1}), "describes a wrongly"),
        (build_file({"a": {"dtype": "U8", "shape": [1]}}), "describes a wrongly"),
        (build_file({"a": entry(0, 4, [-4])}, b"1234"), "impossible shape or place"),
        (build_file({"a": entry(0, 4, [True, 4])}, b"1234"), "impossible shape or place"),
        (build_file({"a": entry(0, 4, [2.0, 2])}, b"1234"), "impossible shape or place"),
        (build_file({"a": entry(0, 4, dtype="C64")}, b"1234"), "stored as 'C64'"),
        (build_file({"a": entry(0, 4, dtype=["U8"])}, b"1234"), r"stored as \['U8'\]"),
        (build_file({"a": entry(0, 4, [5])}, b"1234"), r"4 bytes where U8 \[5\] takes 5"),
        (build_file({"a": entry(0, 4, [2**62, 2**62])}, b"1234"), "gives a 4 bytes where"),
        (build_file({"a": entry(4, 0, [0])}), "gives a -4 bytes where"),
        (
            build_file({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
            "b overlaps the tensor before it",
        ),
        (build_file({"a": entry(0, 4), "b": entry(5, 6)}, b"123456"), "b leaves a gap"),
        (build_file({"a": entry(1, 4)}, b"1234"), "a leaves a gap"),
    ],
)
def test_damaged_headers_are_refused(path: Path, content: bytes, text: str) -> None:
    check_refused(path, content, text)


@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_accepted_files_are_accepted_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(1)}, path)
    content = bytearray(path.read_bytes()[: -cut or None])
    for position, byte in edits:
        content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(infos)
            for name, info in infos.items():
                assert tuple(file.get_slice(name).get_shape()) == info.shape
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"accepted a file that safetensors refuses: {error}")


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")
