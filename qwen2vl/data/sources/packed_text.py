"""Plain text, tokenized once and mapped from disk: the token store of `qwen2vl pack-text`.

    store/  tokens.bin   every document's ids, end mark included, end to end (uint16 or uint32)
            ends.npy     where each document ends
            store.json   how many, which tokenizer, the digest of it all

Documents longer than a bin are cut into samples when the store is read, so one store serves any
length. (Qwen2-VL sec. 2.3: text is memory-mapped.) Next room: sources.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from qwen2vl.data.formats import Words
from qwen2vl.errors import InputError
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import END_OF_TEXT

__all__ = ["STORE", "Packed", "TokenStore", "pack_text"]

STORE = "store.json"
TOKENS, ENDS = "tokens.bin", "ends.npy"


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack_text` has written."""

    documents: int
    tokens: int
    bytes: int


def pack_text(documents: Iterable[str], tokenizer: Tokenizer, folder: str | Path) -> Packed:
    """Tokenize documents and write them as a store; each ends with <|endoftext|>.

    Special tokens in the text are plain characters. The folder appears when it is complete.

    Raises:
        InputError: there is no text, the folder exists, or cannot be written.
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists; name a new folder, or delete it first")
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        packed = _write(documents, tokenizer, aside)
        aside.rename(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return packed


def _write(documents: Iterable[str], tokenizer: Tokenizer, folder: Path) -> Packed:
    kind = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    end = tokenizer.id_of(END_OF_TEXT)
    ends: list[int] = []
    written, digest = 0, blake2b(digest_size=16)
    with (folder / TOKENS).open("wb") as file:
        for text in documents:
            ids = np.array([*tokenizer.encode_text(text, special="none"), end], dtype=kind)
            if len(ids) > 1:
                raw = ids.astype(kind.newbyteorder("<")).tobytes()
                digest.update(raw)
                file.write(raw)
                written += len(ids)
                ends.append(written)
    if not ends:
        raise InputError("there is no text to pack")
    np.save(folder / ENDS, np.array(ends, np.int64))
    about = {
        "dtype": kind.name,
        "documents": len(ends),
        "tokens": written,
        "tokenizer": tokenizer.digest(),
        "digest": digest.hexdigest(),
    }
    (folder / STORE).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return Packed(len(ends), written, written * kind.itemsize)


class TokenStore:
    """A store as a source of samples, none longer than `longest` tokens."""

    base = ""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, longest: int) -> None:
        """Open a store.

        Raises:
            InputError: it is damaged, or was written with another tokenizer.
        """
        self.folder, self.longest = Path(folder), longest
        try:
            self.about: dict[str, Any] = json.loads((self.folder / STORE).read_text("utf-8"))
            ends = np.load(self.folder / ENDS, allow_pickle=False)
            self.kind = np.dtype(self.about["dtype"]).newbyteorder("<")
            held = (self.folder / TOKENS).stat().st_size // self.kind.itemsize
            whole = held == self.about["tokens"] == int(ends[-1])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{folder} is a damaged token store; pack the text again") from error
        if not whole:
            raise InputError(
                f"{folder}: {TOKENS} holds {held:,} tokens, {STORE} says "
                f"{self.about['tokens']:,}; pack the text again"
            )
        if self.about["tokenizer"] != tokenizer.digest():
            raise InputError(
                f"{folder} was packed with another tokenizer than this model's; pack the text "
                "again, with --model"
            )
        self._starts, self._ends = _cut(ends, longest)
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}  # a mapping is opened again, not copied

    def fingerprint(self) -> str:
        """Name the content, and how it is cut."""
        return f"{self.about['digest']}/{self.longest}"

    def lengths(self) -> np.ndarray:
        """Count the tokens of every sample, without reading any."""
        return self._ends - self._starts

    def name(self, index: int) -> str:
        """Name a piece by its number."""
        return f"{self.folder.name}:{index}"

    def read(self, index: int, *, pixels: bool = True) -> Words:
        """Map one sample's ids."""
        if self._ids is None:
            self._ids = np.memmap(self.folder / TOKENS, self.kind, "r")
        ids = self._ids[self._starts[index] : self._ends[index]].astype(np.int64)
        return Words(self.name(index), ids)


def _cut(ends: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most `longest` tokens; one token alone teaches nothing."""
    starts = np.concatenate(([0], ends[:-1]))
    pieces = -(-(ends - starts) // longest)
    first = np.repeat(starts, pieces)
    number = np.arange(len(first)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = first + number * longest
    stop = np.minimum(begin + longest, np.repeat(ends, pieces))
    kept = stop - begin > 1
    return begin[kept], stop[kept]
