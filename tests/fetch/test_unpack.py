"""Packages: the named files and nothing else; unsafe, large and damaged archives are refused."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from qwen2vl.fetch import FetchError
from qwen2vl.fetch import unpack as unpack_module
from qwen2vl.fetch.unpack import unpack
from tests.fetch.archives import SUFFIXES, Members, link, make_archive

every_format = pytest.mark.parametrize("suffix", SUFFIXES.values())
FILES = {"in/": "out/", "LICENSE": "LICENSE"}
LICENSE = ("LICENSE", b"free")


def write(tmp_path: Path, suffix: str, members: Members) -> Path:
    path = tmp_path / f"package{suffix}"
    path.write_bytes(make_archive(suffix, members))
    return path


def unpacked(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check_refused(tmp_path: Path, suffix: str, members: Members, message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(tmp_path, suffix, members)
    before = set(tmp_path.iterdir())
    with pytest.raises(FetchError, match=message) as raised:
        unpack(path, FILES, folder, max_bytes=100)
    assert str(raised.value).startswith(path.name)
    assert set(tmp_path.iterdir()) == before
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@every_format
def test_only_the_named_files_are_written(tmp_path: Path, suffix: str) -> None:
    members = [
        ("./in/deep/a.txt" if suffix == ".deb" else "in/deep/a.txt", b"one"),
        ("in/.hidden", b"x"),
        ("in/deep/.DS_Store", b"x"),
        ("inside.txt", b"x"),
        ("setup.py", b"x"),
        link("etc/conf", "/etc/passwd"),
        LICENSE,
    ]
    folder = tmp_path / "folder"
    folder.mkdir()
    assert unpack(write(tmp_path, suffix, members), FILES, folder, max_bytes=7) == 7
    assert unpacked(folder) == {"out/deep/a.txt": b"one", "LICENSE": b"free"}
    mode = (folder / "out" / "deep" / "a.txt").stat().st_mode
    assert mode & 0o6111 == 0, "modes of the archive are not taken over"


@every_format
@pytest.mark.parametrize(
    "name", ["../x", "in/../../x", "in/..", "/in/x", "/etc/x", "in\\..\\x", "elsewhere/../../x"]
)
def test_a_path_out_of_the_package_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    check_refused(tmp_path, suffix, [LICENSE, (name, b"x")], "leads out of the package")


@every_format
def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path, suffix: str) -> None:
    members = [LICENSE, link("in/x", "../../../x"), ("in/x/y", b"evil")]
    check_refused(tmp_path, suffix, members, "in/x is a link or a device")


@pytest.mark.parametrize("suffix", [".tgz", ".deb"])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_hard_links_and_devices_are_refused(tmp_path: Path, suffix: str, kind: bytes) -> None:
    members = [LICENSE, link("in/x", "LICENSE", kind)]
    check_refused(tmp_path, suffix, members, "in/x is a link or a device")


@every_format
def test_more_bytes_than_pinned_are_refused(tmp_path: Path, suffix: str) -> None:
    members = [LICENSE, ("in/a", bytes(60)), ("in/b", bytes(60))]
    check_refused(tmp_path, suffix, members, "more bytes than are pinned, at in/b")


@every_format
def test_what_is_read_over_is_limited(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_module, "MAX_SKIPPED_BYTES", 1000)
    check_refused(tmp_path, suffix, [("other", bytes(1001)), LICENSE], "bytes that are not needed")
    monkeypatch.setattr(unpack_module, "MAX_MEMBERS", 1)
    (tmp_path / "folder").rmdir()
    check_refused(tmp_path, suffix, [("other", b"x"), LICENSE], "more than 1 members")


@pytest.mark.parametrize("suffix", [".tgz", ".deb"])
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path, suffix: str) -> None:
    check_refused(tmp_path, suffix, [LICENSE, ("in/a", b"1"), ("in/a", b"2")], "is there twice")


@every_format
def test_a_package_without_the_files_is_refused(tmp_path: Path, suffix: str) -> None:
    check_refused(tmp_path, suffix, [("elsewhere/a", b"x"), LICENSE], "has no in/$")


@every_format
def test_truncated_archives_are_refused(tmp_path: Path, suffix: str) -> None:
    content = random.Random(1).randbytes(90)
    data = make_archive(suffix, [LICENSE, ("in/a", content)])
    path, num_refused = tmp_path / f"package{suffix}", 0
    sizes = range(0, len(data), 7)
    for number, size in enumerate(sizes):
        folder = tmp_path / str(number)
        folder.mkdir()
        path.write_bytes(data[:size])
        try:
            unpack(path, FILES, folder, max_bytes=100)
        except FetchError:
            num_refused += 1
        else:  # only zeros after the last member of a tar were lost
            assert suffix == ".tgz"
            assert unpacked(folder) == {"LICENSE": b"free", "out/a": content}
    assert num_refused > 0.7 * len(sizes)


@every_format
def test_damaged_archives_raise_no_other_error(tmp_path: Path, suffix: str) -> None:
    data = make_archive(suffix, [LICENSE, ("in/a", b"abc"), ("in/b", b"def")])
    path, chance = tmp_path / f"package{suffix}", random.Random(2)
    num_refused = 0
    for number in range(300):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3])):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            unpack(path, FILES, folder, max_bytes=100)
        except FetchError:
            num_refused += 1
        assert sum(map(len, unpacked(folder).values())) <= 101
    assert num_refused > 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no Debian package"),
        (b"!<arch>\n", "without data.tar"),
        (b"!<arch>\n" + b"x" * 60, "without data.tar"),
        (make_archive(".deb", [LICENSE])[:-200].replace(b"data.tar", b"date.tar"), "without data"),
    ],
)
def test_what_is_no_debian_package_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "package.deb"
    path.write_bytes(data)
    with pytest.raises(FetchError, match=message):
        unpack(path, FILES, tmp_path, max_bytes=100)


def test_an_encrypted_zip_file_is_refused(tmp_path: Path) -> None:
    data = bytearray(make_archive(".whl", [LICENSE]))
    data[6] |= 1  # the flag of the local header, and of the central directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path = tmp_path / "package.whl"
    path.write_bytes(data)
    with pytest.raises(FetchError, match=r"damaged .*encrypted"):
        unpack(path, FILES, tmp_path, max_bytes=100)


def test_errors_of_the_disk_are_passed_on(tmp_path: Path) -> None:
    path = write(tmp_path, ".tgz", [LICENSE, ("in/a", b"x")])
    (tmp_path / "out").write_text("a file, where a folder is needed")
    with pytest.raises(OSError, match="out"):
        unpack(path, FILES, tmp_path, max_bytes=100)


def test_a_sparse_file_counts_what_it_holds(tmp_path: Path) -> None:
    """GNU sparse files declare gigabytes of zeros in a few bytes of the archive."""
    if not hasattr(os, "SEEK_HOLE"):
        pytest.skip("no sparse files here")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("in/a")
        info.pax_headers = {"GNU.sparse.size": str(2**40), "GNU.sparse.map": f"{2**40},0"}
        archive.addfile(info, io.BytesIO(b""))
    path = tmp_path / "package.tgz"
    path.write_bytes(file.getvalue())
    with pytest.raises(FetchError, match="more bytes than are pinned"):
        unpack(path, {"in/": "out/"}, tmp_path, max_bytes=100)
    assert sum(map(len, unpacked(tmp_path / "out").values())) <= 100
