"""Multimodal processor: chat messages -> items -> text -> token ids -> positions -> ModelInput.

`Processor` preprocesses images and videos, renders the chat template, tokenizes, expands image and
video pads and computes M-RoPE position ids. Inference prompts and training examples take the same
path; only the loss mask differs. The engine and the trainer consume the ModelInput.
(HF: Qwen2VLProcessor; qwen_vl_utils: process_vision_info.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import InputError, abbreviate
from qwen2vl.geometry import mrope_positions, num_vision_tokens, placeholder_index
from qwen2vl.processor.chat_template import MODALITY_OF, Segment, render, tokenize
from qwen2vl.processor.content import MediaPart, Modality, add_param, parse_media_item
from qwen2vl.processor.image import PixelLimits, preprocess_image
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.processor.item_cache import ItemCache, content_digest
from qwen2vl.processor.media.decoder import LOCAL_DECODER, MediaDecoder
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits, copy_to_memory
from qwen2vl.processor.messages import parse_messages
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from qwen2vl.processor.tools.tool_prompt import merge_turns
from qwen2vl.processor.video import find_video_preset, preprocess_video, segment_videos
from qwen2vl.processor.video.subtitles import Cue, read_subtitles

__all__ = ["Processor"]

_MAX_NAME = 120  # characters; of a longer file name, most likely base64, errors show a part


class Processor:
    """Converts conversations to ModelInputs for one model."""

    def __init__(
        self,
        config: Qwen2VLConfig,
        tokenizer: Tokenizer,
        *,
        pixels: PixelLimits,
        video_preset: str = "paper",
        limits: MediaLimits | None = None,
    ) -> None:
        """Build the processor of one model.

        Args:
            config: of the model.
            tokenizer: of the same folder.
            pixels: min_pixels and max_pixels of an image, from preprocessor_config.json.
            video_preset: name of the frame sampling and resizing rules for videos.
            limits: on the media that are opened; None: `DEFAULT_LIMITS`, for local use.

        Raises:
            CheckpointError: the tokenizer's special ids are not those of `config`.
            InputError: there is no such preset, or an argument has another type.
        """
        _check_type("config", config, Qwen2VLConfig)
        _check_type("tokenizer", tokenizer, Tokenizer)
        _check_type("pixels", pixels, PixelLimits)
        _check_type("limits", limits, MediaLimits, type(None))
        tokenizer.check_config(config)
        self._preset = find_video_preset(video_preset)
        self.config = config
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.video_preset = video_preset
        self.limits = limits or DEFAULT_LIMITS
        self.decoder: MediaDecoder = LOCAL_DECODER
        self._item_cache: ItemCache | None = None
        self._stream_above: int | None = None

    def with_media(self, decoder: MediaDecoder, limits: MediaLimits) -> Processor:
        """Return a copy that decodes media with `decoder`, within `limits`; its cache is empty."""
        processor = copy(self)
        processor.decoder, processor.limits = decoder, limits
        if self._item_cache is not None:
            processor._item_cache = ItemCache(self._item_cache.max_bytes)
        return processor

    @property
    def item_cache_bytes(self) -> int:
        """Bytes of the preprocessed images and videos that are cached."""
        return 0 if self._item_cache is None else self._item_cache.num_bytes

    def with_item_cache(self, max_bytes: int) -> Processor:
        """Return a copy of this processor with an LRU cache of `max_bytes` of preprocessed items.

        For multi-turn chat, where each request holds the images of all earlier turns.
        """
        processor = copy(self)
        processor._item_cache = ItemCache(max_bytes)
        return processor

    def with_streamed_videos(self, above: int | None) -> Processor:
        """Return a copy that decodes videos of more than `above` bytes while they are used.

        Their items have a `source` in place of patches: for the engine, not for training.
        """
        processor = copy(self)
        processor._stream_above = above
        return processor

    def __call__(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        continue_final_message: bool = False,
        for_training: bool = False,
        allow_special_tokens: bool = False,
        cache_salt: bytes = b"",
    ) -> ModelInput:
        """Process one conversation.

        Args:
            messages: in Qwen's, Hugging Face's or OpenAI's format: mappings, or objects with
                `model_dump`, such as those that OpenAI's client returns. What `parse_messages`
                returned is taken as it is.
            tools: definitions of functions that the assistant may call, in OpenAI's or Qwen's
                format.
            add_generation_prompt: end with the header of the assistant's next turn.
            add_vision_id: number images and videos in the text, as "Picture 1: ".
            continue_final_message: leave the assistant's last turn open, to be continued.
            for_training: add the loss mask, and no generation prompt.
            allow_special_tokens: recognize every special token in text, not only the grounding
                tokens and those that a fine-tune has added; for trusted text only.
            cache_salt: prompts of different salts share no entry of any cache (vLLM's name).

        Raises:
            InputError: messages or media cannot be used; the text names them and the reason, and
                `param` is the path of the message or item.
        """
        parsed = parse_messages(messages)
        # Results of parallel tool calls are rendered in the order of the calls.
        media = [p for turn in merge_turns(parsed) for p in turn.parts if isinstance(p, MediaPart)]
        items = self._build_items(media, cache_salt)
        parsed, items = segment_videos(parsed, media, items, self._read_subtitles)
        segments = render(
            parsed,
            sizes=[item.original_size for item in items if item.kind == "image"],
            tools=tools,
            add_generation_prompt=add_generation_prompt and not for_training,
            add_vision_id=add_vision_id,
            continue_final_message=continue_final_message,
        )
        return self._assemble(
            segments,
            items,
            for_training=for_training,
            allow_special_tokens=allow_special_tokens,
            cache_salt=cache_salt,
        )

    def from_text(
        self,
        text: str,
        media: Sequence[Any] = (),
        *,
        for_training: bool = False,
        prompt_length: int = 0,
        allow_special_tokens: bool = True,
        cache_salt: bytes = b"",
    ) -> ModelInput:
        """Process raw text that holds its special tokens, as for pretraining or a custom prompt.

        Each <|image_pad|> or <|video_pad|> is the placeholder of the next of `media`: a source, or
        a content item such as {"image": ..., "max_pixels": ...}. With `for_training` every token
        is supervised except the vision tokens with their start and end, and the first
        `prompt_length` characters of the text. With
        `allow_special_tokens=False`, for text that is not trusted, control tokens stay text as in
        messages, and there are no placeholders. `cache_salt` is as in `__call__`.

        Raises:
            InputError: the numbers of placeholders and of media differ, or one of the media cannot
                be used.
        """
        _check_type("text", text, str, remedy="messages go to the processor itself")
        _check_type("media", media, list, tuple, remedy="put a single source into a list")
        parts = self.tokenizer.split_special_tokens(text) if allow_special_tokens else [text]
        kinds: list[Modality] = [MODALITY_OF[part] for part in parts if part in MODALITY_OF]
        if len(kinds) != len(media):
            raise InputError(
                f"the text has {len(kinds)} placeholders ({kinds.count('image')} image, "
                f"{kinds.count('video')} video), but {len(media)} media were given; each "
                "placeholder needs one"
            )
        parsed = [
            parse_media_item(kind, source, f"media[{i}]")
            for i, (kind, source) in enumerate(zip(kinds, media, strict=True))
        ]
        unsupervised = {VISION_START, VISION_END, *MODALITY_OF}
        segments: list[Segment] = []
        for i, part in enumerate(parts):
            if i % 2:
                is_supervised = prompt_length <= 0 and part not in unsupervised
                segments.append(Segment(part, is_token=True, supervised=is_supervised))
            else:
                length = max(0, prompt_length)
                segments += [Segment(part[:length]), Segment(part[length:], supervised=True)]
            prompt_length -= len(part)
        return self._assemble(
            segments,
            self._build_items(parsed, cache_salt),
            for_training=for_training,
            allow_special_tokens=allow_special_tokens,
            cache_salt=cache_salt,
        )

    def from_token_ids(self, ids: Sequence[int], *, cache_salt: bytes = b"") -> ModelInput:
        """Return the prompt of token ids without media, as completions of token ids need it.

        Raises:
            InputError: no ids, or one that is not an id of the model, or of a vision token.
        """
        _check_type("ids", ids, list, tuple, remedy="text goes to from_text")
        if not ids:
            raise InputError("the list of token ids is empty; give at least one")
        vision = {
            self.tokenizer.token_to_id(token): token
            for token in (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END)
        }
        size = self.config.text.vocab_size
        for index, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise InputError(
                    f"token id {index} is {abbreviate(token)}, must be a whole number from 0 to "
                    f"{size - 1}"
                )
            if token in vision:
                raise InputError(
                    f"token id {index} is {vision[token]}, which needs an image or a video; give "
                    "them as messages"
                )
        position_ids_3T, rope_delta = mrope_positions(ids, [], self.config)
        return ModelInput(
            input_ids=list(ids),
            items=(),
            position_ids_3T=position_ids_3T,
            rope_delta=rope_delta,
            placeholder_index_M=placeholder_index(ids, self.config),
            cache_salt=cache_salt,
        )

    def _read_subtitles(self, part: MediaPart, name: str) -> list[Cue]:
        if self.decoder is not LOCAL_DECODER:
            raise InputError(f"{name}: a server reads no subtitles; send their text as text")
        return read_subtitles(part.options.subtitles, part.source, self.limits, name)

    def _build_items(self, media: Sequence[MediaPart], cache_salt: bytes) -> list[Item]:
        counts = {"image": 0, "video": 0}
        items = []
        for part in media:
            counts[part.kind] += 1
            name = f"{part.kind} {counts[part.kind]}"
            with add_param(part.path):
                items.append(
                    self._build_item(part, name)
                    if self._item_cache is None
                    else self._cached_item(self._item_cache, part, name, cache_salt)
                )
        return items

    def _build_item(self, part: MediaPart, default_name: str) -> Item:
        name = _file_name(part.source) or default_name
        return self._preprocess(part, name)

    def _cached_item(
        self, cache: ItemCache, part: MediaPart, default_name: str, cache_salt: bytes
    ) -> Item:
        name = _file_name(part.source) or default_name
        # Once for the digest and the pixels: a pipe can be read only once.
        part = replace(part, source=copy_to_memory(part.source, self.limits, name))
        digest = content_digest(part.source, self.limits, name)
        if digest is None:
            return self._preprocess(part, name)
        # What is between the frames is no part of the item.
        options = replace(part.options, segment_frames=None, subtitles=None)
        key = (part.kind, name, options, self.pixels, self.video_preset, digest, cache_salt)
        item = cache.get(key)
        if item is None:
            item = self._preprocess(part, name)
            cache.put(key, item)
        return item

    def _preprocess(self, part: MediaPart, name: str) -> Item:
        vision, pixels, options = self.config.vision, self.pixels, part.options
        if part.kind == "image":
            return preprocess_image(
                part.source,
                vision=vision,
                pixels=pixels,
                options=options,
                limits=self.limits,
                name=name,
                apply_exif_orientation=self._preset.apply_exif_orientation,
                decoder=self.decoder,
            )
        return preprocess_video(
            part.source,
            vision=vision,
            pixels=pixels,
            preset=self.video_preset,
            options=options,
            limits=self.limits,
            name=name,
            decoder=self.decoder,
            stream_above=self._stream_above,
        )

    def _assemble(
        self,
        segments: list[Segment],
        items: list[Item],
        *,
        for_training: bool,
        allow_special_tokens: bool,
        cache_salt: bytes,
    ) -> ModelInput:
        grids = [item.grid for item in items]
        ids, mask = tokenize(
            segments,
            self.tokenizer,
            [num_vision_tokens(grid, self.config.vision.spatial_merge_size) for grid in grids],
            allowed_special="all" if allow_special_tokens else "markup",
        )
        position_ids_3T, rope_delta = mrope_positions(ids, grids, self.config)
        return ModelInput(
            input_ids=ids,
            items=tuple(items),
            position_ids_3T=position_ids_3T,
            rope_delta=rope_delta,
            placeholder_index_M=placeholder_index(ids, self.config),
            loss_mask=mask if for_training else None,
            notes=tuple(f"{item.name}: {note}" for item in items for note in item.notes),
            cache_salt=cache_salt,
        )


def _check_type(
    name: str,
    value: object,
    *kinds: type,
    remedy: str = "`load` builds a processor from a folder",
) -> None:
    if not isinstance(value, kinds):
        kind = kinds[0].__name__
        raise InputError(f"{name}: got {abbreviate(value)}, must be of type {kind}; {remedy}")


def _file_name(source: Any) -> str | None:
    """Return the file name of a path, URL or open file; None if it has none that can be shown."""
    if isinstance(source, PurePath):
        name = source.name
    elif isinstance(source, str) and source[:5].lower() != "data:":
        name = PurePath(source.split("?")[0] if "://" in source else source).name
    elif isinstance(opened := getattr(source, "name", None), str) and hasattr(source, "read"):
        name = PurePath(opened).name
    else:
        return None
    return name if name and name.isprintable() and len(name) <= _MAX_NAME else None
