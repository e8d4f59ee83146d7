"""Bytes from wherever data lie: local folders, http, and any address that fsspec knows.

Many objects are fetched at a time, each with a time limit of its own and new tries that wait
longer: an object store answers slowly, refuses what comes too fast, and sometimes hangs. A fetch
that hangs is left behind, never waited for. What is read piece by piece is fetched so too, each
piece by itself. (Qwen2-VL sec. 2.3: concurrency and retries tuned to the store.) It must not know
samples. Next room: prepare.py.
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

__all__ = ["MissingError", "Storage", "is_remote", "join"]

FIRST_WAIT = 0.25  # seconds before the second try; each further wait is twice as long
LONGEST_WAIT = 8.0
MAX_BYTES = 4 * 1024**3  # of one object
PIECE = 1 << 20  # bytes of a remote object that are fetched at least, when it is read by pieces
LONGEST_PIECE = 8 << 20  # and at most: each has its time limit, however much is asked for at once

# Where stores say which version of an object they hold; the first of them that is there counts.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "md5", "mtime", "LastModified", "last_modified", "updated"),
    "created",  # for stores that name nothing better
)

# What a store says when trying again cannot help.
_FINAL = (FileNotFoundError, IsADirectoryError, PermissionError, ConfigError)


class MissingError(InputError):
    """There is no object of this name."""


class Storage:
    """Reads objects by address."""

    def __init__(
        self, *, concurrency: int = 16, retries: int = 4, seconds: float = 30.0, scale: float = 1.0
    ) -> None:
        """Set the manners: fetches at a time, new tries, seconds for each; `scale` of waits."""
        self.concurrency, self.retries, self.seconds = concurrency, retries, seconds
        self.scale = scale
        # By process too: connections do not survive a fork. fsspec's own memory of file systems is
        # one of threads, and each fetch here has a thread.
        self._systems: dict[tuple[int, str], Any] = {}

    def read(self, address: str, first: int | None = None) -> bytes:
        """Fetch one object, or its `first` bytes, in as many tries as it is allowed.

        Raises:
            MissingError: there is none of this name.
            InputError: it did not come; the text names the last cause.
            ConfigError: the package that speaks this protocol is not installed.
        """
        return self._tried(address, lambda: self._fetch(address, first))

    def read_all(
        self, addresses: Iterable[str], first: int | None = None
    ) -> dict[str, bytes | InputError]:
        """Fetch many objects at a time; what fails is told in its place."""
        queue: SimpleQueue[tuple[str, Future[bytes]]] = SimpleQueue()
        futures: dict[str, Future[bytes]] = {}
        for address in dict.fromkeys(addresses):
            futures[address] = Future()
            queue.put((address, futures[address]))
        for _ in range(min(self.concurrency, len(futures))):
            Thread(target=self._work, args=(queue, first), daemon=True).start()
        wait_for(futures.values())
        return {address: _outcome(future) for address, future in futures.items()}

    def size(self, address: str) -> int:
        """Tell how many bytes an object has."""
        if not is_remote(address):
            return _local(address).stat().st_size
        return int(self._tried(address, lambda: self._system(address).size(address)))

    def version(self, address: str) -> str:
        """Name what an object holds now, as well as its store can: by its size at least."""
        about = self._tried(address, lambda: self._system(address).info(address))
        told = next((about[key] for key in _VERSIONS if about.get(key)), "")
        return f"{about.get('size')} {told}"

    def open(self, address: str) -> BinaryIO:
        """Open an object for reading in any order, local or not; each piece has its new tries."""
        if not is_remote(address):
            return _local(address).open("rb")
        return io.BufferedReader(_Pieces(self, address), PIECE)

    def piece(self, address: str, start: int, stop: int, size: int) -> bytes:
        """Fetch all of the bytes `start` to `stop` of an object of `size`; raises as `read`."""
        return self._tried(address, lambda: self._cut(address, start, stop, size))

    def listing(self, pattern: str, endings: tuple[str, ...]) -> list[str]:
        """Name the objects a pattern with * means, or those in a folder with one of `endings`.

        Anything else names itself.
        """
        if is_remote(pattern):
            return self._remote_listing(pattern, endings)
        path = Path(pattern).expanduser()
        if "*" in pattern:
            return sorted(
                str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor)))
            )
        if path.is_dir():
            return sorted(str(p) for p in path.iterdir() if p.name.endswith(endings))
        return [str(path)]

    def _remote_listing(self, pattern: str, endings: tuple[str, ...]) -> list[str]:
        system = self._tried(pattern, lambda: self._system(pattern))
        if "*" in pattern:
            found = self._tried(pattern, lambda: system.glob(pattern))
        elif self._tried(pattern, lambda: system.isdir(pattern)):
            names = self._tried(pattern, lambda: system.ls(pattern, detail=False))
            found = [name for name in names if name.endswith(endings)]
        else:
            return [pattern]
        return sorted(system.unstrip_protocol(name) for name in found)

    def _work(self, queue: SimpleQueue[tuple[str, Future[bytes]]], first: int | None) -> None:
        while True:
            try:
                address, future = queue.get_nowait()
            except Empty:
                return
            try:
                future.set_result(self.read(address, first))
            except BaseException as error:  # whatever it is belongs to who asked
                future.set_exception(error)

    def _tried(self, address: str, fetch: Callable[[], Any]) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return _within(self.seconds, fetch)
            except _FINAL as error:
                raise _refusal(address, error, 1) from error
            except Exception as error:  # every backend raises what its own client does
                if attempt == self.retries:
                    raise _refusal(address, error, attempt + 1) from error
            pause = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            # Those that were refused together should not come back together.
            time.sleep(self.scale * pause * (0.5 + random.random()))
        raise AssertionError("unreachable: the last try returns or raises")

    def _fetch(self, address: str, first: int | None) -> bytes:
        if address.lower().startswith(("http://", "https://")):
            # A head costs as much as the whole here: not every server cuts.
            return download(address, max_bytes=MAX_BYTES, timeout=self.seconds, name=address)[0]
        return self._system(address).cat_file(address, end=first)

    def _cut(self, address: str, start: int, stop: int, size: int) -> bytes:
        found = self._system(address).cat_file(address, start=start, end=stop)
        if len(found) == size:  # not every server cuts
            found = found[start:stop]
        # An answer that ends early would pass for the end of the object.
        if len(found) != stop - start:
            asked = f"the {stop - start:,} from byte {start:,} on"
            raise InputError(f"{len(found):,} bytes came instead of {asked}")
        return found

    def _system(self, address: str) -> Any:
        """Find the file system that speaks the address's protocol."""
        protocol = address.partition("://")[0].lower()
        key = (os.getpid(), protocol)
        if key not in self._systems:
            self._systems[key] = _connect(protocol, address)
        return self._systems[key]


