"""Storage: reads objects from local folders, http(s) and any address that fsspec supports.

Many objects are fetched concurrently, each attempt with its own timeout and failed ones retried
with exponential backoff: an object store is slow, throttles, and sometimes hangs. A fetch that
hangs is abandoned in its thread. A remote file that is read in parts is fetched by byte ranges,
each with its own retries. (Qwen2-VL sec. 2.3: concurrency and retries tuned to the store.)
"""

from __future__ import annotations

import io
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.media.download import download

__all__ = ["MissingError", "Storage", "is_remote", "resolve_address"]

INITIAL_BACKOFF = 0.25  # seconds before the first retry; doubled for each further one
MAX_BACKOFF = 8.0  # seconds
MAX_OBJECT_BYTES = 4 * 1024**3
MIN_RANGE_BYTES = 1 << 20  # of a remote object read in parts, per fetch: the read buffer
MAX_RANGE_BYTES = 8 << 20  # and at most, however much is requested: each fetch has its own timeout

# Keys under which stores report the version of an object; the first that is present counts.
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "md5", "mtime", "LastModified", "last_modified", "updated"),
    "created",  # for stores that report nothing better
)

# Errors for which a retry cannot help.
_NOT_RETRYABLE = (FileNotFoundError, IsADirectoryError, PermissionError, ConfigError)


class MissingError(InputError):
    """There is no object of this name."""


