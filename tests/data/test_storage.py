"""Storage: addresses, retries, timeouts, concurrent fetches, range reads; one-line errors."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qwen2vl.data import storage
from qwen2vl.data.storage import MissingError, Storage, is_remote, resolve_address
from qwen2vl.errors import ConfigError, InputError


class FlakyFileSystem(MemoryFileSystem):
    """A file system that fails, hangs and counts requests, as configured by a test."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[Counter[str]] = Counter()
    num_requests: ClassVar[Counter[str]] = Counter()
    delays: ClassVar[dict[str, float]] = {}
    num_active = max_active = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        name = path.rpartition("/")[2]
        with FlakyFileSystem.lock:
            FlakyFileSystem.num_requests[name] += 1
            FlakyFileSystem.num_active += 1
            FlakyFileSystem.max_active = max(FlakyFileSystem.max_active, FlakyFileSystem.num_active)
            fails = FlakyFileSystem.failures[name] > 0
            FlakyFileSystem.failures[name] -= 1
        try:
            time.sleep(FlakyFileSystem.delays.get(name, 0.002))
            if fails:
                raise ConnectionResetError("the client's own words")
            return super().cat_file(path, start, end)
        finally:
            with FlakyFileSystem.lock:
                FlakyFileSystem.num_active -= 1


@pytest.fixture(autouse=True)
def flaky() -> None:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    for counters in (
        FlakyFileSystem.failures,
        FlakyFileSystem.num_requests,
        FlakyFileSystem.delays,
        FlakyFileSystem.store,
    ):
        counters.clear()
    FlakyFileSystem.max_active = 0
    system = fsspec.filesystem("flaky")
    for i in range(20):
        system.pipe_file(f"/bucket/{i}.png", f"picture {i}".encode())


def no_backoff(**options: Any) -> Storage:
    return Storage(backoff_scale=0, **options)


def test_a_failed_fetch_is_retried() -> None:
    FlakyFileSystem.failures["3.png"] = 3
    assert no_backoff(max_retries=3).read("flaky://bucket/3.png") == b"picture 3"
    assert FlakyFileSystem.num_requests["3.png"] == 4


def test_the_error_names_the_number_of_attempts() -> None:
    FlakyFileSystem.failures["3.png"] = 99
    with pytest.raises(
        InputError, match=r"flaky://bucket/3.png cannot be read in 3 tries"
    ) as caught:
        no_backoff(max_retries=2).read("flaky://bucket/3.png")
    assert "the client's own words" not in str(caught.value)


def test_a_missing_object_is_not_retried() -> None:
    with pytest.raises(MissingError, match=r"flaky://bucket/none.png is missing"):
        no_backoff(max_retries=5).read("flaky://bucket/none.png")
    assert FlakyFileSystem.num_requests["none.png"] == 1


def test_a_hanging_fetch_times_out() -> None:
    FlakyFileSystem.delays["1.png"] = 1.5
    start = time.monotonic()
    with pytest.raises(InputError, match=r"in 2 tries: no answer in 0.05 s"):
        no_backoff(max_retries=1, timeout=0.05).read("flaky://bucket/1.png")
    assert time.monotonic() - start < 1.5  # 0.1 s on an idle machine
    while FlakyFileSystem.num_active:  # the next test starts from zero
        time.sleep(0.01)


def test_concurrent_fetches_are_bounded() -> None:
    FlakyFileSystem.delays.update({f"{i}.png": 0.02 for i in range(20)})
    FlakyFileSystem.failures["5.png"] = 1
    results = no_backoff(concurrency=4).read_many(
        f"flaky://bucket/{i}.png" for i in (*range(20), 3, 77)
    )
    assert len(results) == 21
    assert FlakyFileSystem.max_active == 4
    assert isinstance(results.pop("flaky://bucket/77.png"), MissingError)
    assert set(results.values()) == {f"picture {i}".encode() for i in range(20)}


def test_the_first_bytes_of_an_object() -> None:
    assert no_backoff().read("flaky://bucket/7.png", 3) == b"pic"


def test_listings_are_sorted_full_addresses() -> None:
    assert no_backoff().list_files("flaky://bucket/1*.png", ())[:2] == [
        "flaky:///bucket/1.png",
        "flaky:///bucket/10.png",
    ]
    assert len(no_backoff().list_files("flaky://bucket", (".png",))) == 20
    assert no_backoff().list_files("flaky://bucket/3.png", (".png",)) == ["flaky://bucket/3.png"]
    assert no_backoff().size("flaky://bucket/11.png") == 10
    with no_backoff().open("flaky://bucket/11.png") as file:
        file.seek(8)
        assert file.read() == b"11"


