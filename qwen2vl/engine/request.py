"""One request's life: tokens come in one by one, text goes out, and at some point it is over.

A Sequence knows its prompt, its limits and how its answer may end, and how far the scheduler has
come with it. Text is released only when no later token can change it: never half a character,
never the beginning of a stop text. It must not know the model. Next room: sampler.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from qwen2vl.engine.kv_cache.block_pool import KeyChain, Row
from qwen2vl.engine.outputs import Completion, FinishReason, ItemReport, Seconds, TokenLogprob
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Sampler
from qwen2vl.errors import Qwen2VLError
from qwen2vl.lora.multi import Adapter
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
        sampler: Sampler,
        *,
        end_ids: frozenset[int],
        max_model_len: int,
        index: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.sampler = sampler
        self.index = index  # which of the answers of a call
        self.adapter = adapter
        self.ids = list(prompt.input_ids)  # the prompt, then the answer as it grows
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: Qwen2VLError | None = None
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt.input_ids))
        # How far the scheduler has come.
        self.chain = KeyChain(prompt, b"" if adapter is None else adapter.digest)
        self.row: Row | None = None
        self.num_computed = 0  # tokens whose keys and values are stored
        self.num_cached = 0  # of them, found and not computed, when it was first admitted
        self.num_drafted = self.num_accepted = 0  # guesses at its tokens, and those that came true
        self.held_items: list[Item] = []  # whose rows are kept for it
        self.clock = Clock()
        self._end_ids = end_ids
        self._decoder = decoder
        self._stops = StopBuffer(params.stop)

    @property
    def token_ids(self) -> list[int]:
        """The answer so far."""
        return self.ids[len(self.prompt.input_ids) :]

    @property
    def most_ids(self) -> int:
        """Tokens of prompt and answer, if the answer becomes as long as it may."""
        return len(self.prompt.input_ids) + self.max_tokens

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is still to be computed."""
        return len(self.ids) - self.num_computed > 1

    def positions(self, start: int, stop: int) -> Tensor:
        """Place tokens start..stop: (3, stop - start); past the prompt index + rope_delta."""
        known, delta = len(self.prompt.input_ids), self.prompt.rope_delta
        prompt_3T = self.prompt.position_ids_3T[:, start:stop]
        if stop <= known:
            return prompt_3T
        answer_3T = torch.arange(max(start, known) + delta, stop + delta).expand(3, -1)
        return answer_3T if start >= known else torch.cat([prompt_3T, answer_3T], dim=1)

    def items_after(self, num_tokens: int) -> Iterator[tuple[int, Item]]:
        """List (first token, item) of what is seen, wholly or in part, after `num_tokens`."""
        for start, item in zip(self.prompt.item_starts, self.prompt.items, strict=True):
            if start + item.num_tokens > num_tokens:
                yield start, item

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> str:
        """Take the next token; return the text that became certain by it."""
        assert self.finish_reason is None, "the answer is over"
        self.ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self._end_ids:
            return self._finish("stop", self._rest())
        text, found = self._stops.push(self._decoder.push(token_id))
        if found:
            return self._finish("stop", text)
        if len(self.ids) == self.most_ids:
            return self._finish("length", text + self._rest())
        self.text += text
        return text

    def fail(self, error: Qwen2VLError) -> None:
        """End with an error; what was said so far stays."""
        # The frames it came through would keep a failed step's tensors, just when memory is short.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error = error
        self._finish("error", "")

    def completion(self, *, process: float = 0.0) -> Completion:
        """Write the bill; `process` is the time that making the prompt took."""
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
            cached_tokens=self.num_cached,
            seconds=self.clock.seconds(process),
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            error=None if self.error is None else str(self.error),
        )

    def _rest(self) -> str:
        """Release what was held back; a stop text may yet be complete in the last characters."""
        text, found = self._stops.push(self._decoder.finish())
        return text if found else text + self._stops.flush()

    def _finish(self, reason: FinishReason, text: str) -> str:
        self.finish_reason = reason
        self.text += text
        self.clock.finished = time.perf_counter()
        return text


class Clock:
    """When a request began to be computed, saw its first token and ended."""

    def __init__(self) -> None:
        self.began = self.answered = self.finished = 0.0
        self.vision = 0.0  # seconds of steps' encoding in which its items took part

    def begin(self) -> None:
        """Note when the first step of the request begins; later steps change nothing."""
        self.began = self.began or time.perf_counter()

    def answer(self) -> None:
        """Note when the prompt is computed and the first token may be chosen."""
        self.answered = self.answered or time.perf_counter()

    def seconds(self, process: float) -> Seconds:
        """Divide the time between beginning and end."""
        answered = self.answered or self.finished
        return Seconds(
            process=process,
            vision=self.vision,
            prefill=max(0.0, answered - self.began - self.vision),
            decode=self.finished - answered,
        )


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
