"""What a tokenizer folder holds: special tokens, the rules of Qwen2, and nano's own vocabulary.

Qwen2 spells every byte as one printable character (the map GPT-2 introduced), cuts text with one
regular expression, and merges inside the cuts. `write_byte_tokenizer` writes a folder by the same
rules with a vocabulary of little more than the 256 bytes, so that every engine that reads Qwen2
reads it. It must not know messages or models. (HF: Qwen2Tokenizer.) Next: tokenizer.py.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

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
    "build_backend",
    "complete_tokenizer",
    "to_bytes",
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

# Pre-tokens of Qwen2: letters with one leading mark, single digits, runs of marks, line breaks.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _spellings() -> Iterator[tuple[int, str]]:
    """Pair each byte with its character: printable Latin-1 as it is, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from ((byte, chr(byte)) for byte in printable)
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((byte, chr(256 + i)) for i, byte in enumerate(others))


_CHAR_OF = dict(_spellings())  # in the order of ids 0 to 255
_BYTE_OF = {char: byte for byte, char in _CHAR_OF.items()}


def to_bytes(token: str) -> bytes:
    """Turn a token as spelled in vocab.json into the bytes it stands for."""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token with characters of its own is not spelled byte by byte
        return token.encode()


def build_backend(bpe: models.BPE) -> tokenizers.Tokenizer:
    """Put the rules of Qwen2 and the fourteen special tokens around a table of merges."""
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
    """Write a Qwen2 tokenizer of 256 bytes, whole `characters` beyond ASCII, and special tokens.

    Merges join only the bytes of one character, so that text is spelled out letter by letter. Ids:
    bytes 0 to 255, then the merges, then the fourteen special tokens in the official order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges(characters)
    tokens = [*_CHAR_OF.values(), *(left + right for left, right in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    build_backend(models.BPE(vocab=vocab, merges=merges)).save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(first_special=len(tokens)))


def complete_tokenizer(source: Path, target: Path) -> list[int]:
    """Write the tokenizer of a Qwen2 folder to `target`, with all fourteen special tokens.

    Returns:
        The ids of those that were missing: they follow the last one, in the official order.

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
    there = _ids_of_added(backend)
    missing = [token for token in SPECIAL_TOKENS if token not in there]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in missing])
    backend.save(str(target / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    ids = _ids_of_added(backend)
    settings = _tokenizer_config(first_special=ids[END_OF_TEXT])
    _write_json(target / "tokenizer_config.json", settings)
    return [ids[token] for token in missing]


def _ids_of_added(backend: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in backend.get_added_tokens_decoder().items()}


def _merges(characters: Iterable[str]) -> list[tuple[str, str]]:
    """List the merges that build each character from its first byte on, none of them twice."""
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
