"""Text <-> ids: a Hugging Face tokenizer folder, and the fourteen special tokens by name.

Two rules live here. Special tokens are known by name, never by number: nano's differ from the
official 151643 to 151656. And text from people cannot forge structure: of the special tokens only
the six grounding ones are recognized inside text, the other eight become plain characters unless
the caller says that the text is trusted. It must not know messages or pictures.
(HF: Qwen2Tokenizer; byte-level BPE, NFC, every digit its own token.) Next: chat.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import models

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, InputError
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.tokenizer_files import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    SPECIAL_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    build_backend,
    to_bytes,
)

__all__ = ["Keep", "Special", "TextStream", "Tokenizer"]

Special = Literal["none", "grounding", "all"]  # which special tokens are recognized inside text
Keep = Literal["none", "grounding", "all"]  # which special tokens decoding writes out

_CACHED_CHARS = 256  # texts up to this length are remembered, such as headers and system turns
_CACHED_TEXTS = 4096


class Tokenizer:
    """Byte-level BPE with special tokens by name. Build with `from_folder`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, name: str = "tokenizer") -> None:
        """Wrap `backend`, whose special tokens must include the fourteen; `name` is for errors."""
        self._backend = backend
        # From now on the backend sees only text: special tokens are cut out here, by our rules.
        backend.encode_special_tokens = True
        backend.no_truncation()  # some folders were saved with it, and it would cut in silence
        backend.no_padding()
        self.name = name
        added = backend.get_added_tokens_decoder()
        self.special_ids = {t.content: i for i, t in added.items() if t.special}
        missing = [t for t in SPECIAL_TOKENS if t not in self.special_ids]
        if missing:
            raise CheckpointError(
                f"{name}: special tokens missing: {', '.join(missing)}; this is not the tokenizer "
                "of a Qwen2-VL model"
            )
        self._patterns = {
            "grounding": _any_of(GROUNDING_TOKENS),
            "all": _any_of(self.special_ids),
        }
        self._dropped: dict[Keep, frozenset[int]] = {
            "none": frozenset(self.special_ids.values()),
            "grounding": frozenset(
                i for t, i in self.special_ids.items() if t not in GROUNDING_TOKENS
            ),
            "all": frozenset(),
        }
        self._encoded: dict[str, list[int]] = {}
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, or else vocab.json and merges.txt.

        Raises:
            CheckpointError: none of them is there, or it cannot be read as a tokenizer.
        """
        folder = Path(path)
        whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
        try:
            if whole.is_file():
                backend = tokenizers.Tokenizer.from_file(str(whole))
            elif vocab.is_file() and merges.is_file():
                backend = build_backend(models.BPE.from_file(str(vocab), str(merges)))
            else:
                raise CheckpointError(
                    f"{folder}: no tokenizer.json, and no vocab.json with merges.txt"
                )
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception for bad files
            raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error
        return cls(backend, name=str(folder))

    def __len__(self) -> int:
        """Count the tokens, special ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def digest(self) -> str:
        """Name what turns text into ids, for what is kept on disk in ids."""
        return sha256(self._backend.to_str().encode()).hexdigest()[:32]

    def id_of(self, token: str) -> int:
        """Give the id of a special token."""
        return self.special_ids[token]

    @property
    def config_ids(self) -> dict[str, int]:
        """The special ids that config.json holds, under its names."""
        return {
            "bos_token_id": self.id_of(END_OF_TEXT),
            "eos_token_id": self.id_of(IM_END),
            "vision_start_token_id": self.id_of(VISION_START),
            "vision_end_token_id": self.id_of(VISION_END),
            "image_token_id": self.id_of(IMAGE_PAD),
            "video_token_id": self.id_of(VIDEO_PAD),
        }

    def check(self, config: Qwen2VLConfig) -> None:
        """Refuse a tokenizer that belongs to another model.

        The fourteen ids must follow each other in the official order, and be where config.json
        says that vision_start, vision_end, the pads and the end of a turn are.

        Raises:
            CheckpointError: ids or the size of the vocabulary disagree; the text lists them.
        """
        first = config.vision_start_token_id - SPECIAL_TOKENS.index(VISION_START)
        wanted = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        if config.eos_token_id != wanted[END_OF_TEXT]:  # what base models end with
            wanted[IM_END] = config.eos_token_id
        wanted[VISION_END] = config.vision_end_token_id
        wanted[IMAGE_PAD] = config.image_token_id
        wanted[VIDEO_PAD] = config.video_token_id
        wrong = [
            f"{token} is {self.id_of(token)}, config.json wants {want}"
            for token, want in wanted.items()
            if self.id_of(token) != want
        ]
        if len(self) > config.text.vocab_size:
            wrong.append(f"{len(self)} tokens, config.json has {config.text.vocab_size}")
        if wrong:
            raise CheckpointError(
                f"{self.name}: the tokenizer does not fit config.json: {'; '.join(wrong)}; "
                "take both from the same model"
            )

    def split_special(self, text: str) -> list[str]:
        """Cut text at special tokens: plain text at even indices, tokens at odd ones."""
        return self._patterns["all"].split(text)

    def encode_text(self, text: str, *, special: Special = "grounding") -> list[int]:
        """Turn text into ids; special tokens outside `special` are plain characters."""
        if special == "none" or (special == "grounding" and "<|" not in text):
            return self._encode_plain(text)
        ids: list[int] = []
        for i, part in enumerate(self._patterns[special].split(text)):
            if i % 2:
                ids.append(self.special_ids[part])
            elif part:
                ids += self._encode_plain(part)
        return ids

    def encode_spans(
        self, text: str, *, special: Special = "grounding"
    ) -> list[tuple[int, int, int]]:
        """Like `encode_text`, but each id comes with its span of characters: (id, start, end)."""
        found: list[tuple[int, int, int]] = []
        start = 0
        parts = [text] if special == "none" else self._patterns[special].split(text)
        for i, part in enumerate(parts):
            if i % 2:
                found.append((self.special_ids[part], start, start + len(part)))
            else:
                encoding = self._run(part)
                found += [
                    (token, start + a, start + b)
                    for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
                ]
            start += len(part)
        return found

    def decode(self, ids: Iterable[int], *, keep: Keep = "grounding") -> str:
        """Turn ids into text; broken UTF-8 becomes U+FFFD, unused ids become nothing."""
        dropped = self._dropped[keep]
        joined = b"".join(self.bytes_of(i) for i in ids if i not in dropped)
        return joined.decode("utf-8", errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes one id stands for; none for the unused rows of a padded vocabulary."""
        found = self._token_bytes.get(token)
        if found is None:
            found = to_bytes(self._backend.id_to_token(token) or "")
            self._token_bytes[token] = found
        return found

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._encoded.get(text)
        if ids is None:
            ids = self._run(text).ids
            if len(text) <= _CACHED_CHARS:
                if len(self._encoded) >= _CACHED_TEXTS:
                    self._encoded.clear()
                self._encoded[text] = ids
        return list(ids)

    def _run(self, text: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # how the backend says that Python's text is not Unicode
            raise InputError(
                "the text holds half of a surrogate pair (U+D800 to U+DFFF), which is not a "
                "character; decode it properly first"
            ) from error


class TextStream:
    """Decode ids one by one as they are generated, never writing half a character."""

    def __init__(self, tokenizer: Tokenizer, *, keep: Keep = "grounding") -> None:
        self._tokenizer = tokenizer
        self._dropped = tokenizer._dropped[keep]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Take one id and return the text that is now certain, often a word, sometimes none."""
        if token in self._dropped:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """Return what is still held back: U+FFFD if the answer ended inside a character."""
        return self._decoder.decode(b"", final=True)


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(re.escape(token) for token in tokens) + ")")
