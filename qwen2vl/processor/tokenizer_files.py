"""Tokenizer files: special tokens, Qwen2's pre-tokenization rules, and byte-level vocabularies.

Qwen2 represents every byte as one printable character (GPT-2's bytes_to_unicode), splits text with
one regular expression into pre-tokens, and merges inside pre-tokens. `write_byte_tokenizer` writes
a folder in the same format with a vocabulary of little more than the 256 bytes (that of nano), so
that every engine that loads Qwen2 tokenizers loads it. (HF: Qwen2Tokenizer.)
"""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from qwen2vl.errors import CheckpointError
from qwen2vl.grounding import GROUNDING_TOKENS

__all__ = [
    "END_OF_TEXT",
    "IMAGE_PAD",
    "IM_END",
    "IM_START",
    "SPECIAL_TOKENS",
    "VIDEO_PAD",
    "VISION_END",
    "VISION_START",
    "add_missing_special_tokens",
    "build_backend",
    "to_bytes",
    "write_bpe_tokenizer",
    "write_byte_tokenizer",
]

END_OF_TEXT = "<|endoftext|>"  # padding, and the end of a document in pretraining
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

# In the official order; official ids are 151643 + index.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    *GROUNDING_TOKENS,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)

# Pre-tokens of Qwen2: letters with one leading symbol, single digits, symbols, line breaks.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes_to_unicode() -> Iterator[tuple[int, str]]:
    """Yield each byte with its character: printable Latin-1 unchanged, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from ((byte, chr(byte)) for byte in printable)
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((byte, chr(256 + i)) for i, byte in enumerate(others))


_CHAR_OF = dict(_bytes_to_unicode())  # in the order of ids 0 to 255
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}


def to_bytes(token: str) -> bytes:
    """Convert a token as spelled in vocab.json to its bytes."""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token may hold characters outside the byte map
        return token.encode()


def build_backend(bpe: models.BPE) -> tokenizers.Tokenizer:
    """Build a `tokenizers.Tokenizer` with Qwen2's rules and the fourteen special tokens."""
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return backend


def write_byte_tokenizer(folder: str | Path, characters: Iterable[str]) -> None:
    """Write a Qwen2 tokenizer folder: 256 bytes, one token for each character, special tokens.

    Merges join only the bytes of one character, so that text is tokenized character by character.
    Ids: bytes 0 to 255, then the merges, then the fourteen special tokens in the official order.
    """
    _write_tokenizer(Path(folder), _character_merges(characters))


def write_bpe_tokenizer(
    folder: str | Path, texts: Iterable[str], *, num_merges: int, characters: Iterable[str] = ""
) -> None:
    """Write a Qwen2 tokenizer folder whose merges are learned from texts (byte-level BPE).

    Args:
        folder: to write.
        texts: the training corpus, in which special tokens are no text; frequent
            pairs of tokens are merged first.
        num_merges: to learn; fewer, if the texts have no more pairs.
        characters: are one token each, whether the texts have them or not.
    """
    merges = {left + right: (left, right) for left, right in _character_merges(characters)}
    backend = build_backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(_CHAR_OF) + num_merges,
        initial_alphabet=list(_CHAR_OF.values()),
        show_progress=False,
        special_tokens=[],
    )
    special = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    backend.train_from_iterator((special.sub(" ", text) for text in texts), trainer)
    for left, right in json.loads(backend.to_str())["model"]["merges"]:
        merges.setdefault(left + right, (left, right))
    _write_tokenizer(Path(folder), list(merges.values()))


def _write_tokenizer(folder: Path, merges: Sequence[tuple[str, str]]) -> None:
    """Write all files of a folder. Ids: bytes, then merges, then special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*_CHAR_OF.values(), *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    build_backend(models.BPE(vocab=vocab, merges=merges)).save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(first_special=len(tokens)))


def add_missing_special_tokens(source: Path, target: Path) -> list[int]:
    """Copy the tokenizer of a Qwen2 folder to `target`, with all fourteen special tokens.

    Returns:
        The ids of the tokens that were missing: appended after the last id, in the official order.

    Raises:
        CheckpointError: there is no tokenizer.json, or it cannot be read.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; fetch the tokenizer of the model")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for bad files
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {error}") from error
    present = _added_token_ids(backend)
    missing = [token for token in SPECIAL_TOKENS if token not in present]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in missing])
    backend.save(str(target / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    ids = _added_token_ids(backend)
    settings = _tokenizer_config(first_special=ids[END_OF_TEXT])
    _write_json(target / "tokenizer_config.json", settings)
    return [ids[token] for token in missing]


def _added_token_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in backend.get_added_tokens_decoder().items()}


def _character_merges(characters: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges that build each character from its first byte on, without duplicates."""
    merges: dict[tuple[str, str], None] = {}
    for char in sorted(set(unicodedata.normalize("NFC", "".join(characters)))):
        spelled = [_CHAR_OF[byte] for byte in char.encode()]
        for i in range(1, len(spelled)):
            merges["".join(spelled[:i]), spelled[i]] = None
    return list(merges)


def _tokenizer_config(first_special: int) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first_special + i): {"content": token, **flags, "special": True}
            for i, token in enumerate(SPECIAL_TOKENS)
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, content: object) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
