"""One sample -> ModelInput, by the very Processor that answers; or only its size, by headers.

`Preparer` finds media where the data lie and keeps decoded videos; `Measurer` walks the same path
but opens headers only, so that what was planned is what comes. Whatever is wrong with a sample is
a SampleError with the word it is counted by. It must not know files of samples, bins or steps.
Next rooms: lengths.py (measures all), corpus.py (prepares what a step needs).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from qwen2vl.data.config import DataConfig
from qwen2vl.data.formats import Conversation, Page, Sample, SampleError, Words
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.storage import MissingError, Storage, is_remote, join
from qwen2vl.errors import InputError
from qwen2vl.geometry import Grid
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.chat_template import KIND_OF
from qwen2vl.processor.image import PixelLimits, requested_size
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.processor.media.clip import open_clip
from qwen2vl.processor.media.rgb import opened, shown_size
from qwen2vl.processor.media.source import MediaLimits, read_source
from qwen2vl.processor.messages import MediaPart, normalize
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer_files import END_OF_TEXT, VISION_END, VISION_START
from qwen2vl.processor.video import find_preset, plan_frames

__all__ = ["ROUND", "BadSample", "Example", "Measurer", "Preparer", "rounded"]

ROUND = 8  # lengths are rounded up to a multiple of this


class Example(NamedTuple):
    """One supervised conversation, and which family of tasks it belongs to."""

    input: ModelInput
    family: str


class BadSample(NamedTuple):
    """A sample that could not be used; nothing took its place."""

    id: str
    source: str
    reason: str  # one word, to count by
    text: str
    known: bool = False  # before the run began, and judged then: bad by its header, or too large


def rounded(length: int) -> int:
    """Tell how many tokens a conversation of `length` takes up in a batch."""
    return -(-length // ROUND) * ROUND


_PAD_OF = {kind: pad for pad, kind in KIND_OF.items()}
_REASONS = {"image": "picture", "video": "video"}
HEAD = 1 << 16  # bytes of a picture elsewhere that are asked for first


class Preparer(Processor):
    """Turns the samples of one source into ModelInputs for training."""

    def __init__(
        self,
        processor: Processor,
        data: DataConfig,
        *,
        base: str = "",
        frames: FrameCache | None = None,
        max_pixels: int = 0,
    ) -> None:
        """Prepare as `processor` does.

        Args:
            processor: of the model that is trained.
            data: limits on time and size, and the preset of videos.
            base: folder or address where relative names of media begin.
            frames: where decoded videos are kept.
            max_pixels: of every picture and frame, below the processor's own limit; 0: that one.
        """
        pixels = processor.pixels
        if max_pixels:
            high = max(min(max_pixels, pixels.max_pixels), pixels.min_pixels)
            pixels = PixelLimits(min_pixels=pixels.min_pixels, max_pixels=high)
        super().__init__(
            processor.config,
            processor.tokenizer,
            pixels=pixels,
            video_preset=data.video_preset,
            limits=MediaLimits(max_frames=data.max_frames, decode_timeout=data.decode_seconds),
        )
        self.data, self.base, self.frames = data, base, frames
        self.storage = Storage(
            concurrency=data.concurrency, retries=data.retries, seconds=data.fetch_seconds
        )
        self._fetched: dict[str, bytes | InputError] = {}

    def prepare(self, sample: Sample) -> ModelInput:
        """Process one sample, with the mask of what is learned.

        Raises:
            SampleError: it cannot be used.
        """
        try:
            made = self._processed(sample)
        except SampleError:
            raise
        except InputError as error:
            raise SampleError("messages", str(error)) from error
        assert made.loss_mask is not None
        if not any(made.loss_mask[1:]):
            raise SampleError("answer", "there is no answer to learn from")
        return made

    def fetch(self, samples: Iterable[Sample]) -> None:
        """Bring what lies elsewhere for all of these samples, many at a time; forget the rest."""
        wanted = [a for s in samples for _, source in _media_of(s) for a in self._remote(source)]
        self._fetched = self.storage.read_all(wanted) if wanted else {}

    def _processed(self, sample: Sample) -> ModelInput:
        if isinstance(sample, Conversation):
            return self(sample.messages, tools=sample.tools, for_training=True)
        if isinstance(sample, Page):
            media = [part for part in sample.parts if not isinstance(part, str)]
            return self.from_text(self._page(sample), media, for_training=True)
        return _words(sample)

    def _page(self, page: Page) -> str:
        text = ""
        for part in page.parts:
            if not isinstance(part, str):
                text += VISION_START + _PAD_OF[part["type"]] + VISION_END
                continue
            special = set(self.tokenizer.split_special(part)[1::2]) - set(GROUNDING_TOKENS)
            if special:
                raise SampleError("text", f"the page holds the special token {min(special)}")
            text += part
        return text + END_OF_TEXT

    def _item(self, part: MediaPart, numbered: str) -> Item:
        try:
            found = replace(part, source=self._found(part.source))
            return self._opened(found, numbered)
        except MissingError as error:
            raise SampleError("missing", str(error)) from error
        except InputError as error:
            raise SampleError(_REASONS[part.kind], str(error)) from error

    def _opened(self, part: MediaPart, numbered: str) -> Item:
        source = part.source
        if part.kind == "video" and self.frames and isinstance(source, Path | bytes):
            make = super()._item
            return self.frames.item(source, self._sampling(part), lambda: make(part, numbered))
        return super()._item(part, numbered)

    def _sampling(self, part: MediaPart) -> str:
        """Name all that decides a video's frames and pixels, besides its content."""
        asked = [self.video_preset, part.options.given(), asdict(self.pixels)]
        return json.dumps([*asked, asdict(self.config.vision)], sort_keys=True)

    def _found(self, source: Any) -> Any:
        """Follow a name to where the data lie: a local path, or the bytes from elsewhere."""
        if isinstance(source, list | tuple):
            return [self._found(one) for one in source]
        if not isinstance(source, str):
            return source
        address = join(self.base, source)
        if is_remote(address):
            return self._bytes(address)
        if address.startswith(("data:", "file:")):
            return address
        path = Path(os.path.expanduser(address))
        try:
            found = path.is_file()
        except OSError as error:
            raise MissingError(f"{source:.80} cannot be looked for: {error.strerror}") from error
        if not found:
            raise MissingError(f"{source} is missing in {path.parent}")
        return path

    def _bytes(self, address: str) -> bytes:
        held = self._fetched.get(address)
        if isinstance(held, InputError):
            raise held
        return self.storage.read(address) if held is None else held

    def _remote(self, source: Any) -> Iterator[str]:
        if isinstance(source, list | tuple):
            for one in source:
                yield from self._remote(one)
        elif isinstance(source, str) and is_remote(address := join(self.base, source)):
            yield address


