"""Formats of documents: text with media, whose text is learned.

    {"text": "A cat on a mat.", "image": "a.png"}                pairs, documents, text
    {"texts": ["A cat.", null], "images": [null, "b.png"]}       OBELICS: interleaved
    {"prompt": "The sky is", "completion": " blue."}             TRL: only the completion is learned

Without a tag, media precede the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.media import MEDIA_TAG, RowMedia, media_item
from qwen2vl.data.formats.objects import OBJECT_TAG
from qwen2vl.data.formats.samples import Document, SampleError
from qwen2vl.errors import abbreviate

__all__ = ["is_interleaved", "parse_continuation", "parse_interleaved", "parse_text"]

Part = str | Mapping[str, Any]

_EMPTY_COMPLETION = "an empty completion, after which only <|endoftext|> is learned"


def parse_text(text: str, row: Row, name: str) -> Document:
    """Parse a text, all of which is learned.

    Raises:
        SampleError: tags and media do not match.
    """
    media = RowMedia(row)
    _check_objects(text, row)
    parts = tuple(_split_tagged(text, media))
    media.check_all_used()
    return Document(name, parts)


def parse_continuation(row: Row, name: str) -> Document:
    """Parse the texts of prompt and completion, of which only the latter is learned.

    Raises:
        SampleError: tags and media do not match.
    """
    media = RowMedia(row)
    prompt = tuple(_split_tagged(row.take("prompt"), media, is_prompt=True))
    completion: str = row.take("completion")
    _check_objects(row.peek("prompt") + completion, row)
    media.check_text(completion)
    if media.has_columns and MEDIA_TAG.search(completion):
        raise SampleError(
            "placeholders", "the completion has an <image> or <video> tag; media are in the prompt"
        )
    media.check_all_used()
    if not completion.strip():
        row.add_note(_EMPTY_COMPLETION)
    return Document(name, (*prompt, completion), num_prompt_parts=len(prompt))


def is_interleaved(texts: Any) -> bool:
    """Return whether texts are those of an interleaved document, and no pairs of questions."""
    return isinstance(texts, list) and any(isinstance(text, str) for text in texts)


def parse_interleaved(row: Row, name: str) -> Document:
    """Parse parallel lists of texts and images, one of the two null at each index.

    Raises:
        SampleError: the lists differ in length, or other columns have media.
    """
    for key in ("image", "video", "videos"):
        if row.peek(key):
            raise SampleError(
                "placeholders", f"the column {key} has no place beside a list of texts; use images"
            )
    return Document(name, tuple(_interleaved_parts(row)))


def _split_tagged(text: str, media: RowMedia, *, is_prompt: bool = False) -> Iterator[Part]:
    """Yield the parts of a text; media precede it if it has no tag.

    A tag is text in a row without media columns, as in a web page, but not in a prompt.
    """
    media.check_text(text)
    if not MEDIA_TAG.search(text):
        yield from media.take_remaining()
    if (media.has_columns or is_prompt) and (media.is_given or MEDIA_TAG.search(text)):
        yield from media.split(text)
    else:
        yield text


def _check_objects(text: str, row: Row) -> None:
    """Refuse tags of objects, which only conversations have."""
    found = OBJECT_TAG.search(text) if row.has_column("objects") else None
    if found:
        raise SampleError(
            "placeholders",
            f"the text has {found[0]}; objects belong to conversations, so give messages",
        )


def _interleaved_parts(row: Row) -> Iterator[Part]:
    """Yield the parts of an interleaved document in order: at each index a text or an image."""
    texts = row.take("texts")
    images = row.take("images") or [None] * len(texts)
    if not isinstance(images, list):
        raise SampleError("placeholders", f"images is {abbreviate(images)}; it must be a list")
    if len(images) != len(texts):
        raise SampleError(
            "placeholders",
            f"{len(texts)} texts beside {len(images)} images; each index needs one of both",
        )
    for text, image in zip(texts, images, strict=True):
        item = media_item(image, "image")
        if item is not None:
            yield item
        if isinstance(text, str) and text.strip():
            yield text
