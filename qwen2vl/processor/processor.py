"""The steps in a row: messages -> items -> text -> ids -> positions -> ModelInput.

The same walk serves an answer and a training example; only the loss mask differs. It must not
know weights, devices or batches. (HF: Qwen2VLProcessor.) Next: engine/ or train/, which take the
ModelInput.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import PurePath
from typing import Any

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import InputError
from qwen2vl.geometry import num_tokens, pad_index, text_positions
from qwen2vl.processor.chat_template import KIND_OF, Segment, render, tokenize
from qwen2vl.processor.image import PixelLimits, image_item
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.processor.item_cache import KeptItems, content_digest
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from qwen2vl.processor.messages import Kind, MediaPart, normalize, read_media
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import VISION_END, VISION_START
from qwen2vl.processor.video import find_preset, video_item

__all__ = ["Processor"]


class Processor:
    """Turns conversations into ModelInputs for one model."""

    def __init__(
        self,
        config: Qwen2VLConfig,
        tokenizer: Tokenizer,
        *,
        pixels: PixelLimits,
        video_preset: str = "paper",
        limits: MediaLimits | None = None,
    ) -> None:
        """Join the parts of one model.

        Args:
            config: of the model that will be fed.
            tokenizer: of the same folder.
            pixels: limits of a picture's size, from preprocessor_config.json.
            video_preset: which frames of a video are taken, and at which size.
            limits: on the media that are opened; None: those of a person's own machine.

        Raises:
            CheckpointError: the tokenizer's special ids are not those of `config`.
            InputError: there is no such preset.
        """
        tokenizer.check(config)
        self._rules = find_preset(video_preset)
        self.config = config
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.video_preset = video_preset
        self.limits = limits or DEFAULT_LIMITS
        self._kept: KeptItems | None = None

    def keeping(self, max_bytes: int) -> Processor:
        """Make the same processor with a memory: so many bytes of the items it has made.

        For conversations, which show the same pictures turn after turn.
        """
        same = copy(self)
        same._kept = KeptItems(max_bytes)
        return same

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        continue_final: bool = False,
        for_training: bool = False,
        trusted: bool = False,
    ) -> ModelInput:
        """Process one conversation.

        Args:
            messages: in Qwen's, Hugging Face's or OpenAI's form.
            tools: OpenAI's or Qwen's descriptions of functions the assistant may call.
            add_generation_prompt: end with the head of the assistant's next turn.
            add_vision_id: number the media in the text, as "Picture 1: ".
            continue_final: leave the assistant's last turn open and continue it.
            for_training: add the loss mask, and no generation prompt.
            trusted: let text hold every special token, not only the six of grounding.

        Raises:
            InputError: messages or media cannot be used; the text says which and why.
        """
        read = normalize(messages)
        media = [part for message in read for part in message.parts if isinstance(part, MediaPart)]
        items = self._items(media)
        segments = render(
            read,
            sizes=[item.size_given for item in items if item.kind == "image"],
            tools=tools,
            add_generation_prompt=add_generation_prompt and not for_training,
            add_vision_id=add_vision_id,
            continue_final=continue_final,
        )
        return self._assemble(segments, items, for_training=for_training, trusted=trusted)

    def from_text(
        self, text: str, media: Sequence[Any] = (), *, for_training: bool = False
    ) -> ModelInput:
        """Process raw text, special tokens and all, as for pretraining or a hand-made prompt.

        Each <|image_pad|> or <|video_pad|> stands for the next of `media`: a source, or a content
        item such as {"image": ..., "max_pixels": ...}. For training every token is supervised
        but those of media.

        Raises:
            InputError: the numbers of placeholders and of media differ, or a medium is unusable.
        """
        parts = self.tokenizer.split_special(text)
        kinds: list[Kind] = [KIND_OF[part] for part in parts if part in KIND_OF]
        if len(kinds) != len(media):
            raise InputError(
                f"the text has {len(kinds)} placeholders ({kinds.count('image')} image, "
                f"{kinds.count('video')} video), but {len(media)} media were given; each "
                "placeholder needs one"
            )
        wanted = [
            read_media(kind, given, f"media[{i}]")
            for i, (kind, given) in enumerate(zip(kinds, media, strict=True))
        ]
        unsupervised = {VISION_START, VISION_END, *KIND_OF}
        segments = [
            Segment(part, is_token=i % 2 == 1, supervised=part not in unsupervised)
            for i, part in enumerate(parts)
        ]
        return self._assemble(
            segments, self._items(wanted), for_training=for_training, trusted=True
        )

    def _items(self, media: Sequence[MediaPart]) -> list[Item]:
        counts = {"image": 0, "video": 0}
        items = []
        for part in media:
            counts[part.kind] += 1
            items.append(self._item(part, f"{part.kind} {counts[part.kind]}"))
        return items

    def _item(self, part: MediaPart, numbered: str) -> Item:
        name = _name_of(part.source) or numbered
        if self._kept is None:
            return self._made(part, name)
        digest = content_digest(part.source, self.limits, name)
        if digest is None:
            return self._made(part, name)
        key = (part.kind, name, part.options, self.pixels, self.video_preset, digest)
        item = self._kept.get(key)
        if item is None:
            item = self._made(part, name)
            self._kept.put(key, item)
        return item

    def _made(self, part: MediaPart, name: str) -> Item:
        vision, pixels, options = self.config.vision, self.pixels, part.options
        if part.kind == "image":
            return image_item(
                part.source,
                vision=vision,
                pixels=pixels,
                options=options,
                limits=self.limits,
                name=name,
                turn=self._rules.turn_pictures,
            )
        return video_item(
            part.source,
            vision=vision,
            pixels=pixels,
            preset=self.video_preset,
            options=options,
            limits=self.limits,
            name=name,
        )

    def _assemble(
        self, segments: list[Segment], items: list[Item], *, for_training: bool, trusted: bool
    ) -> ModelInput:
        grids = [item.grid for item in items]
        ids, mask = tokenize(
            segments,
            self.tokenizer,
            [num_tokens(grid, self.config.vision.spatial_merge_size) for grid in grids],
            special="all" if trusted else "grounding",
        )
        position_ids_3T, rope_delta = text_positions(ids, grids, self.config)
        return ModelInput(
            input_ids=ids,
            items=tuple(items),
            position_ids_3T=position_ids_3T,
            rope_delta=rope_delta,
            pad_index_M=pad_index(ids, self.config),
            loss_mask=mask if for_training else None,
            notes=tuple(f"{item.name}: {note}" for item in items for note in item.notes),
        )


def _name_of(source: Any) -> str | None:
    """Give the file's name, for sources that have one."""
    if isinstance(source, PurePath):
        return source.name
    if isinstance(source, str) and not source.startswith("data:"):
        return PurePath(source.split("?")[0]).name or None
    return None
