"""Rows on disk: whole or not at all, checked, bounded, private, and never in the way."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qwen2vl.engine.encoder_cache import disk_cache
from qwen2vl.engine.encoder_cache.disk_cache import RowsFolder, VisionKey
from qwen2vl.errors import InputError

KEY = VisionKey(b"d" * 32, b"w" * 32)


def rows(num: int = 4, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(number: int) -> VisionKey:
    return VisionKey(number.to_bytes(32, "big"), b"w" * 32)


def folder(path: Path, max_bytes: int = 10**6) -> RowsFolder:
    return RowsFolder(path, max_bytes=max_bytes)


def files(path: Path) -> list[Path]:
    return sorted((path / "vision-rows").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder(tmp_path).write(KEY, rows(dtype=dtype))
    found = folder(tmp_path).read(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, rows(dtype=dtype))
    (path,) = files(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"rows_MD"}
        assert set(file.metadata()) == {"blake2b"}


def test_other_pixels_or_weights_find_nothing(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    kept.write(KEY, rows())
    assert kept.read(KEY._replace(digest=b"e" * 32)) is None
    assert kept.read(KEY._replace(fingerprint=b"e" * 32)) is None
    assert kept.damaged == 0


def test_every_flipped_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever a byte changes, header and checksum included, wrong rows never come back."""
    kept = folder(tmp_path)
    kept.write(KEY, rows())
    (path,) = files(tmp_path)
    good = path.read_bytes()
    removed = 0
    for place in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            found = kept.read(KEY)
            assert found is None or torch.equal(found, rows()), place
            assert path.exists() == (found is not None)
            removed += found is None
    assert removed == 3 * len(good) == kept.damaged
    assert "damaged on disk; it is removed and encoded anew" in caplog.text


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_torn_files_are_removed(tmp_path: Path, cut: int) -> None:
    kept = folder(tmp_path)
    kept.write(KEY, rows())
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    assert kept.read(KEY) is None
    assert files(tmp_path) == []
    kept.write(KEY, rows())
    assert kept.read(KEY) is not None


def test_a_file_under_another_keys_name_is_refused(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    kept.write(KEY, rows())
    (path,) = files(tmp_path)
    kept.write(key(1), rows(seed=1))
    (other,) = set(files(tmp_path)) - {path}
    other.replace(path)
    assert kept.read(KEY) is None
    assert kept.damaged == 1


def test_the_folder_is_bounded_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    kept = folder(tmp_path)
    kept.write(key(0), rows(64))
    (path,) = files(tmp_path)
    size = path.stat().st_size
    kept = folder(tmp_path, max_bytes=8 * size)
    now = time.time()
    for number in range(30):
        kept.write(key(number), rows(64, seed=number))
        if kept.read(key(3)) is not None:  # in use all the time
            _set_times(tmp_path, now - 1000 + number)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 8 * size
    there = [number for number in range(30) if kept.read(key(number)) is not None]
    assert 3 in there
    assert there[1:] == list(range(30 - len(there) + 1, 30))
    assert len(there) >= 6


def _set_times(path: Path, when: float) -> None:
    """Push what was used just now back in time, keeping the order of use."""
    recent = sorted((p.stat().st_mtime_ns, p) for p in files(path))
    for step, (_, file) in enumerate(recent):
        os.utime(file, (when + step / 1000,) * 2)


def test_rows_larger_than_the_folder_are_not_written(tmp_path: Path) -> None:
    kept = folder(tmp_path, max_bytes=1000)
    kept.write(key(0), rows(2))
    kept.write(key(1), rows(100))
    assert kept.read(key(1)) is None
    assert kept.read(key(0)) is not None


def test_only_its_own_files_are_counted_and_removed(tmp_path: Path) -> None:
    kept = folder(tmp_path, max_bytes=600)
    strange = tmp_path / "vision-rows" / "notes.txt"
    strange.write_bytes(bytes(10_000))
    abandoned = tmp_path / "vision-rows" / f"{'a' * 64}.xyz.partial"
    at_work = tmp_path / "vision-rows" / f"{'b' * 64}.xyz.partial"
    for path in (abandoned, at_work):
        path.write_bytes(bytes(10))
    os.utime(abandoned, (time.time() - 7200,) * 2)
    kept.write(KEY, rows())
    assert kept.read(KEY) is not None
    assert strange.exists()
    assert at_work.exists()
    assert not abandoned.exists()


def test_the_folder_and_its_files_are_private(tmp_path: Path) -> None:
    os.umask(os.umask(0))  # whatever it is, it must not matter
    (tmp_path / "vision-rows").mkdir(mode=0o755)
    kept = folder(tmp_path)
    kept.write(KEY, rows())
    assert (tmp_path / "vision-rows").stat().st_mode & 0o777 == 0o700
    assert files(tmp_path)[0].stat().st_mode & 0o777 == 0o600
    folder(tmp_path / "new" / "nested")
    assert (tmp_path / "new" / "nested" / "vision-rows").stat().st_mode & 0o777 == 0o700


def test_a_link_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "vision-rows").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="vision-rows: is a link, or belongs to somebody else"):
        folder(tmp_path)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made a folder of your own for vision rows"):
        folder(tmp_path / "file")


