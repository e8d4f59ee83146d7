"""Preprocessing: one sample to a ModelInput with its loss mask, or, by file headers, to its size.

`SamplePreprocessor` is the Processor of inference with training's media lookup: local paths below a
base folder, remote objects fetched in advance, and a disk cache of decoded videos.
`HeaderPreprocessor` follows the same path but reads image and video headers only, so that the
lengths that bins are packed by are those of the prepared samples. Any defect of a sample is
raised as SampleError with the reason that it is counted by. `lengths.py` measures whole sources,
`dataset.py` prepares the samples of a bin.
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
from qwen2vl.data.formats import Conversation, Document, Sample, SampleError, TextTokens
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.storage import MissingError, Storage, is_remote, resolve_address
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.geometry import Grid
from qwen2vl.grounding import GROUNDING_TOKENS, CoordinateError, check_normalized
from qwen2vl.processor.chat_template import MODALITY_OF
from qwen2vl.processor.content import MediaPart, TextPart
from qwen2vl.processor.image import PixelLimits, target_size
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.processor.media.data_url import looks_like_base64
from qwen2vl.processor.media.rgb import open_encoded, oriented_size
from qwen2vl.processor.media.source import MediaLimits, read_source
from qwen2vl.processor.media.video_source import open_video
from qwen2vl.processor.messages import parse_messages
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer_files import END_OF_TEXT, VISION_END, VISION_START
from qwen2vl.processor.video import find_video_preset, plan_frames

__all__ = [
    "PAD_TO_MULTIPLE_OF",
    "BadSample",
    "HeaderPreprocessor",
    "SamplePreprocessor",
    "TrainingExample",
    "padded_length",
]

PAD_TO_MULTIPLE_OF = 8  # tokens; each conversation of a batch is padded to a multiple of this
DECODING_VERSION = 3  # part of the frame cache's keys; increment when decoded videos change
HEADER_BYTES = 1 << 16  # of a remote image that are fetched to read its size

_PLACEHOLDER_OF = {kind: placeholder for placeholder, kind in MODALITY_OF.items()}
_REASON_OF = {"image": "image", "video": "video"}


class TrainingExample(NamedTuple):
    """One supervised conversation, and the task family that metrics report it under."""

    input: ModelInput
    family: str


class BadSample(NamedTuple):
    """A sample that could not be used; no other sample replaces it."""

    id: str
    source: str
    reason: str  # category to count by
    text: str
    known: bool = False  # before the run began: bad by its header, or too large and dropped


def padded_length(length: int) -> int:
    """Return the number of tokens that a conversation of `length` tokens occupies in a batch."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF


