"""Packed text: plain text tokenized once, memory-mapped at training (`qwen2vl pack-text`).

    store/  tokens.bin   token ids of all documents with end tokens, concatenated (uint16, uint32)
            ends.npy     end offset of each document
            store.json   counts, digest of the tokenizer, digest of the tokens

Documents longer than a bin are split into samples when the store is opened, so that one store
serves any bin size. (Qwen2-VL sec. 2.3: text is memory-mapped.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from qwen2vl.data.formats import TextTokens
from qwen2vl.errors import InputError
from qwen2vl.files import atomic_folder
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import END_OF_TEXT

__all__ = ["STORE_FILE", "PackedTextStats", "TokenStore", "pack_text"]

STORE_FILE = "store.json"
TOKENS_FILE, ENDS_FILE = "tokens.bin", "ends.npy"


@dataclass(frozen=True, slots=True)
class PackedTextStats:
    """Size of what `pack_text` has written."""

    num_documents: int
    num_tokens: int
    num_bytes: int


def pack_text(
    documents: Iterable[str], tokenizer: Tokenizer, folder: str | Path
) -> PackedTextStats:
    """Tokenize documents and write them as a token store; each ends with <|endoftext|>.

    Special tokens in the text are encoded as plain text. The folder is created atomically.

    Raises:
        InputError: there is no text, the folder exists, or cannot be written.
    """
    target = Path(folder)
    if target.exists():
        raise InputError(f"{target} exists; name a new folder, or delete it first")
    try:
        with atomic_folder(target) as partial:
            return _write_store(documents, tokenizer, partial)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from error


def _write_store(documents: Iterable[str], tokenizer: Tokenizer, folder: Path) -> PackedTextStats:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    eos_id = tokenizer.token_to_id(END_OF_TEXT)
    ends: list[int] = []
    num_tokens, digest = 0, blake2b(digest_size=16)
    with (folder / TOKENS_FILE).open("wb") as file:
        for text in documents:
            ids = np.array(
                [*tokenizer.encode_text(text, allowed_special="none"), eos_id], dtype=dtype
            )
            if len(ids) > 1:
                raw = ids.astype(dtype.newbyteorder("<")).tobytes()
                digest.update(raw)
                file.write(raw)
                num_tokens += len(ids)
                ends.append(num_tokens)
    if not ends:
        raise InputError("there is no text to pack")
    np.save(folder / ENDS_FILE, np.array(ends, np.int64))
    metadata = {
        "dtype": dtype.name,
        "documents": len(ends),
        "tokens": num_tokens,
        "tokenizer": tokenizer.digest(),
        "digest": digest.hexdigest(),
    }
    (folder / STORE_FILE).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    return PackedTextStats(len(ends), num_tokens, num_tokens * dtype.itemsize)


class TokenStore:
    """A sample source over a token store; no sample has more than `max_tokens` tokens."""

    media_root = ""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        """Open a store.

        Raises:
            InputError: it is damaged, or was written with another tokenizer.
        """
        self.folder, self.max_tokens = Path(folder), max_tokens
        try:
            self.metadata: dict[str, Any] = json.loads(
                (self.folder / STORE_FILE).read_text("utf-8")
            )
            ends = np.load(self.folder / ENDS_FILE, allow_pickle=False)
            self.dtype = np.dtype(self.metadata["dtype"]).newbyteorder("<")
            num_tokens = (self.folder / TOKENS_FILE).stat().st_size // self.dtype.itemsize
            is_complete = num_tokens == self.metadata["tokens"] == int(ends[-1])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{folder} is a damaged token store; pack the text again") from error
        if not is_complete:
            raise InputError(
                f"{folder}: {TOKENS_FILE} holds {num_tokens:,} tokens, {STORE_FILE} records "
                f"{self.metadata['tokens']:,}; pack the text again"
            )
        if self.metadata["tokenizer"] != tokenizer.digest():
            raise InputError(
                f"{folder} was packed with another tokenizer than this model's; pack the text "
                "again, with --model"
            )
        self._starts, self._ends = _split_documents(ends, max_tokens)
        self._ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}  # each process opens its own memory map

    def fingerprint(self) -> str:
        """Return an id of the content and of how it is split."""
        return f"{self.metadata['digest']}/{self.max_tokens}"

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of every sample, without reading any."""
        return self._ends - self._starts

    def name(self, index: int) -> str:
        """Return the name of a sample: folder and index."""
        return f"{self.folder.name}:{index}"

    def read(self, index: int, *, pixels: bool = True) -> TextTokens:
        """Read one sample's token ids from the memory map."""
        if self._ids is None:
            self._ids = np.memmap(self.folder / TOKENS_FILE, self.dtype, "r")
        ids = self._ids[self._starts[index] : self._ends[index]].astype(np.int64)
        return TextTokens(self.name(index), ids)


def _split_documents(ends: np.ndarray, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Split documents into pieces of at most `max_tokens` tokens; single tokens are dropped."""
    starts = np.concatenate(([0], ends[:-1]))
    num_pieces = -(-(ends - starts) // max_tokens)
    document_start = np.repeat(starts, num_pieces)
    piece = np.arange(len(document_start)) - np.repeat(
        np.cumsum(num_pieces) - num_pieces, num_pieces
    )
    piece_start = document_start + piece * max_tokens
    piece_end = np.minimum(piece_start + max_tokens, np.repeat(ends, num_pieces))
    has_targets = piece_end - piece_start > 1
    return piece_start[has_targets], piece_end[has_targets]