def test_a_strangers_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="belongs to somebody else, who could change"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("broken", "code"),
    [("replace", errno.ENOSPC), ("scandir", errno.EIO), ("utime", errno.EROFS)],
)
def test_trouble_with_the_disk_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
    code: int,
) -> None:
    folder(tmp_path).write(key(0), rows())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    kept = folder(tmp_path)
    monkeypatch.setattr(disk_cache.os, broken, refuse)
    for number in range(3):
        kept.write(key(number + 1), rows())
        assert kept.read(key(0)) is not None
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"{os.strerror(code)}; answering goes on without" in caplog.text
    assert not [path for path in files(tmp_path) if path.suffix == ".partial"]


def test_a_full_disk_really(tmp_path: Path) -> None:
    """A limit on file size stops the write halfway, as a full disk does."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from qwen2vl.engine.encoder_cache.disk_cache import RowsFolder, VisionKey
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kept = RowsFolder(Path({str(tmp_path)!r}), max_bytes=10**8)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
kept.write(VisionKey(b'a' * 32, b'w' * 32), torch.zeros(1000, 8))
assert kept.read(VisionKey(b'a' * 32, b'w' * 32)) is None
kept.write(VisionKey(b'b' * 32, b'w' * 32), torch.zeros(10, 8))
assert kept.read(VisionKey(b'b' * 32, b'w' * 32)) is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; answering goes on without" in done.stderr
    assert len(files(tmp_path)) == 1


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Both write, read and evict at once; what comes back is always right."""
    code = f"""
import sys, torch
from pathlib import Path
from qwen2vl.engine.encoder_cache.disk_cache import RowsFolder, VisionKey
kept = RowsFolder(Path({str(tmp_path)!r}), max_bytes=20_000)
generator = torch.Generator().manual_seed(int(sys.argv[1]))
hits = 0
for _ in range(400):
    n = int(torch.randint(20, (), generator=generator))
    key = VisionKey(bytes([n]) * 32, b'w' * 32)
    found = kept.read(key)
    if found is None:
        kept.write(key, torch.full((40, 8), float(n)))
    else:
        hits += 1
        assert (found == n).all()
assert kept.damaged == 0, kept.damaged
print(hits)
"""
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for seed in (1, 2)
    ]
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err.decode()
        assert not err, err.decode()
        assert int(out) > 100
    left = files(tmp_path)
    assert not [path for path in left if path.suffix != ".safetensors"]
    assert sum(path.stat().st_size for path in left) <= 20_000 * 17 // 16 + 2000
