"""Loads the compiled kernels (ctypes), and chooses the instruction set that they use.

`QWEN2VL_KERNELS` limits it, for comparisons and tests: `off`, or the name of an instruction set, of
which the best that the processor has and that is not above it is used. Without kernels, operators
compute with torch, and one warning says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

from qwen2vl.errors import InputError
from qwen2vl.linear.cpu.build import BuildError, build, library_path

__all__ = ["INSTRUCTION_SETS", "Kernels", "describe_kernels", "load_kernels"]

logger = logging.getLogger(__name__)

VARIABLE = "QWEN2VL_KERNELS"

# As `enum Isa` of kernels/common.h. avx512 includes VNNI, amx includes int8 and bf16 tiles.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Kernels(NamedTuple):
    """The kernels as C functions; arguments as in kernels/kernels.cpp, pointers as integers."""

    instruction_set: str
    level: int  # index in INSTRUCTION_SETS, the functions' first argument
    linear_bf16: Callable[..., int]
    linear_int8: Callable[..., int]
    linear_int4: Callable[..., int]
    decode: Callable[..., int]

    @property
    def has_tiles(self) -> bool:
        """Whether there are matrix tiles (AMX), which multiply many rows fast."""
        return self.instruction_set == "amx"


def load_kernels() -> Kernels | None:
    """Return the kernels, compiled at the first call; None if they are off or cannot be built.

    Raises:
        InputError: QWEN2VL_KERNELS has an unknown value.
    """
    return _kernels_up_to(os.environ.get(VARIABLE, ""))


def describe_kernels() -> str:
    """Return the instruction set, or why there are no kernels, without compiling them."""
    try:
        if not library_path().is_file():
            return "compiled at first use"
    except BuildError as error:
        return f"none: {error}"
    kernels = load_kernels()
    return f"none: {VARIABLE}=off" if kernels is None else kernels.instruction_set


@cache
def _kernels_up_to(setting: str) -> Kernels | None:
    limit = setting.strip().lower() or INSTRUCTION_SETS[-1]
    if limit == "off":
        return None
    if limit not in INSTRUCTION_SETS:
        raise InputError(
            f"{VARIABLE}: got {limit!r}, must be off, {', '.join(INSTRUCTION_SETS[:-1])} or "
            f"{INSTRUCTION_SETS[-1]}"
        )
    library = _load_library()
    if library is None:
        return None
    level = min(library.qwen2vl_detect_isa(), INSTRUCTION_SETS.index(limit))
    return Kernels(
        instruction_set=INSTRUCTION_SETS[level],
        level=level,
        linear_bf16=library.qwen2vl_linear_bf16,
        linear_int8=library.qwen2vl_linear_int8,
        linear_int4=library.qwen2vl_linear_int4,
        decode=library.qwen2vl_decode,
    )


@lru_cache(maxsize=1)
def _load_library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels are not used, decoding is slower: %s", error)
        return None
    library.qwen2vl_linear_bf16.argtypes = [_INT] * 2 + [_POINTER] * 4 + [_LONG] * 3
    library.qwen2vl_linear_int8.argtypes = [_INT] * 3 + [_POINTER] * 5 + [_LONG] * 3
    library.qwen2vl_linear_int4.argtypes = [_INT] * 3 + [_POINTER] * 6 + [_LONG] * 4
    library.qwen2vl_decode.argtypes = [_INT] * 2 + [_POINTER] * 5 + [_LONG]
    return library