class Storage:
    """Reads objects by address."""

    def __init__(
        self,
        *,
        concurrency: int = 16,
        max_retries: int = 4,
        timeout: float = 30.0,
        backoff_scale: float = 1.0,
    ) -> None:
        """Set the concurrent fetches, retries, timeout of each attempt, and scale of backoffs."""
        self.concurrency, self.max_retries, self.timeout = concurrency, max_retries, timeout
        self.backoff_scale = backoff_scale
        # Keyed by process: connections do not survive a fork. fsspec caches file systems per
        # thread, and each fetch here has its own thread.
        self._filesystems: dict[tuple[int, str], Any] = {}

    def read(self, address: str, num_bytes: int | None = None) -> bytes:
        """Fetch one object, or its first `num_bytes` bytes, with retries.

        Raises:
            MissingError: the object does not exist.
            InputError: all attempts failed; the text names the last cause.
            ConfigError: the package for this protocol is not installed.
        """
        return self._with_retries(address, lambda: self._fetch(address, num_bytes))

    def read_many(
        self, addresses: Iterable[str], num_bytes: int | None = None
    ) -> dict[str, bytes | InputError]:
        """Fetch many objects concurrently; a failed one has its error as the value."""
        queue: SimpleQueue[tuple[str, Future[bytes]]] = SimpleQueue()
        futures: dict[str, Future[bytes]] = {}
        for address in dict.fromkeys(addresses):
            futures[address] = Future()
            queue.put((address, futures[address]))
        for _ in range(min(self.concurrency, len(futures))):
            Thread(target=self._fetch_queued, args=(queue, num_bytes), daemon=True).start()
        wait_for(futures.values())
        return {address: _result_or_error(future) for address, future in futures.items()}

    def size(self, address: str) -> int:
        """Return the size of an object in bytes."""
        if not is_remote(address):
            return _local_path(address).stat().st_size
        return int(self._with_retries(address, lambda: self._filesystem(address).size(address)))

    def version(self, address: str) -> str:
        """Return a string that changes with the object's content: its size, and version if any."""
        info = self._with_retries(address, lambda: self._filesystem(address).info(address))
        version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
        return f"{info.get('size')} {version}"

    def open(self, address: str) -> BinaryIO:
        """Open a local or remote object for random access; each range is fetched with retries."""
        if not is_remote(address):
            return _local_path(address).open("rb")
        return io.BufferedReader(_RangeReader(self, address), MIN_RANGE_BYTES)

    def read_range(self, address: str, start: int, stop: int, size: int) -> bytes:
        """Fetch the bytes `start` to `stop` of an object of `size` bytes; raises as `read`."""
        return self._with_retries(address, lambda: self._fetch_range(address, start, stop, size))

    def list_files(self, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
        """List the objects that match a glob pattern, or those in a folder with one of `suffixes`.

        Any other address is returned as it is.
        """
        if is_remote(pattern):
            return self._list_remote_files(pattern, suffixes)
        path = Path(pattern).expanduser()
        if "*" in pattern:
            return sorted(
                str(path) for path in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            )
        if path.is_dir():
            return sorted(str(path) for path in path.iterdir() if path.name.endswith(suffixes))
        return [str(path)]

    def _list_remote_files(self, pattern: str, suffixes: tuple[str, ...]) -> list[str]:
        filesystem = self._with_retries(pattern, lambda: self._filesystem(pattern))
        if "*" in pattern:
            paths = self._with_retries(pattern, lambda: filesystem.glob(pattern))
        elif self._with_retries(pattern, lambda: filesystem.isdir(pattern)):
            names = self._with_retries(pattern, lambda: filesystem.ls(pattern, detail=False))
            paths = [name for name in names if name.endswith(suffixes)]
        else:
            return [pattern]
        return sorted(filesystem.unstrip_protocol(name) for name in paths)

    def _fetch_queued(
        self, queue: SimpleQueue[tuple[str, Future[bytes]]], num_bytes: int | None
    ) -> None:
        while True:
            try:
                address, future = queue.get_nowait()
            except Empty:
                return
            try:
                future.set_result(self.read(address, num_bytes))
            except BaseException as error:  # raised by _result_or_error in the calling thread
                future.set_exception(error)

    def _with_retries(self, address: str, fetch: Callable[[], Any]) -> Any:
        for attempt in range(self.max_retries + 1):
            try:
                return _call_with_timeout(self.timeout, fetch)
            except _NOT_RETRYABLE as error:
                raise _read_error(address, error, 1) from error
            except Exception as error:  # every backend raises its own client's errors
                if attempt == self.max_retries:
                    raise _read_error(address, error, attempt + 1) from error
            backoff = min(MAX_BACKOFF, INITIAL_BACKOFF * 2**attempt)
            # Jitter: requests that were throttled together should not be repeated together.
            time.sleep(self.backoff_scale * backoff * (0.5 + random.random()))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _fetch(self, address: str, num_bytes: int | None) -> bytes:
        if address.lower().startswith(("http://", "https://")):
            # Fetches the whole object: not every server supports range requests.
            return download(
                address, max_bytes=MAX_OBJECT_BYTES, timeout=self.timeout, name=address
            )[0]
        return self._filesystem(address).cat_file(address, end=num_bytes)

    def _fetch_range(self, address: str, start: int, stop: int, size: int) -> bytes:
        data = self._filesystem(address).cat_file(address, start=start, end=stop)
        if len(data) == size:  # not every server supports range requests
            data = data[start:stop]
        # A short response would be taken for the end of the object.
        if len(data) != stop - start:
            expected = f"the {stop - start:,} from byte {start:,} on"
            raise InputError(f"{len(data):,} bytes came instead of {expected}")
        return data

    def _filesystem(self, address: str) -> Any:
        """Return the fsspec file system of the address's protocol, one for each process."""
        protocol = address.partition("://")[0].lower()
        key = (os.getpid(), protocol)
        if key not in self._filesystems:
            self._filesystems[key] = _connect(protocol, address)
        return self._filesystems[key]


class _RangeReader(io.RawIOBase):
    """A remote object as a seekable file, without a connection that could break."""

    def __init__(self, storage: Storage, address: str) -> None:
        super().__init__()
        self.storage, self.address = storage, address
        self.size, self.position = storage.size(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.size, self.position + min(len(buffer), MAX_RANGE_BYTES))
        if stop <= self.position:
            return 0
        data = self.storage.read_range(self.address, self.position, stop, self.size)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def is_remote(address: str) -> bool:
    """Return whether an address has a protocol other than file://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address) is not None and not (
        address.lower().startswith("file://")
    )


def resolve_address(base: str, name: str) -> str:
    """Resolve `name` relative to the folder or address `base`, unless it is absolute."""
    if is_remote(name) or name.lower().startswith(("file://", "data:")) or not base:
        return name
    if is_remote(base):
        return name if name.startswith("/") else posixpath.join(base, name)
    return str(Path(base) / os.path.expanduser(name))  # unchanged if there is no such user


def _local_path(address: str) -> Path:
    return Path(address).expanduser()


def _connect(protocol: str, address: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(
            f"{address}: addresses need the package fsspec; pip install 'qwen2vl[data]'"
        ) from error
    try:
        return fsspec.filesystem(protocol)
    except ValueError as error:
        raise ConfigError(f"{address}: the protocol {protocol}:// is not known") from error
    except ImportError as error:
        raise ConfigError(
            f"{address}: {protocol}:// needs a package that is not installed: {error}"
        ) from error


def _call_with_timeout(timeout: float, call: Callable[[], Any]) -> Any:
    """Call in a thread and stop waiting after `timeout` seconds; a hanging call is abandoned."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError(f"no answer in {timeout:g} s") from error


def _read_error(address: str, error: BaseException, num_attempts: int) -> Exception:
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{address} is missing; check the name, and data.sources.N.media_root")
    cause = str(error) if isinstance(error, InputError | TimeoutError) else type(error).__name__
    attempts = f" in {num_attempts} tries" if num_attempts > 1 else ""
    return InputError(f"{address} cannot be read{attempts}: {cause or 'no answer'}")


def _result_or_error(future: Future[bytes]) -> bytes | InputError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, InputError):
        return error
    raise error