class SamplePreprocessor(Processor):
    """Turns the samples of one source into ModelInputs with loss masks, for training."""

    def __init__(
        self,
        processor: Processor,
        data: DataConfig,
        *,
        media_root: str = "",
        frame_cache: FrameCache | None = None,
        max_pixels: int = 0,
    ) -> None:
        """Create a preprocessor with the settings of `processor`.

        Args:
            processor: of the model that is trained.
            data: limits on time and size, and the video preset.
            media_root: folder or address that relative media paths are resolved against.
            frame_cache: disk cache of decoded videos.
            max_pixels: limit of every image and frame, below the processor's own; 0: that one.
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
            limits=MediaLimits(max_frames=data.max_frames, decode_timeout=data.decode_timeout),
        )
        self.data, self.media_root, self.frame_cache = data, media_root, frame_cache
        self.storage = Storage(
            concurrency=data.concurrency, max_retries=data.max_retries, timeout=data.fetch_timeout
        )
        self._fetched: dict[str, bytes | InputError] = {}

    def prepare(self, sample: Sample) -> ModelInput:
        """Process one sample into a ModelInput with its loss mask.

        Raises:
            SampleError: the sample cannot be used.
        """
        try:
            processed = self._process_sample(sample)
        except SampleError:
            raise
        except CoordinateError as error:
            raise SampleError("box", str(error)) from error
        except InputError as error:
            raise SampleError("messages", str(error)) from error
        assert processed.loss_mask is not None
        if not any(processed.loss_mask[1:]):
            raise SampleError("answer", "there is no answer to learn from")
        return processed

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Fetch the remote media of all of these samples concurrently; earlier ones are dropped."""
        addresses = [
            address
            for sample in samples
            for _, source in _media_sources(sample)
            for address in self._remote_addresses(source)
        ]
        self._fetched = self.storage.read_many(addresses) if addresses else {}

    def _process_sample(self, sample: Sample) -> ModelInput:
        if isinstance(sample, Conversation):
            messages = parse_messages(sample.messages)
            for i in sample.unsupervised:
                messages[i] = replace(messages[i], is_supervised=False)
            for i, message in enumerate(messages):
                for part in message.parts:
                    if isinstance(part, TextPart):
                        check_normalized(part.text, f"messages[{i}]")
            return self(messages, tools=sample.tools, for_training=True)
        if isinstance(sample, Document):
            media = [part for part in sample.parts if not isinstance(part, str)]
            prompt = self._document_text(sample.parts[: sample.num_prompt_parts])
            text = self._document_text(sample.parts) + END_OF_TEXT
            check_normalized(text, "the text")
            return self.from_text(text, media, for_training=True, prompt_length=len(prompt))
        return _from_text_tokens(sample)

    def _document_text(self, parts: Iterable[str | Mapping[str, Any]]) -> str:
        text = ""
        for part in parts:
            if not isinstance(part, str):
                text += VISION_START + _PLACEHOLDER_OF[part["type"]] + VISION_END
                continue
            special = set(self.tokenizer.split_special_tokens(part)[1::2]) - set(GROUNDING_TOKENS)
            if special:
                raise SampleError("text", f"the document has the special token {min(special)}")
            text += part
        return text

    def _build_item(self, part: MediaPart, default_name: str) -> Item:
        try:
            resolved = replace(part, source=self._resolve_source(part.source))
            return self._load_item(resolved, default_name)
        except MissingError as error:
            raise SampleError("missing", str(error)) from error
        except InputError as error:
            raise SampleError(_REASON_OF[part.kind], str(error)) from error

    def _load_item(self, part: MediaPart, default_name: str) -> Item:
        source = part.source
        if part.kind == "video" and self.frame_cache and isinstance(source, Path | bytes):
            decode = super()._build_item
            return self.frame_cache.get_or_decode(
                source, self._sampling_key(part), lambda: decode(part, default_name)
            )
        return super()._build_item(part, default_name)

    def _sampling_key(self, part: MediaPart) -> str:
        """Return a key of all settings that determine a video's frames and pixels."""
        decisive = [DECODING_VERSION, self.video_preset, part.options.to_dict()]
        decisive.append(asdict(self.pixels))
        return json.dumps([*decisive, asdict(self.config.vision)], sort_keys=True)

    def _resolve_source(self, source: Any) -> Any:
        """Resolve a media path: to a local path, or to the bytes of a remote object."""
        if isinstance(source, list | tuple):
            return [self._resolve_source(item) for item in source]
        if not isinstance(source, str):
            return source
        address = resolve_address(self.media_root, source)
        if is_remote(address):
            return self._read_remote(address)
        if address.startswith(("data:", "file:")):
            return address
        path = Path(os.path.expanduser(address))
        try:
            if path.is_file():
                return path
            why = f"is missing in {os.path.abspath(path.parent)}"
        except OSError as error:
            why = f"cannot be opened: {error.strerror}"
        if looks_like_base64(source):
            raise InputError(
                f"{abbreviate(source)} looks like base64, not a path; write "
                "data:image/png;base64,... before it"
            )
        raise MissingError(f"{source:.200} {why}")

    def _read_remote(self, address: str) -> bytes:
        fetched = self._fetched.get(address)
        if isinstance(fetched, InputError):
            raise fetched
        return self.storage.read(address) if fetched is None else fetched

    def _remote_addresses(self, source: Any) -> Iterator[str]:
        if isinstance(source, list | tuple):
            for item in source:
                yield from self._remote_addresses(item)
        elif isinstance(source, str) and is_remote(
            address := resolve_address(self.media_root, source)
        ):
            yield address