class _Pieces(io.RawIOBase):
    """A remote object as a file, without a connection that could break."""

    def __init__(self, storage: Storage, address: str) -> None:
        super().__init__()
        self.storage, self.address = storage, address
        self.size, self.place = storage.size(address), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        stop = min(self.size, self.place + min(len(buffer), LONGEST_PIECE))
        if stop <= self.place:
            return 0
        found = self.storage.piece(self.address, self.place, stop, self.size)
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


def is_remote(address: str) -> bool:
    """Tell an address from the name of a local file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address) is not None and not (
        address.lower().startswith("file://")
    )


def join(base: str, name: str) -> str:
    """Follow `name` from the folder `base`, unless it begins somewhere by itself."""
    if is_remote(name) or name.lower().startswith(("file://", "data:")) or not base:
        return name
    if is_remote(base):
        return name if name.startswith("/") else posixpath.join(base, name)
    return str(Path(base) / os.path.expanduser(name))  # as it is, where there is no such user


def _local(address: str) -> Path:
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


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call, and give up waiting after `seconds`; what hangs stays behind in its thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError(f"no answer in {seconds:g} s") from error


def _refusal(address: str, error: BaseException, tries: int) -> Exception:
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{address} is missing; check the name, and data.sources.N.media")
    text = str(error) if isinstance(error, InputError | TimeoutError) else type(error).__name__
    again = f" in {tries} tries" if tries > 1 else ""
    return InputError(f"{address} cannot be read{again}: {text or 'no answer'}")


def _outcome(future: Future[bytes]) -> bytes | InputError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, InputError):
        return error
    raise error
