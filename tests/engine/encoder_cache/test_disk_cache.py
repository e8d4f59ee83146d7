"""Disk cache of vision embeddings: atomic, checksummed, bounded, private, never fatal."""

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
from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache, EmbeddingKey
from qwen2vl.errors import InputError

KEY = EmbeddingKey(b"d" * 32, b"w" * 32)


def embeddings(num: int = 4, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(number: int) -> EmbeddingKey:
    return EmbeddingKey(number.to_bytes(32, "big"), b"w" * 32)


def open_cache(path: Path, max_bytes: int = 10**6) -> DiskEmbeddingCache:
    return DiskEmbeddingCache(path, max_bytes=max_bytes)


def cache_files(path: Path) -> list[Path]:
    return sorted((path / "vision-embeddings").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_restored_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    open_cache(tmp_path).write(KEY, embeddings(dtype=dtype))
    found = open_cache(tmp_path).read(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, embeddings(dtype=dtype))
    (path,) = cache_files(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"vision_MD"}
        assert set(file.metadata()) == {"blake2b"}


def test_other_pixels_or_weights_are_cache_misses(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(KEY, embeddings())
    assert cache.read(KEY._replace(pair_digest=b"e" * 32)) is None
    assert cache.read(KEY._replace(weights_digest=b"e" * 32)) is None
    assert cache.num_damaged == 0


def test_every_flipped_byte_is_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever a byte changes, header and checksum included, wrong data are never returned."""
    cache = open_cache(tmp_path)
    cache.write(KEY, embeddings())
    (path,) = cache_files(tmp_path)
    content = path.read_bytes()
    removed = 0
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(
                content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]
            )
            found = cache.read(KEY)
            assert found is None or torch.equal(found, embeddings()), position
            assert path.exists() == (found is not None)
            removed += found is None
    assert removed == 3 * len(content) == cache.num_damaged
    assert "damaged on disk; it is removed and encoded anew" in caplog.text


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_truncated_files_are_removed(tmp_path: Path, cut: int) -> None:
    cache = open_cache(tmp_path)
    cache.write(KEY, embeddings())
    (path,) = cache_files(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    assert cache.read(KEY) is None
    assert cache_files(tmp_path) == []
    cache.write(KEY, embeddings())
    assert cache.read(KEY) is not None


def test_a_file_of_another_key_is_rejected(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(KEY, embeddings())
    (path,) = cache_files(tmp_path)
    cache.write(key(1), embeddings(seed=1))
    (other,) = set(cache_files(tmp_path)) - {path}
    other.replace(path)
    assert cache.read(KEY) is None
    assert cache.num_damaged == 1


def test_the_folder_is_bounded_and_eviction_is_lru(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(key(0), embeddings(64))
    (path,) = cache_files(tmp_path)
    size = path.stat().st_size
    cache = open_cache(tmp_path, max_bytes=8 * size)
    now = time.time()
    for number in range(30):
        cache.write(key(number), embeddings(64, seed=number))
        if cache.read(key(3)) is not None:  # always in use
            _set_times(tmp_path, now - 1000 + number)
        assert sum(path.stat().st_size for path in cache_files(tmp_path)) <= 8 * size
    cached = [number for number in range(30) if cache.read(key(number)) is not None]
    assert 3 in cached
    assert cached[1:] == list(range(30 - len(cached) + 1, 30))
    assert len(cached) >= 6


def _set_times(path: Path, when: float) -> None:
    """Set back the times of the files, keeping the order of use."""
    recent = sorted((p.stat().st_mtime_ns, p) for p in cache_files(path))
    for step, (_, file) in enumerate(recent):
        os.utime(file, (when + step / 1000,) * 2)


def test_embeddings_above_the_limit_are_not_written(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, max_bytes=1000)
    cache.write(key(0), embeddings(2))
    cache.write(key(1), embeddings(100))
    assert cache.read(key(1)) is None
    assert cache.read(key(0)) is not None


def test_only_its_own_files_are_counted_and_removed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, max_bytes=600)
    foreign_file = tmp_path / "vision-embeddings" / "notes.txt"
    foreign_file.write_bytes(bytes(10_000))
    abandoned = tmp_path / "vision-embeddings" / f".{'a' * 64}.safetensors.xyz.partial"
    fresh_partial = tmp_path / "vision-embeddings" / f".{'b' * 64}.safetensors.xyz.partial"
    for path in (abandoned, fresh_partial):
        path.write_bytes(bytes(10))
    os.utime(abandoned, (time.time() - 7200,) * 2)
    cache.write(KEY, embeddings())
    assert cache.read(KEY) is not None
    assert foreign_file.exists()
    assert fresh_partial.exists()
    assert not abandoned.exists()


def test_the_folder_and_its_files_are_private(tmp_path: Path) -> None:
    os.umask(os.umask(0))  # any umask must work
    (tmp_path / "vision-embeddings").mkdir(mode=0o755)
    cache = open_cache(tmp_path)
    cache.write(KEY, embeddings())
    assert (tmp_path / "vision-embeddings").stat().st_mode & 0o777 == 0o700
    assert cache_files(tmp_path)[0].stat().st_mode & 0o777 == 0o600
    open_cache(tmp_path / "new" / "nested")
    assert (tmp_path / "new" / "nested" / "vision-embeddings").stat().st_mode & 0o777 == 0o700


def test_a_symlink_and_a_file_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "vision-embeddings").symlink_to(tmp_path / "real")
    with pytest.raises(
        InputError, match="vision-embeddings: is a link, or belongs to somebody else"
    ):
        open_cache(tmp_path)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made a private folder for vision embeddings"):
        open_cache(tmp_path / "file")


def test_a_folder_of_another_user_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_cache(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="belongs to somebody else, who could change"):
        open_cache(tmp_path)


@pytest.mark.parametrize(
    ("function", "code"),
    [("replace", errno.ENOSPC), ("scandir", errno.EIO), ("utime", errno.EROFS)],
)
def test_disk_errors_are_logged_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    code: int,
) -> None:
    open_cache(tmp_path).write(key(0), embeddings())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    cache = open_cache(tmp_path)
    monkeypatch.setattr(disk_cache.os, function, fail)
    for number in range(3):
        cache.write(key(number + 1), embeddings())
        assert cache.read(key(0)) is not None
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"{os.strerror(code)}; requests continue without them" in caplog.text
    monkeypatch.undo()
    assert not [path for path in cache_files(tmp_path) if path.suffix == ".partial"]


def test_a_file_size_limit_acts_like_a_full_disk(tmp_path: Path) -> None:
    """A limit on file size stops the write halfway, like a full disk."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache, EmbeddingKey
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = DiskEmbeddingCache(Path({str(tmp_path)!r}), max_bytes=10**8)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
cache.write(EmbeddingKey(b'a' * 32, b'w' * 32), torch.zeros(1000, 8))
assert cache.read(EmbeddingKey(b'a' * 32, b'w' * 32)) is None
cache.write(EmbeddingKey(b'b' * 32, b'w' * 32), torch.zeros(10, 8))
assert cache.read(EmbeddingKey(b'b' * 32, b'w' * 32)) is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large; requests continue without them" in done.stderr
    assert len(cache_files(tmp_path)) == 1


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """Both write, read and evict at once; what is read is always correct."""
    code = f"""
import sys, torch
from pathlib import Path
from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache, EmbeddingKey
cache = DiskEmbeddingCache(Path({str(tmp_path)!r}), max_bytes=20_000)
generator = torch.Generator().manual_seed(int(sys.argv[1]))
hits = 0
for _ in range(400):
    n = int(torch.randint(20, (), generator=generator))
    key = EmbeddingKey(bytes([n]) * 32, b'w' * 32)
    found = cache.read(key)
    if found is None:
        cache.write(key, torch.full((40, 8), float(n)))
    else:
        hits += 1
        assert (found == n).all()
assert cache.num_damaged == 0, cache.num_damaged
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
    remaining = cache_files(tmp_path)
    assert not [path for path in remaining if path.suffix != ".safetensors"]
    assert sum(path.stat().st_size for path in remaining) <= 20_000 * 17 // 16 + 2000