class HeaderPreprocessor(SamplePreprocessor):
    """Computes the sizes of samples from media headers: its items have grids but no patches."""

    def prefetch(self, samples: Iterable[Sample]) -> None:
        """Fetch the headers of remote images concurrently; earlier ones are dropped."""
        addresses = [
            address
            for sample in samples
            for kind, source in _media_sources(sample)
            if kind == "image"
            for address in self._remote_addresses(source)
        ]
        self._fetched = self.storage.read_many(addresses, HEADER_BYTES) if addresses else {}

    def _build_item(self, part: MediaPart, default_name: str) -> Item:
        address = next(self._remote_addresses(part.source), "")
        header = self._fetched.get(address)
        try:
            return super()._build_item(part, default_name)
        except SampleError:
            if not isinstance(header, bytes) or len(header) < HEADER_BYTES:
                raise
        self._fetched[address] = self.storage.read(address)  # some formats store the size later
        return super()._build_item(part, default_name)

    def _load_item(self, part: MediaPart, default_name: str) -> Item:
        vision, options = self.config.vision, part.options
        if part.kind == "video":
            rules = find_video_preset(self.video_preset)
            fps = options.fps or rules.fps
            video = open_video(
                part.source,
                self.limits,
                default_name,
                fps=fps,
                apply_exif_orientation=rules.apply_exif_orientation,
            )
            plan = plan_frames(
                video.metadata,
                preset=rules,
                vision=vision,
                pixels=self.pixels,
                options=options,
                name=default_name,
            )
            num_frame_pairs = -(-len(plan.indices) // vision.temporal_patch_size)
            original_size = (video.metadata.height, video.metadata.width)
            resized_size = (plan.height, plan.width)
        else:
            original_size = self._image_size(part.source, default_name)
            num_frame_pairs = 1
            resized_size = target_size(
                *original_size,
                vision=vision,
                pixels=self.pixels,
                options=options,
                name=default_name,
            )
        return Item(
            kind=part.kind,
            patches_NP=torch.empty(0, vision.patch_dim, dtype=torch.uint8),
            grid=Grid(
                num_frame_pairs,
                resized_size[0] // vision.patch_size,
                resized_size[1] // vision.patch_size,
            ),
            pair_digests=(),
            name=default_name,
            original_size=original_size,  # boxes in pixels are written relative to it
            resized_size=resized_size,
        )

    def _image_size(self, source: Any, name: str) -> tuple[int, int]:
        """Return (height, width) from an image's header."""
        exif = find_video_preset(self.video_preset).apply_exif_orientation
        media = read_source(source, self.limits, name)
        if isinstance(media.content, np.ndarray):
            return media.content.shape[0], media.content.shape[1]
        if isinstance(media.content, Image.Image):
            return oriented_size(media.content, apply_exif_orientation=exif)
        with open_encoded(media, self.limits, name) as (image, _):
            return oriented_size(image, apply_exif_orientation=exif)


def _media_sources(sample: Sample) -> Iterator[tuple[str, Any]]:
    """Yield kind and source of each of a sample's media; none if its messages are malformed."""
    if isinstance(sample, Document):
        for part in sample.parts:
            if isinstance(part, Mapping):
                kind = part.get("type", "")
                yield kind, part.get(kind)
    elif isinstance(sample, Conversation):
        try:
            messages = parse_messages(sample.messages)
        except InputError:
            return  # raised again, and counted, when the sample is prepared
        for message in messages:
            yield from (
                (part.kind, part.source) for part in message.parts if isinstance(part, MediaPart)
            )


def _from_text_tokens(sample: TextTokens) -> ModelInput:
    num_tokens = len(sample.ids)
    return ModelInput(
        input_ids=sample.ids.tolist(),
        items=(),
        position_ids_3T=torch.arange(num_tokens).expand(3, -1),
        rope_delta=0,
        placeholder_index_M=torch.empty(0, dtype=torch.int64),
        loss_mask=[True] * num_tokens,
    )
