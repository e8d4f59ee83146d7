"""Storage: addresses, new tries, time limits, many at a time; each failure is one clear line."""

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
from qwen2vl.data.storage import MissingError, Storage, is_remote, join
from qwen2vl.errors import ConfigError, InputError


class Moody(MemoryFileSystem):
    """A store that fails, hangs and counts, as its test says."""

    protocol = "moody"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[Counter[str]] = Counter()
    asked: ClassVar[Counter[str]] = Counter()
    hang: ClassVar[dict[str, float]] = {}
    at_work = most_at_work = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("moody://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        name = path.rpartition("/")[2]
        with Moody.lock:
            Moody.asked[name] += 1
            Moody.at_work += 1
            Moody.most_at_work = max(Moody.most_at_work, Moody.at_work)
            failing = Moody.failures[name] > 0
            Moody.failures[name] -= 1
        try:
            time.sleep(Moody.hang.get(name, 0.002))
            if failing:
                raise ConnectionResetError("the client's own words")
            return super().cat_file(path, start, end)
        finally:
            with Moody.lock:
                Moody.at_work -= 1


@pytest.fixture(autouse=True)
def moody() -> None:
    fsspec.register_implementation("moody", Moody, clobber=True)
    for kept in (Moody.failures, Moody.asked, Moody.hang, Moody.store):
        kept.clear()
    Moody.most_at_work = 0
    system = fsspec.filesystem("moody")
    for i in range(20):
        system.pipe_file(f"/bucket/{i}.png", f"picture {i}".encode())


def hasty(**manners: Any) -> Storage:
    return Storage(scale=0, **manners)


def test_what_fails_at_first_is_tried_again() -> None:
    Moody.failures["3.png"] = 3
    assert hasty(retries=3).read("moody://bucket/3.png") == b"picture 3"
    assert Moody.asked["3.png"] == 4


def test_what_keeps_failing_is_told_with_its_tries() -> None:
    Moody.failures["3.png"] = 99
    with pytest.raises(InputError, match=r"moody://bucket/3.png cannot be read in 3 tries") as told:
        hasty(retries=2).read("moody://bucket/3.png")
    assert "the client's own words" not in str(told.value)


def test_what_is_missing_is_asked_for_once() -> None:
    with pytest.raises(MissingError, match=r"moody://bucket/none.png is missing"):
        hasty(retries=5).read("moody://bucket/none.png")
    assert Moody.asked["none.png"] == 1


def test_what_hangs_is_left_behind() -> None:
    Moody.hang["1.png"] = 1.5
    began = time.monotonic()
    with pytest.raises(InputError, match=r"in 2 tries: no answer in 0.05 s"):
        hasty(retries=1, seconds=0.05).read("moody://bucket/1.png")
    assert time.monotonic() - began < 1.5  # 0.1 s, on a machine that is not busy
    while Moody.at_work:  # the next test counts from none
        time.sleep(0.01)


def test_many_come_at_a_time_and_no_more_than_allowed() -> None:
    Moody.hang.update({f"{i}.png": 0.02 for i in range(20)})
    Moody.failures["5.png"] = 1
    found = hasty(concurrency=4).read_all(f"moody://bucket/{i}.png" for i in (*range(20), 3, 77))
    assert len(found) == 21
    assert Moody.most_at_work == 4
    assert isinstance(found.pop("moody://bucket/77.png"), MissingError)
    assert set(found.values()) == {f"picture {i}".encode() for i in range(20)}


def test_a_head_is_the_first_bytes() -> None:
    assert hasty().read("moody://bucket/7.png", 3) == b"pic"


def test_listings_are_sorted_and_whole_addresses() -> None:
    assert hasty().listing("moody://bucket/1*.png", ())[:2] == [
        "moody:///bucket/1.png",
        "moody:///bucket/10.png",
    ]
    assert len(hasty().listing("moody://bucket", (".png",))) == 20
    assert hasty().listing("moody://bucket/3.png", (".png",)) == ["moody://bucket/3.png"]
    assert hasty().size("moody://bucket/11.png") == 10
    with hasty().open("moody://bucket/11.png") as file:
        file.seek(8)
        assert file.read() == b"11"


def test_what_is_read_by_pieces_is_tried_again_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "PIECE", 4)
    Moody.failures["11.png"] = 2
    with hasty(retries=2).open("moody://bucket/11.png") as file:
        assert file.read(3) == b"pic"
        assert file.seek(-2, 2) == 8
        assert file.read() == b"11"
        assert (file.read(), file.tell()) == (b"", 10)
        file.seek(0)
        assert file.read() == b"picture 11"
    Moody.failures["12.png"] = 3
    with (
        hasty(retries=2).open("moody://bucket/12.png") as file,
        pytest.raises(InputError, match=r"12.png cannot be read in 3 tries: ConnectionResetError"),
    ):
        file.read()


