"""Messages -> ChatML: the official chat template in our own words, and which tokens are whose.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n              (supervised: "A cat.<|im_end|>")

`render` gives segments, each a special token or plain text, so that text can never pose as
structure; `tokenize` turns them into ids. It must not open media or know pixels: sizes and
counts are handed in. (HF: chat_template.json.) Next: processor.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from qwen2vl.errors import InputError
from qwen2vl.grounding import Box, Point, Quad, Size
from qwen2vl.processor.messages import Kind, MarkPart, MediaPart, Message, TextPart
from qwen2vl.processor.tokenizer import Special, Tokenizer
from qwen2vl.processor.tokenizer_files import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from qwen2vl.processor.tools import Turn, announce, join_turns

__all__ = ["DEFAULT_SYSTEM", "KIND_OF", "Segment", "render", "tokenize"]

DEFAULT_SYSTEM = "You are a helpful assistant."

_PAD_OF: Mapping[Kind, str] = {"image": IMAGE_PAD, "video": VIDEO_PAD}
KIND_OF: Mapping[str, Kind] = {pad: kind for kind, pad in _PAD_OF.items()}
_LABEL_OF = {"image": "Picture", "video": "Video"}
_SHAPE_OF = {"box": Box, "point": Point, "quad": Quad}


class Segment(NamedTuple):
    """A piece of a prompt: plain text, or one special token by name."""

    text: str
    is_token: bool = False
    supervised: bool = False  # written by the assistant: its words and its end mark


def render(
    messages: Sequence[Message],
    *,
    sizes: Sequence[Size] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    add_vision_id: bool = False,
    continue_final: bool = False,
) -> list[Segment]:
    """Lay a conversation out as the official template does.

    Args:
        messages: from `messages.normalize`.
        sizes: (height, width) as given, of the images in order; boxes are relative to them.
        tools: described in the system turn.
        add_generation_prompt: end with the head of the assistant's next turn.
        add_vision_id: number the media, as "Picture 1: ".
        continue_final: leave the last turn open, to be continued; no new turn is begun.

    Raises:
        InputError: a box without its picture, or a last turn that cannot be continued.
    """
    turns = _with_system(join_turns(messages), tools)
    last = turns[-1]
    if continue_final and last.role != "assistant":
        raise InputError(
            f"continue_final needs an assistant's turn at the end, but the last is {last.role!r}"
        )
    stays_open = continue_final or last.pending
    layout = _Layout(sizes, add_vision_id)
    segments = [segment for turn in turns for segment in layout.turn(turn)]
    if stays_open:
        del segments[-2:]  # the end mark and its newline
    elif add_generation_prompt:
        segments += [Segment(IM_START, is_token=True), Segment("assistant\n")]
    return segments


def tokenize(
    segments: Iterable[Segment],
    tokenizer: Tokenizer,
    counts: Iterable[int],
    *,
    special: Special = "grounding",
) -> tuple[list[int], list[bool]]:
    """Turn segments into ids, each pad repeated as often as the next of `counts` says.

    Text between two special tokens is tokenized as one string.

    Returns:
        input_ids, and for each whether it is supervised.
    """
    remaining = iter(counts)
    ids: list[int] = []
    mask: list[bool] = []
    for is_token, run in groupby(segments, lambda segment: segment.is_token):
        if not is_token:
            for words, own in _tokens_of(run, tokenizer, special):
                ids += words
                mask += own
            continue
        for segment in run:
            times = next(remaining) if segment.text in KIND_OF else 1
            ids += [tokenizer.id_of(segment.text)] * times
            mask += [segment.supervised] * times
    return ids, mask


# Rendering ------------------------------------------------------------------------------------


class _Layout:
    """Counts media over the whole conversation while turns are laid out."""

    def __init__(self, sizes: Sequence[Size], add_vision_id: bool) -> None:
        self.sizes = sizes
        self.add_vision_id = add_vision_id
        self.seen = {"image": 0, "video": 0}

    def turn(self, turn: Turn) -> Iterator[Segment]:
        own = turn.role == "assistant"
        yield Segment(IM_START, is_token=True)
        yield Segment(f"{turn.role}\n")
        for part in turn.parts:
            if isinstance(part, MediaPart):
                yield from self._media(part)
            elif isinstance(part, MarkPart):
                yield Segment(self._mark(part), supervised=own and not part.given)
            else:
                yield Segment(part.text, supervised=own and not part.given)
        yield Segment(IM_END, is_token=True, supervised=own and not turn.pending)
        yield Segment("\n")

    def _media(self, part: MediaPart) -> Iterator[Segment]:
        self.seen[part.kind] += 1
        if self.add_vision_id:
            yield Segment(f"{_LABEL_OF[part.kind]} {self.seen[part.kind]}: ")
        for token in (VISION_START, _PAD_OF[part.kind], VISION_END):
            yield Segment(token, is_token=True)

    def _mark(self, part: MarkPart) -> str:
        number = self.seen["image"] if part.picture is None else part.picture
        if not 1 <= number <= len(self.sizes):
            raise InputError(
                f"{part.path}: a {part.kind} in pixels needs its picture; "
                + (
                    f"there is no picture {number}, the conversation has {len(self.sizes)}"
                    if number
                    else 'put an image before it, or add "picture": N'
                )
            )
        return _SHAPE_OF[part.kind].from_pixels(part.numbers, self.sizes[number - 1]).to_text()


def _with_system(turns: list[Turn], tools: Sequence[Mapping[str, Any]] | None) -> list[Turn]:
    if turns[0].role != "system":
        turns = [Turn("system", (TextPart(DEFAULT_SYSTEM),)), *turns]
    if tools:
        system = turns[0]
        gap = "\n\n" if system.parts else ""
        turns[0] = Turn("system", (*system.parts, TextPart(gap + announce(tools))))
    return turns


# Tokenizing -----------------------------------------------------------------------------------


def _tokens_of(
    run: Iterable[Segment], tokenizer: Tokenizer, special: Special
) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokenize neighboring text as one string: ids and their owners, in harmless pieces."""
    for group in _cut_where_harmless(run):
        text = "".join(segment.text for segment in group)
        if len({segment.supervised for segment in group}) == 1:
            ids = tokenizer.encode_text(text, special=special)
            yield ids, [group[0].supervised] * len(ids)
        else:
            owned = [segment.supervised for segment in group for _ in segment.text]
            spans = tokenizer.encode_spans(text, special=special)
            # A token that is partly given is given.
            yield [i for i, _, _ in spans], [all(owned[start:end]) for _, start, end in spans]


def _cut_where_harmless(run: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Cut between a line break and a visible character: no pre-token of Qwen2 spans the two.

    So the heads of turns are tokenized once in a process, and an assistant's words stand apart
    from the head before them.
    """
    group: list[Segment] = []
    for segment in run:
        if not segment.text:
            continue
        if group and group[-1].text[-1] == "\n" and not segment.text[0].isspace():
            yield group
            group = []
        group.append(segment)
    if group:
        yield group
