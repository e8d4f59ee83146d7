"""LocalBackend: a chat session answered by a loaded LLM.

The prefix and encoder caches of the engine keep what earlier turns computed; Ctrl-C stops after
an engine step, so that they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen2vl.cli import annotate, options
from qwen2vl.cli.chat.backend import ChatMessage, MediaSummary
from qwen2vl.cli.media_arguments import MediaFile, latest_media
from qwen2vl.cli.prompt_summary import format_item, note_nano_limits, print_prompt_summary
from qwen2vl.cli.terminal import DeltaWriter

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import SamplingParams
    from qwen2vl.engine.validation import PreparedRequest
    from qwen2vl.processor.inputs import Item

__all__ = ["LocalBackend", "LocalTurn"]


class LocalBackend:
    """Answers with a loaded LLM. (Implements ChatBackend.)"""

    no_adapters = "there are no adapters to choose from; start with --adapter NAME=DIR"

    def __init__(self, loaded: LoadedModel, params: SamplingParams) -> None:
        """Answer with `loaded`; the first of its unmerged adapters is selected."""
        self.loaded = loaded
        self.params = params
        self.adapter: str | None = next(iter(loaded.adapter_names), None)
        self._num_noted_items = 0  # items whose notes were already written
        self._has_noted_limits = False

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that stay unmerged."""
        return self.loaded.adapter_names

    def describe(self, messages: Sequence[ChatMessage]) -> MediaSummary:
        """Preprocess images and videos, and return their sizes and numbers of tokens.

        Raises:
            InputError, CapacityError: a message, image or video cannot be used.
        """
        items = self.loaded.llm.processor(messages).items
        count = sum(item.num_tokens for item in items)
        return MediaSummary(lines=tuple(map(format_item, items)), total=f"{count:,} tokens")

    def begin(self, messages: Sequence[ChatMessage], *, retry: int = 0) -> LocalTurn:
        """Prepare the request of a conversation, and print the summary of its prompt.

        Raises:
            InputError, CapacityError: as `LLM.prepare` does.
        """
        params = replace(self.params, adapter=self.adapter)
        if params.seed is not None:  # the same seed would give the same answer
            params = replace(params, seed=(params.seed + retry) % 2**64)
        llm = self.loaded.llm
        prepared = llm.prepare(list(messages), params)
        print_prompt_summary(llm, prepared.prompt, num_noted_items=self._num_noted_items)
        self._num_noted_items = len(prepared.prompt.items)
        return LocalTurn(self, prepared, messages)

    def forget(self) -> None:
        """Write the notes of all items again: another conversation begins."""
        self._num_noted_items = 0

    def note_limits(self, prepared: PreparedRequest) -> None:
        """Note once what nano can do, if it answered by default."""
        if not self._has_noted_limits:
            self._has_noted_limits = note_nano_limits(self.loaded, prepared.prompt)


class LocalTurn:
    """One answer of a loaded LLM. (Implements ChatTurn.)"""

    def __init__(
        self, backend: LocalBackend, prepared: PreparedRequest, messages: Sequence[ChatMessage]
    ) -> None:
        self._backend = backend
        self._prepared = prepared
        self._files: list[MediaFile]
        self._files, first = latest_media(list(messages))
        self.shown: tuple[Item, ...] = prepared.prompt.items[first : first + len(self._files)]

    def run(self, writer: DeltaWriter) -> None:
        """Generate the answer; Ctrl-C takes effect after an engine step.

        Raises:
            KeyboardInterrupt: Ctrl-C; the caches of the engine are kept.
        """
        llm = self._backend.loaded.llm
        with writer.interrupts_between_steps():
            (completion,) = llm.generate_prepared(
                [self._prepared], on_delta=writer, on_step=writer.raise_if_interrupted
            )
        options.note_truncation(llm, self._prepared.params, completion)
        self._backend.note_limits(self._prepared)

    def save_annotated(self, text: str, output: str) -> None:
        """Draw the boxes of the answer on the latest images and videos."""
        processor = self._backend.loaded.llm.processor
        annotate.save_annotated(text, self._files, self.shown, output, processor)