@pytest.mark.parametrize("given", [0, 3, 7], ids=["nothing", "less", "more"])
def test_an_answer_of_another_length_is_not_the_end_of_the_file(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE", 4)
    whole, wrong = b"picture 11", 1

    def answer(system: Moody, path: str, start: int, end: int) -> bytes:
        nonlocal wrong
        if start != 4 or not wrong:
            return whole[start:end]
        wrong -= 1
        return bytes(given)

    monkeypatch.setattr(Moody, "cat_file", answer)
    with hasty(retries=1).open("moody://bucket/11.png") as file:
        assert file.read(4) + file.read(4) + file.read(4) == whole
    wrong = 2
    text = f"in 2 tries: {given} bytes came instead of the 4 from byte 4 on"
    with hasty(retries=1).open("moody://bucket/11.png") as file:
        assert file.read(4) == b"pict"
        with pytest.raises(InputError, match=text):
            file.read(4)


def test_a_store_that_gives_the_whole_instead_of_a_piece_is_cut_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "PIECE", 4)
    monkeypatch.setattr(Moody, "cat_file", lambda *_, **__: b"picture 11")
    with hasty(retries=0).open("moody://bucket/11.png") as file:
        assert file.read(4) + file.read(4) + file.read(4) == b"picture 11"


def test_a_large_read_is_fetched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 2)
    monkeypatch.setattr(storage, "LONGEST_PIECE", 4)
    with hasty(retries=0).open("moody://bucket/11.png") as file:
        assert file.read(10) == b"picture 11"
    assert Moody.asked["11.png"] == 3


@pytest.mark.parametrize("key", ["ETag", "mtime", "LastModified"])
def test_a_version_is_what_the_store_calls_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"size": 10, "created": "always"}
    monkeypatch.setattr(Moody, "info", lambda *_, **__: told)
    bare = hasty().version("moody://bucket/1.png")
    monkeypatch.setattr(Moody, "info", lambda *_, **__: {**told, key: "one"})
    one = hasty().version("moody://bucket/1.png")
    monkeypatch.setattr(Moody, "info", lambda *_, **__: {**told, key: "two"})
    assert len({bare, one, hasty().version("moody://bucket/1.png")}) == 3


def test_local_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(name)
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert hasty().listing(str(tmp_path), (".jsonl",)) == both
    assert hasty().listing(f"{tmp_path}/*.jsonl", ()) == both
    assert hasty().listing("some/where.jsonl", ()) == ["some/where.jsonl"]
    assert hasty().size(both[0]) == 7


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("s3://bucket/x", r"s3:// needs a package that is not installed: Install s3fs"),
        ("zebra://bucket/x", r"the protocol zebra:// is not known"),
    ],
)
def test_protocols_that_nobody_speaks_are_a_matter_of_configuration(
    address: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        hasty().read(address)


def test_http_goes_through_the_library_s_own_door(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(url: str, *, max_bytes: int, timeout: float, name: str) -> tuple[bytes, str]:
        assert timeout == 7
        return url.encode(), "image/png"

    monkeypatch.setattr(storage, "download", answer)
    assert hasty(seconds=7).read("https://host/a.png") == b"https://host/a.png"


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
def test_names_begin_at_the_base_unless_they_begin_somewhere(
    base: str, name: str, joined: str
) -> None:
    assert join(base, name) == joined


def test_what_is_remote() -> None:
    assert is_remote("oss://a/b")
    assert not is_remote("file:///a/b")
    assert not is_remote("a/b:c")
