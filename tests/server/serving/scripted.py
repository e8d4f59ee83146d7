"""An engine that says what a test has written down, in the pieces that it asks for.

nano calls no tools, and an engine that fails on request is no use elsewhere. `scripted` replaces
the AsyncLLM of a server's state; processor, validation and handlers are the real ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from qwen2vl.engine import Completion, Delta, PreparedRequest
from qwen2vl.errors import Qwen2VLError
from qwen2vl.server.state import ServerState


class ScriptedStream:
    """Yields the pieces of each sample as deltas, like AsyncDeltaStream."""

    def __init__(
        self,
        prepared: PreparedRequest,
        samples: Sequence[Sequence[str]],
        *,
        finish_reason: Any = "stop",
        stop_reason: Any = None,
        errors: dict[int, Qwen2VLError],
        tokenizer: Any,
    ) -> None:
        self._prepared = prepared
        self._samples = samples
        self._finish_reason, self._stop_reason = finish_reason, stop_reason
        self._tokenizer = tokenizer
        self.requests = [SimpleNamespace(error=errors.get(i)) for i in range(len(samples))]
        self.is_aborted = False

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_text(text))

    def _text(self, ids: Sequence[int]) -> str:
        keep = "none" if self._prepared.params.skip_grounding_tokens else "grounding"
        return self._tokenizer.decode(ids, keep_special=keep)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for index, pieces in enumerate(self._samples):
            for number, piece in enumerate(pieces):
                ids = self._ids(piece)
                is_last = number == len(pieces) - 1
                reason = self._finish_reason if is_last else None
                if is_last and self.requests[index].error is not None:
                    reason = "error"
                yield Delta(
                    index=index,
                    text=self._text(ids),
                    finish_reason=reason,
                    stop_reason=self._stop_reason if is_last else None,
                    token_ids=ids,
                )

    async def completions(self) -> list[Completion]:
        if len(self.requests) == 1 and self.requests[0].error is not None:
            raise self.requests[0].error
        prompt = self._prepared.prompt
        result = []
        for request, pieces in zip(self.requests, self._samples, strict=True):
            ids = [i for piece in pieces for i in self._ids(piece)]
            result.append(
                Completion(
                    text=self._text(ids),
                    token_ids=tuple(ids),
                    finish_reason="error" if request.error else self._finish_reason,
                    stop_reason=self._stop_reason,
                    prompt_tokens=len(prompt.input_ids),
                    image_tokens=prompt.image_tokens,
                    video_tokens=prompt.video_tokens,
                    items=tuple(prompt.items),  # type: ignore[arg-type] - has what is read
                    error=None if request.error is None else str(request.error),
                )
            )
        return result

    def abort(self) -> None:
        self.is_aborted = True


class ScriptedLLM:
    """An AsyncLLM whose samples are given; records what it was asked."""

    def __init__(self, llm: Any, samples: Sequence[Sequence[str]], **options: Any) -> None:
        self.llm = llm
        self.prepared: list[PreparedRequest] = []
        self.streams: list[ScriptedStream] = []
        self._samples = samples
        self._options = {"errors": {}, **options}

    def stream_prepared(
        self, prepared: PreparedRequest, *, final_only: bool = False
    ) -> ScriptedStream:
        self.prepared.append(prepared)
        tokenizer = self.llm.processor.tokenizer
        stream = ScriptedStream(prepared, self._samples, tokenizer=tokenizer, **self._options)
        self.streams.append(stream)
        return stream


def scripted(state: ServerState, *samples: str | Sequence[str], **options: Any) -> ServerState:
    """Return a state whose engine yields these samples, each a text or a list of its pieces.

    `options`: finish_reason, stop_reason, and errors: sample -> error with which it ends.
    """
    pieces = [[one] if isinstance(one, str) else list(one) for one in samples]
    return replace(state, engine=ScriptedLLM(state.engine.llm, pieces, **options))
