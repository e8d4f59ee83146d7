"""Qwen2 tokenizer (byte-level BPE): text <-> token ids, special tokens, incremental detokenizing.

Special tokens are identified by name, never by id: nano's ids differ from the official 151643 to
151656. User text cannot forge chat structure: inside text only markup tokens are recognized, which
are the six grounding tokens and those that a fine-tune has added (<|polygon_start|>). Control
tokens are encoded as plain characters unless the caller passes `allowed_special="all"`: the other
eight of the fourteen, and added ones that tokenizer_config.json names for a role (eos_token,
pad_token) or a chat template contains. Added tokens that are not special are matched in all text.
(HF: Qwen2Tokenizer; byte-level BPE, NFC, every digit its own token. vLLM: IncrementalDetokenizer.)
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, models

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, InputError
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.added_tokens import (
    add_listed_tokens,
    check_adapter_tokens,
    check_stated_ids,
    control_tokens,
)
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

__all__ = ["AllowedSpecial", "IncrementalDetokenizer", "KeepSpecial", "Tokenizer"]

AllowedSpecial = Literal["none", "markup", "all"]  # which are recognized inside text
KeepSpecial = Literal["none", "grounding", "all"]  # which special tokens decoding writes out

_MAX_CACHED_CHARS = 256  # longer texts are not cached; turn headers and system prompts are short
_MAX_CACHED_TEXTS = 4096
# The backend's `encode` holds the interpreter's lock for 2 s a megabyte; `encode_batch` does not,
# but starts threads.
_MAX_LOCKED_CHARS = 8192


class Tokenizer:
    """Byte-level BPE tokenizer with special tokens by name. Build with `from_folder`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str = "tokenizer",
        control_tokens: Collection[str] = (),
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: with all added tokens.
            name: used in error texts.
            control_tokens: added special tokens that are not recognized in text, besides those of
                the official fourteen.

        Raises:
            CheckpointError: one of the fourteen special tokens is missing.
        """
        self._backend = backend
        # The backend gets plain text only: special tokens are split off here, by `allowed_special`.
        backend.encode_special_tokens = True
        backend.no_truncation()  # some folders were saved with it; it would truncate silently
        backend.no_padding()
        self.name = name
        added = backend.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self.special_ids = {token.content: i for i, token in special.items()}
        missing = [t for t in SPECIAL_TOKENS if t not in self.special_ids]
        if missing:
            raise CheckpointError(
                f"{name}: special tokens missing: {', '.join(missing)}; this is not the tokenizer "
                "of a Qwen2-VL model"
            )
        control = {*SPECIAL_TOKENS, *control_tokens} - set(GROUNDING_TOKENS)
        self._patterns = {
            "markup": _compile_alternation(t for t in special.values() if t.content not in control),
            "all": _compile_alternation(special.values()),
        }
        # Texts of added tokens; those that the vocabulary also holds are spelled as its others.
        size = backend.get_vocab_size(with_added_tokens=False)
        self._added_texts = {i: token.content for i, token in added.items() if i >= size}
        self._skipped_ids: dict[KeepSpecial, frozenset[int]] = {
            "none": frozenset(self.special_ids.values()),
            "grounding": frozenset(
                i for t, i in self.special_ids.items() if t not in GROUNDING_TOKENS
            ),
            "all": frozenset(),
        }
        self._encode_cache: dict[str, list[int]] = {}
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Load tokenizer.json, or else vocab.json and merges.txt, and the added tokens.

        Raises:
            CheckpointError: none of them exists, a file cannot be read, or the files state ids of
                added tokens that they do not get.
        """
        folder = Path(path)
        full, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
        try:
            if full.is_file():
                backend = tokenizers.Tokenizer.from_file(str(full))
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
        add_listed_tokens(backend, folder)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        tokenizer = cls(backend, name=str(folder), control_tokens=control_tokens(folder, added))
        check_stated_ids(backend, folder)
        return tokenizer

    def __len__(self) -> int:
        """Return the vocabulary size, special tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def digest(self) -> str:
        """Return a fingerprint of the tokenizer, for files on disk that store token ids."""
        return sha256(self._backend.to_str().encode()).hexdigest()[:32]

    def token_to_id(self, token: str) -> int:
        """Return the id of a special token."""
        return self.special_ids[token]

    @property
    def config_ids(self) -> dict[str, int]:
        """Special token ids that config.json holds, by its key names."""
        return {
            "bos_token_id": self.token_to_id(END_OF_TEXT),
            "eos_token_id": self.token_to_id(IM_END),
            "vision_start_token_id": self.token_to_id(VISION_START),
            "vision_end_token_id": self.token_to_id(VISION_END),
            "image_token_id": self.token_to_id(IMAGE_PAD),
            "video_token_id": self.token_to_id(VIDEO_PAD),
        }

    def check_config(self, config: Qwen2VLConfig) -> None:
        """Check that the tokenizer belongs to the model of `config`.

        The fourteen special ids must be consecutive in the official order, and equal the ids of
        vision_start, vision_end, image and video placeholders and the end of a turn in config.json.

        Raises:
            CheckpointError: ids or the size of the vocabulary disagree; the text lists them.
        """
        first = config.vision_start_token_id - SPECIAL_TOKENS.index(VISION_START)
        expected = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
        if config.eos_token_id != expected[END_OF_TEXT]:  # the eos token of base models
            expected[IM_END] = config.eos_token_id
        expected[VISION_END] = config.vision_end_token_id
        expected[IMAGE_PAD] = config.image_token_id
        expected[VIDEO_PAD] = config.video_token_id
        mismatches = [
            f"{token} is {self.token_to_id(token)}, config.json wants {expected_id}"
            for token, expected_id in expected.items()
            if self.token_to_id(token) != expected_id
        ]
        if len(self) > config.text.vocab_size:
            mismatches.append(
                f"{len(self)} tokens (the last is {self._backend.id_to_token(len(self) - 1)}), "
                f"config.json has vocab_size {config.text.vocab_size}; after adding tokens, resize "
                "the embedding (resize_token_embeddings) and save the model"
            )
        if mismatches:
            raise CheckpointError(
                f"{self.name}: the tokenizer does not fit config.json: {'; '.join(mismatches)}; "
                "take both from the same model"
            )

    def check_adapter(self, folder: str | Path) -> None:
        """Check that this tokenizer has the added tokens that an adapter was trained with.

        Training tools save the tokenizer beside the adapter. A folder without tokenizer files
        passes.

        Raises:
            CheckpointError: an added token is missing, or has another id.
        """
        check_adapter_tokens(self._backend, Path(folder).expanduser(), self.name)

    def split_special_tokens(self, text: str) -> list[str]:
        """Split text at special tokens: plain text at even indices, special tokens at odd ones."""
        parts = self._patterns["all"].split(text)
        return [self._special_token(part) if i % 2 else part for i, part in enumerate(parts)]

    def encode_text(self, text: str, *, allowed_special: AllowedSpecial = "markup") -> list[int]:
        """Encode text; special tokens outside `allowed_special` are encoded as plain characters."""
        if allowed_special == "none" or not self._patterns[allowed_special].search(text):
            return self._encode_plain(text)
        ids: list[int] = []
        for i, part in enumerate(self._patterns[allowed_special].split(text)):
            if i % 2:
                ids.append(self.special_ids[self._special_token(part)])
            elif part:
                ids += self._encode_plain(part)
        return ids

    def encode_with_offsets(
        self, text: str, *, allowed_special: AllowedSpecial = "markup"
    ) -> list[tuple[int, int, int]]:
        """Encode as `encode_text` does, with character offsets: a list of (id, start, end)."""
        spans: list[tuple[int, int, int]] = []
        start = 0
        parts = [text] if allowed_special == "none" else self._patterns[allowed_special].split(text)
        for i, part in enumerate(parts):
            if i % 2:
                token = self.special_ids[self._special_token(part)]
                spans.append((token, start, start + len(part)))
            else:
                encoding = self._encode(part)
                spans += [
                    (token, start + a, start + b)
                    for token, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)
                ]
            start += len(part)
        return spans

    def decode(self, ids: Iterable[int], *, keep_special: KeepSpecial = "grounding") -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD, unused ids become an empty string."""
        skipped = self._skipped_ids[keep_special]
        joined = b"".join(self.id_to_bytes(i) for i in ids if i not in skipped)
        return joined.decode("utf-8", errors="replace")

    def id_to_bytes(self, token: int) -> bytes:
        """Return the bytes of one token id; b"" for the unused ids of a padded vocabulary."""
        token_bytes = self._token_bytes.get(token)
        if token_bytes is None:
            text = self._added_texts.get(token)
            if text is None:
                token_bytes = to_bytes(self._backend.id_to_token(token) or "")
            else:
                token_bytes = text.encode()
            self._token_bytes[token] = token_bytes
        return token_bytes

    def _special_token(self, matched: str) -> str:
        """Return the token of a match, which may include whitespace (lstrip, rstrip)."""
        return matched if matched in self.special_ids else matched.strip()

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._encode_cache.get(text)
        if ids is None:
            ids = self._encode(text, with_offsets=False).ids
            if len(text) <= _MAX_CACHED_CHARS:
                if len(self._encode_cache) >= _MAX_CACHED_TEXTS:
                    self._encode_cache.clear()
                self._encode_cache[text] = ids
        return list(ids)

    def _encode(self, text: str, *, with_offsets: bool = True) -> tokenizers.Encoding:
        backend = self._backend
        try:
            if len(text) > _MAX_LOCKED_CHARS:
                encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
                return encode([text], add_special_tokens=False)[0]
            return backend.encode(text, add_special_tokens=False)
        except TypeError as error:  # raised by the backend for a str that is not valid Unicode
            raise InputError(
                "the text holds half of a surrogate pair (U+D800 to U+DFFF), which is not a "
                "character; decode it properly first"
            ) from error


class IncrementalDetokenizer:
    """Decodes token ids one by one while they are generated, in whole UTF-8 characters."""

    def __init__(self, tokenizer: Tokenizer, *, keep_special: KeepSpecial = "grounding") -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer._skipped_ids[keep_special]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Decode one id; return the text that is complete now, which may be empty."""
        if token in self._skipped_ids:
            return ""
        return self._decoder.decode(self._tokenizer.id_to_bytes(token))

    def finish(self) -> str:
        """Return the text still buffered: U+FFFD if the output ended inside a character."""
        return self._decoder.decode(b"", final=True)


def _compile_alternation(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Compile a pattern of the tokens with their flags; the longest that matches counts."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("(" + "|".join(map(_token_pattern, longest_first)) + ")")


def _token_pattern(token: AddedToken) -> str:
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    # Only at the first character of whitespace, so that a long run of it is scanned once.
    before = r"(?:(?<!\s)\s+)?" if token.lstrip else ""
    return before + pattern + (r"\s*" if token.rstrip else "")
