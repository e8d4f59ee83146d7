"""Confinement of a media worker: no network, no files, limited memory, dies with its parent.

What Linux offers is taken where it is allowed, and reported: a user and network namespace of its
own, Landlock (only modules can be read, and no TCP port used), no new privileges, SIGKILL when
the parent ends. The resource limits are POSIX. Nothing is raised where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence

__all__ = [
    "die_with_parent",
    "isolate_network",
    "limit_cpu_seconds",
    "limit_resources",
    "lock_files",
]

_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# The same numbers on all architectures, except Alpha.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION = 1  # flag: return the version of the interface
_NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by version; later ones have 16
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_PATH_BENEATH = 1  # kind of a rule
_TCP_RIGHTS = 0b11  # bind, connect; since version 4
_MAX_FILES = 16  # descriptors; a worker has four


def isolate_network() -> list[str]:
    """Leave the network; return what was achieved, for the log.

    Must be called before the process has a second thread.
    """
    libc = _libc()
    if libc is None:
        return []
    for flags in (_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC, _CLONE_NEWNET | _CLONE_NEWIPC):
        if libc.unshare(flags) == 0:
            return ["no network"]
    return []


def die_with_parent(parent: int) -> None:
    """Ask for SIGKILL when the parent ends, however it ends; exit if it has ended already.

    Where there is no such request (not Linux), a worker ends when its socket is closed.
    """
    libc = _libc()
    if libc is not None:  # after unshare, which resets it
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def limit_resources(memory_bytes: int, nice: int) -> None:
    """Limit address space and descriptors, forbid core files and writing, lower the priority."""
    _lower_limit(resource.RLIMIT_CORE, 0)
    _lower_limit(resource.RLIMIT_FSIZE, 0)
    _lower_limit(resource.RLIMIT_NOFILE, _MAX_FILES)
    _lower_limit(resource.RLIMIT_AS, memory_bytes)
    if nice:
        os.nice(nice)


def lock_files(readable: Sequence[str]) -> list[str]:
    """Refuse all files except reading those in some folders, with Landlock.

    Args:
        readable: folders of the modules that decoders import when they are first used.

    Returns:
        What was achieved, for the log.
    """
    libc = _libc()
    if libc is None:
        return []
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return []
    rights = (1 << _NUM_FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=Q", rights) + (
        struct.pack("=Q", _TCP_RIGHTS) if version >= 4 else b""
    )
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return []
    for folder in readable:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _READ_FILE | _READ_FOLDER, descriptor)
        libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        os.close(descriptor)
    failed = libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return [] if failed else ["no files but those of its packages"]


def limit_cpu_seconds(seconds: float) -> None:
    """Let the kernel end this process after `seconds` more of CPU time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = math.ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (total, hard))


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