def test_each_range_is_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "MIN_RANGE_BYTES", 4)
    FlakyFileSystem.failures["11.png"] = 2
    with no_backoff(max_retries=2).open("flaky://bucket/11.png") as file:
        assert file.read(3) == b"pic"
        assert file.seek(-2, 2) == 8
        assert file.read() == b"11"
        assert (file.read(), file.tell()) == (b"", 10)
        file.seek(0)
        assert file.read() == b"picture 11"
    FlakyFileSystem.failures["12.png"] = 3
    with (
        no_backoff(max_retries=2).open("flaky://bucket/12.png") as file,
        pytest.raises(InputError, match=r"12.png cannot be read in 3 tries: ConnectionResetError"),
    ):
        file.read()


@pytest.mark.parametrize("num_bytes", [0, 3, 7], ids=["nothing", "less", "more"])
def test_a_response_of_wrong_length_is_an_error(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MIN_RANGE_BYTES", 4)
    content, num_wrong = b"picture 11", 1

    def cat_file(system: FlakyFileSystem, path: str, start: int, end: int) -> bytes:
        nonlocal num_wrong
        if start != 4 or not num_wrong:
            return content[start:end]
        num_wrong -= 1
        return bytes(num_bytes)

    monkeypatch.setattr(FlakyFileSystem, "cat_file", cat_file)
    with no_backoff(max_retries=1).open("flaky://bucket/11.png") as file:
        assert file.read(4) + file.read(4) + file.read(4) == content
    num_wrong = 2
    text = f"in 2 tries: {num_bytes} bytes came instead of the 4 from byte 4 on"
    with no_backoff(max_retries=1).open("flaky://bucket/11.png") as file:
        assert file.read(4) == b"pict"
        with pytest.raises(InputError, match=text):
            file.read(4)


def test_a_store_without_range_requests_is_supported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "MIN_RANGE_BYTES", 4)
    monkeypatch.setattr(FlakyFileSystem, "cat_file", lambda *_, **__: b"picture 11")
    with no_backoff(max_retries=0).open("flaky://bucket/11.png") as file:
        assert file.read(4) + file.read(4) + file.read(4) == b"picture 11"


def test_a_large_read_is_split_into_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MIN_RANGE_BYTES", 2)
    monkeypatch.setattr(storage, "MAX_RANGE_BYTES", 4)
    with no_backoff(max_retries=0).open("flaky://bucket/11.png") as file:
        assert file.read(10) == b"picture 11"
    assert FlakyFileSystem.num_requests["11.png"] == 3


@pytest.mark.parametrize("key", ["ETag", "mtime", "LastModified"])
def test_the_version_has_the_store_s_version_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"size": 10, "created": "always"}
    monkeypatch.setattr(FlakyFileSystem, "info", lambda *_, **__: info)
    without_version = no_backoff().version("flaky://bucket/1.png")
    monkeypatch.setattr(FlakyFileSystem, "info", lambda *_, **__: {**info, key: "one"})
    one = no_backoff().version("flaky://bucket/1.png")
    monkeypatch.setattr(FlakyFileSystem, "info", lambda *_, **__: {**info, key: "two"})
    assert len({without_version, one, no_backoff().version("flaky://bucket/1.png")}) == 3


def test_local_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(name)
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert no_backoff().list_files(str(tmp_path), (".jsonl",)) == both
    assert no_backoff().list_files(f"{tmp_path}/*.jsonl", ()) == both
    assert no_backoff().list_files("some/where.jsonl", ()) == ["some/where.jsonl"]
    assert no_backoff().size(both[0]) == 7


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("s3://bucket/x", r"s3:// needs a package that is not installed: Install s3fs"),
        ("zebra://bucket/x", r"the protocol zebra:// is not known"),
    ],
)
def test_unknown_protocols_are_config_errors(address: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        no_backoff().read(address)


def test_http_uses_the_library_s_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, *, max_bytes: int, timeout: float, name: str) -> tuple[bytes, str]:
        assert timeout == 7
        return url.encode(), "image/png"

    monkeypatch.setattr(storage, "download", download)
    assert no_backoff(timeout=7).read("https://host/a.png") == b"https://host/a.png"


@pytest.mark.parametrize(
    ("base", "name", "joined"),
    [
        ("", "a.png", "a.png"),
        ("set", "a/b.png", "set/a/b.png"),
        ("set", "/abs/b.png", "/abs/b.png"),
        ("set", "https://host/b.png", "https://host/b.png"),
        ("set", "data:image/png;base64,xx", "data:image/png;base64,xx"),
        ("s3://bucket/set", "a/b.png", "s3://bucket/set/a/b.png"),
        ("s3://bucket/set", "/local/b.png", "/local/b.png"),
    ],
)
def test_relative_names_are_resolved_against_the_base(base: str, name: str, joined: str) -> None:
    assert resolve_address(base, name) == joined


def test_is_remote() -> None:
    assert is_remote("oss://a/b")
    assert not is_remote("file:///a/b")
    assert not is_remote("a/b:c")
