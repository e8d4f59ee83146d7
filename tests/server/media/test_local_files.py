"""Files of file:// URLs: containment, links, special files, sizes."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import ConfigError
from qwen2vl.server.errors import APIError
from qwen2vl.server.media import local_files
from qwen2vl.server.media.local_files import LocalFiles

NAME = "messages[0].content[0]"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"inside")
    (folder / "sub" / "b c%41.png").write_bytes(b"percent")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.png").write_bytes(b"outside")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def refusal(root: Path, url: str, max_bytes: int = 100) -> APIError:
    with pytest.raises(APIError) as caught:
        LocalFiles(root).read(url, NAME, max_bytes)
    error = caught.value
    assert (error.status, error.param) == (400, NAME)
    assert str(root.parent) not in error.message and error.message.startswith(NAME)
    return error


def test_reads_files_below_the_root(root: Path) -> None:
    files = LocalFiles(root)
    assert files.read(f"file://{root}/a.png", NAME, 6) == b"inside"
    assert files.read(f"file://localhost{root}/./a.png", NAME, 6) == b"inside"
    assert files.read(f"FILE://{root}//a.png", NAME, 6) == b"inside"


def test_percent_escapes_and_spaces(root: Path) -> None:
    files = LocalFiles(root)
    path = root / "sub" / "b c%41.png"
    assert files.read(f"file://{quote(str(path))}", NAME, 100) == b"percent"
    (root / "ü #1?.png").write_bytes(b"odd name")
    assert files.read(f"file://{root}/ü #1?.png", NAME, 100) == b"odd name"


def test_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "link.png").symlink_to(root / "a.png")
    (root / "folder").symlink_to("sub")
    (root.parent / "alias").symlink_to(root)
    assert LocalFiles(root).read(f"file://{root}/link.png", NAME, 100) == b"inside"
    assert LocalFiles(root).read(f"file://{root}/folder/b c%2541.png", NAME, 100) == b"percent"
    alias = LocalFiles(root.parent / "alias")
    assert alias.read(f"file://{root.parent}/alias/a.png", NAME, 100) == b"inside"
    assert alias.read(f"file://{root}/a.png", NAME, 100) == b"inside"


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/does/not/exist", "{root}/../secret", "{root}/%2e%2e/secret", "{root}2/a.png"]
    + [
        "{root}/sub/../a.png",
        "{root}",
        "{root}/",
        "{parent}/secret",
        "/",
        "",
        "{root}%2f..%2fsecret",
    ]
    + [
        "//etc/passwd",
        "{root}/link",
        "{root}/folder/secret",
        "{root}/loop",
        "~/x",
        "{root}/up/secret",
    ],
)
def test_path_outside_the_root(root: Path, path: str) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "folder").symlink_to(root.parent)
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    error = refusal(root, "file://" + path.format(root=root, parent=root.parent))
    assert "secret" not in error.message and "passwd" not in error.message
    # The loop lies inside.
    codes = ("invalid_value",) if path.endswith("loop") else ("media_not_allowed", "invalid_url")
    assert error.code in codes


def test_same_text_whether_a_file_outside_exists(root: Path) -> None:
    exists = refusal(root, f"file://{root.parent}/secret").message
    assert refusal(root, f"file://{root.parent}/missing").message == exists
    (root / "link").symlink_to(root.parent / "missing")
    assert refusal(root, f"file://{root}/link").message == exists


@pytest.mark.parametrize(
    "url", ["file://host/share/a.png", "file://a.png", "file://..", "file://%2e"]
)
def test_host_in_a_file_url(root: Path, url: str) -> None:
    assert refusal(root, url).code == "invalid_url"


def test_missing_file_and_special_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(root / "pipe")
    (root / "null").symlink_to("/dev/null")
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(root)  # names of sockets are short
    listener.bind("socket")
    missing = refusal(root, f"file://{root}/missing.png")
    assert "does not exist" in missing.message and missing.code == "media_not_found"
    assert "does not exist" in refusal(root, f"file://{root}/a%00.png").message
    for name in ("sub", "pipe", "socket", "a.png/x"):
        unreadable = refusal(root, f"file://{root}/{name}")
        assert "cannot be read" in unreadable.message and unreadable.code == "invalid_value"
    assert "not under" in refusal(root, f"file://{root}/null").message
    assert refusal(root, f"file://{root}/" + "a" * 300).status == 400
    listener.close()


def test_device_below_the_root() -> None:
    with pytest.raises(APIError, match="cannot be read"):
        LocalFiles(Path("/dev")).read("file:///dev/zero", NAME, 100)


def test_size_limit_by_size_and_while_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert (
        "1,099,511,627,776 bytes, the limit is 100"
        in refusal(root, f"file://{root}/sparse").message
    )
    assert LocalFiles(root).read(f"file://{root}/a.png", NAME, 6) == b"inside"
    assert refusal(root, f"file://{root}/a.png", 5).code == "media_too_large"
    # A file that grows after its size was read.
    real = os.fstat
    monkeypatch.setattr(
        local_files.os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 0, *real(fd)[7:]))
    )
    assert refusal(root, f"file://{root}/a.png", 5).code == "media_too_large"


@pytest.mark.parametrize("swapped", ["a.png", "sub"])
def test_link_that_is_swapped_in_after_the_check(
    root: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    target = root / "a.png" if swapped == "a.png" else root / "sub" / "b.png"
    target.write_bytes(b"inside")
    outside = root.parent / "media2"
    (outside / "b.png").write_bytes(b"outside")
    real = os.path.realpath

    def swap(path: str) -> str:
        result = real(path)
        if str(path) == str(target):
            (root / swapped).rename(root / "moved")
            (root / swapped).symlink_to(outside / "a.png" if swapped == "a.png" else outside)
        return result

    files = LocalFiles(root)
    monkeypatch.setattr(local_files.os.path, "realpath", swap)
    with pytest.raises(APIError, match="cannot be read"):
        files.read(f"file://{target}", NAME, 100)
    monkeypatch.undo()
    assert (root / swapped).is_symlink()


def test_no_descriptors_are_left_open(root: Path) -> None:
    files, before = LocalFiles(root), len(os.listdir("/proc/self/fd"))
    for name in ("a.png", "sub/b c%2541.png", "sub", "missing", "sub/missing", "a.png/x"):
        for max_bytes in (1, 100):
            with contextlib.suppress(APIError):
                files.read(f"file://{root}/{name}", NAME, max_bytes)
    assert len(os.listdir("/proc/self/fd")) == before


def test_root_must_be_a_folder(root: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        LocalFiles(root / "a.png")
    with pytest.raises(ConfigError, match="not a folder"):
        LocalFiles(root / "missing")


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    for url in (f"file://{text}", f"file:///usr/{text}", f"file:///etc/{text}"):
        with pytest.raises(APIError) as caught:
            LocalFiles(Path("/usr/share")).read(url, NAME, 10)
        assert caught.value.status == 400
