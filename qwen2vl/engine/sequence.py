"""One request's life: tokens come in one by one, text goes out, and at some point it is over.

A Sequence knows its prompt, its limits and how its answer may end. Text is released only when no
later token can change it: never half a character, never the beginning of a stop text. It must
not know the model or the cache; the numbers of the prompt it carries are for the Completion.
Next room: sampler.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from qwen2vl.engine.params import (
    Completion,
    FinishReason,
    ItemReport,
    SamplingParams,
    Seconds,
    TokenLogprob,
)
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["Sequence", "StopBuffer", "TextDecoder"]


class TextDecoder(Protocol):
    """What a Sequence needs of the tokenizer: ids in, whole characters out."""

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain."""
        ...

    def finish(self) -> str:
        """Return what was held back."""
        ...


class StopBuffer:
    """Hold back what may turn out to be the beginning of a stop text.

    Of several stop texts the one that is complete first wins, whatever the token borders; of two
    complete at once, the longer.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.stops = tuple(stops)
        self.pending = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Take new text; return what is safe to show, and whether a stop text was found."""
        self.pending += piece
        found = [
            (at + len(stop), at) for stop in self.stops if (at := self.pending.find(stop)) >= 0
        ]
        if found:
            text, self.pending = self.pending[: min(found)[1]], ""
            return text, True
        held = self._held()
        text = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(text) :]
        return text, False

    def flush(self) -> str:
        """Release the rest: the answer is over and it was no stop text after all."""
        text, self.pending = self.pending, ""
        return text

    def _held(self) -> int:
        """Count the last characters that are the beginning of some stop text."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(self.pending)), 0, -1):
            if any(stop.startswith(self.pending[-length:]) for stop in self.stops):
                return length
        return 0


class Sequence:
    """One request from its prompt to its Completion."""

    def __init__(
        self,
        prompt: ModelInput,
        params: SamplingParams,
        decoder: TextDecoder,
        *,
        end_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt.input_ids))
        self._num_logprobs = params.logprobs
        self._end_ids = end_ids
        self._decoder = decoder
        self._stops = StopBuffer(params.stop)

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> str:
        """Take the next token; return the text that became certain by it."""
        assert self.finish_reason is None, "the answer is over"
        self.token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self._end_ids:
            return self._finish("stop", self._rest())
        text, found = self._stops.push(self._decoder.push(token_id))
        if found:
            return self._finish("stop", text)
        if len(self.token_ids) == self.max_tokens:
            return self._finish("length", text + self._rest())
        self.text += text
        return text

    def completion(self, seconds: Seconds) -> Completion:
        """Write the bill."""
        assert self.finish_reason is not None, "the answer is not over"
        prompt = self.prompt
        return Completion(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(prompt.input_ids),
            image_tokens=prompt.image_tokens,
            video_tokens=prompt.video_tokens,
            items=tuple(_report(item) for item in prompt.items),
            seconds=seconds,
            logprobs=None if self._num_logprobs is None else tuple(self.logprobs),
        )

    def _rest(self) -> str:
        """Release what was held back; a stop text may yet be complete in the last characters."""
        text, found = self._stops.push(self._decoder.finish())
        return text if found else text + self._stops.flush()

    def _finish(self, reason: FinishReason, text: str) -> str:
        self.finish_reason = reason
        self.text += text
        return text


def _report(item: Item) -> ItemReport:
    return ItemReport(
        kind=item.kind,
        name=item.name,
        size_given=item.size_given,
        size_seen=item.size_seen,
        tokens=item.num_tokens,
        frame_times=item.frame_times,
        notes=item.notes,
    )