class Measurer(Preparer):
    """Finds out how large samples are, from headers: items come without pixels."""

    def fetch(self, samples: Iterable[Sample]) -> None:
        """Bring the heads of pictures that lie elsewhere, many at a time; forget the rest."""
        wanted = [
            address
            for sample in samples
            for kind, source in _media_of(sample)
            if kind == "image"
            for address in self._remote(source)
        ]
        self._fetched = self.storage.read_all(wanted, HEAD) if wanted else {}

    def _item(self, part: MediaPart, numbered: str) -> Item:
        address = next(self._remote(part.source), "")
        head = self._fetched.get(address)
        try:
            return super()._item(part, numbered)
        except SampleError:
            if not isinstance(head, bytes) or len(head) < HEAD:
                raise
        self._fetched[address] = self.storage.read(address)  # some headers stand at the end
        return super()._item(part, numbered)

    def _opened(self, part: MediaPart, numbered: str) -> Item:
        vision, options = self.config.vision, part.options
        if part.kind == "video":
            rules = find_preset(self.video_preset)
            rate = options.fps or rules.fps
            clip = open_clip(
                part.source, self.limits, numbered, rate=rate, turn=rules.turn_pictures
            )
            plan = plan_frames(
                clip.timeline,
                preset=rules,
                vision=vision,
                pixels=self.pixels,
                options=options,
                name=numbered,
            )
            pairs = -(-len(plan.indices) // vision.temporal_patch_size)
            given = (clip.timeline.height, clip.timeline.width)
            size = (plan.height, plan.width)
        else:
            given = self._shown(part.source, numbered)
            pairs = 1
            size = requested_size(
                *given, vision=vision, pixels=self.pixels, options=options, name=numbered
            )
        return Item(
            kind=part.kind,
            patches_NP=torch.empty(0, vision.patch_dim, dtype=torch.uint8),
            grid=Grid(pairs, size[0] // vision.patch_size, size[1] // vision.patch_size),
            digest=b"",
            name=numbered,
            size_given=given,  # boxes in pixels are written relative to it
            size_seen=size,
        )

    def _shown(self, source: Any, name: str) -> tuple[int, int]:
        """Read (height, width) from a picture's header."""
        turn = find_preset(self.video_preset).turn_pictures
        media = read_source(source, self.limits, name)
        if isinstance(media.content, np.ndarray):
            return media.content.shape[0], media.content.shape[1]
        if isinstance(media.content, Image.Image):
            return shown_size(media.content, turn=turn)
        with opened(media, self.limits, name) as (image, _):
            return shown_size(image, turn=turn)


def _media_of(sample: Sample) -> Iterator[tuple[str, Any]]:
    """Name the kind and source of a sample's media; of one that cannot be read, none."""
    if isinstance(sample, Page):
        for part in sample.parts:
            if isinstance(part, Mapping):
                kind = part.get("type", "")
                yield kind, part.get(kind)
    elif isinstance(sample, Conversation):
        try:
            read = normalize(sample.messages)
        except InputError:
            return  # said again, and counted, when the sample is prepared
        for message in read:
            yield from ((p.kind, p.source) for p in message.parts if isinstance(p, MediaPart))


def _words(sample: Words) -> ModelInput:
    count = len(sample.ids)
    return ModelInput(
        input_ids=sample.ids.tolist(),
        items=(),
        position_ids_3T=torch.arange(count).expand(3, -1),
        rope_delta=0,
        pad_index_M=torch.empty(0, dtype=torch.int64),
        loss_mask=[True] * count,
    )
