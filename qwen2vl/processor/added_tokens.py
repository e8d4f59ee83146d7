"""Added tokens of a tokenizer folder: special and other tokens beyond the vocabulary.

Fine-tunes add tokens such as <|polygon_start|>. tokenizer.json lists them in `added_tokens`; older
folders list them in tokenizer_config.json (`added_tokens_decoder`), added_tokens.json or
special_tokens_map.json instead. All are added to the backend under the ids that the files state.
Control tokens are the special tokens that structure a chat: they are never recognized in message
text. (HF: AddedToken, PreTrainedTokenizerFast.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from qwen2vl.errors import CheckpointError

__all__ = ["add_listed_tokens", "check_adapter_tokens", "check_stated_ids", "control_tokens"]

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # the second since transformers 5
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_NAMES += ("mask_token",)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Add the tokens that the files of a folder list and the backend lacks, in the order of ids.

    A token that a file calls special becomes special.

    Raises:
        CheckpointError: a file cannot be read.
    """
    settings = [_read_json(folder / name) for name in _CONFIG_FILES]
    listed = _listed_in_config(folder) + _listed_in_added_tokens(folder)
    _add(backend, (token for _, token in sorted(listed, key=lambda pair: pair[0])))
    _add(backend, (_as_token(value) for content in settings for value in _special_tokens(content)))


def check_stated_ids(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Check that added tokens have the ids that the files of a folder state.

    Raises:
        CheckpointError: a token has another id, so that its embedding would be that of another.
    """
    for name, content, stated in _stated_ids(folder):
        actual = backend.token_to_id(content)
        if actual != stated:
            raise CheckpointError(
                f"{folder / name}: states id {stated} for the added token {content!r}, but the "
                f"tokenizer gives it {actual}; number the added tokens without gaps, or save the "
                "tokenizer again with transformers"
            )


def check_adapter_tokens(backend: tokenizers.Tokenizer, folder: Path, name: str) -> None:
    """Check that a tokenizer has the added tokens that the files of an adapter's folder list.

    Raises:
        CheckpointError: one is missing, or has another id.
    """
    for _, content, stated in _stated_ids(folder):
        if backend.token_to_id(content) != stated:
            raise CheckpointError(
                f"{folder}: this adapter was trained with the added token {content!r} of id "
                f"{stated}, which {name} does not have; copy the tokenizer files of the adapter "
                "into the folder of the model, or merge them with PEFT and load the result"
            )


def _stated_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (file, added token, id) for all files of a folder that state ids."""
    path = folder / "tokenizer.json"
    yield from ((path.name, content, i) for content, i in _tokenizer_json_ids(path).items())
    for name, listed in (
        (_CONFIG_FILES[0], _listed_in_config(folder)),
        ("added_tokens.json", _listed_in_added_tokens(folder)),
    ):
        yield from ((name, token.content, i) for i, token in listed)


def control_tokens(folder: Path, tokens: Iterable[str]) -> frozenset[str]:
    """Return those of `tokens` with a role: end, padding, or in the folder's chat template."""
    settings = [_read_json(folder / name) for name in _CONFIG_FILES]
    roles = {_as_token(s[name]).content for s in settings for name in _NAMES if s.get(name)}
    templates = "\n".join(_templates(folder, settings[0]))
    return frozenset(token for token in tokens if token in roles or token in templates)


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    known = {t.content: t.special for t in backend.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    for token in tokens:
        if token.content not in known or (token.special and not known[token.content]):
            missing.append(token)
            known[token.content] = token.special
    # In batches, because each call builds the matcher of all added tokens anew.
    for is_special, batch in groupby(missing, key=lambda token: token.special):
        (backend.add_special_tokens if is_special else backend.add_tokens)(list(batch))


def _listed_in_config(folder: Path) -> list[tuple[int, AddedToken]]:
    decoder = _read_json(folder / _CONFIG_FILES[0]).get("added_tokens_decoder")
    return [(_as_id(key), _as_token(value)) for key, value in _items(decoder)]


def _listed_in_added_tokens(folder: Path) -> list[tuple[int, AddedToken]]:
    return [
        (_as_id(value), AddedToken(token, normalized=False, special=False))
        for token, value in _items(_read_json(folder / "added_tokens.json"))
    ]


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the special tokens that a config names without an id."""
    for name in _LISTS:
        value = settings.get(name) or ()
        yield from value.values() if isinstance(value, dict) else value
    yield from (settings[name] for name in _NAMES if settings.get(name))


def _templates(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the chat templates of a folder, which are read as text and never run."""
    for content in (settings, _read_json(folder / "chat_template.json")):
        template = content.get("chat_template") or ()
        if isinstance(template, str):
            yield template
        else:  # several, each with a name
            yield from (str(part.get("template")) for part in template if isinstance(part, dict))
    path = folder / "chat_template.jinja"
    if path.is_file():
        yield path.read_text(encoding="utf-8", errors="replace")


def _as_token(value: Any) -> AddedToken:
    """Convert a token of a config file, a text or an object with flags; such tokens are special."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: bool(value.get(name, False)) for name in _FLAGS}
        return AddedToken(value["content"], **flags, special=bool(value.get("special", True)))
    raise CheckpointError(
        f"tokenizer files: {str(value)[:40]!r} is listed as a token, expected a text or an object "
        "with its content; save the tokenizer again with transformers"
    )


def _as_id(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"tokenizer files: {str(value)[:40]!r} is listed as the id of an added token, expected "
            "a whole number; save the tokenizer again with transformers"
        ) from None


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _tokenizer_json_ids(path: Path) -> dict[str, int]:
    """Return the stated ids of `added_tokens`, without parsing the vocabulary.

    The tokenizers library numbers added tokens itself and ignores the ids in the file.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    _, key, rest = text.partition('"added_tokens"')
    start = rest.find("[")
    if not key or start < 0:
        return {}
    try:
        tokens, _ = json.JSONDecoder().raw_decode(rest, start)
        return {token["content"]: int(token["id"]) for token in tokens}
    except (ValueError, TypeError, KeyError):
        return {}  # the tokenizers library has read the file, so this is another list


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is empty."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}); fetch this file again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch this file again")
    return content
