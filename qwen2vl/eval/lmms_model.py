"""The model class of lmms-eval: answers its requests with an `LLM` in the same process.

    python -m lmms_eval --model qwen2vl --model_args pretrained=DIR --batch_size 64 --tasks mme

Requests are read as lmms-eval's client for OpenAI's API reads them (`--model openai`): the same
parameters of sampling, the same messages, so that a server of the same model gives the same
answers. Images are not encoded, and videos are read by our processor, as with the client's
`pass_video_url=True`. Only lmms-eval imports this module. (lmms_eval.models.chat.vllm.VLLM)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    GenerationResult,
    TokenCounts,
)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from qwen2vl.engine import LLM, Completion, SamplingParams
from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.validation import PreparedRequest
from qwen2vl.errors import ConfigError, InputError, Qwen2VLError
from qwen2vl.eval.lmms_plugin import FAILED

# Empty, so that tests and documentation that import all public names do not need lmms-eval.
__all__ = []

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 1024  # of lmms-eval's client, where a task has no max_new_tokens
# Of --model_args. The others of `LLM` are objects, which a command line cannot give.
MODEL_ARGUMENTS = (
    *("pretrained", "model", "dtype", "device", "quantize", "adapter", "compile"),
    *("max_model_len", "kv_cache_dtype", "min_pixels", "max_pixels", "video_preset"),
    *("max_num_frames", "fps"),
)
FORWARDED = ("top_p", "seed", "presence_penalty", "frequency_penalty")  # by that client


class Qwen2VLModel(lmms):
    """A model in lmms-eval.

    Args:
        pretrained: folder or repo id; "nano" is the model of this package.
        model: another name of `pretrained`, as for `--model openai`.
        batch_size: requests given to the engine at a time; they run together.
        max_batch_size: not used.
        max_num_frames: frames sampled from each video, instead of 2 a second; with `fps` the most
            frames.
        fps: frames sampled per second of a video.
        options: arguments of `LLM`, those of MODEL_ARGUMENTS.

    Raises:
        InputError: an argument is unknown or invalid.
        ConfigError: several processes were launched.
        CheckpointError, CapacityError: as `LLM` does.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        model: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_num_frames: int | None = None,
        fps: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if pretrained and model and pretrained != model:
            raise InputError(
                f"pretrained {pretrained} and model {model} are two names of one argument; give one"
            )
        check_keywords(options, MODEL_ARGUMENTS, "model argument")
        _check_one_process()
        self.batch_size = _read_batch_size(batch_size)
        self.video_options = _video_options(max_num_frames, fps)
        self.llm = LLM(pretrained or model or "nano", **options)
        self.device = self.llm.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, `batch_size` at a time, in their order.

        The answer to a request that cannot be run is FAILED and the reason, as that of lmms-eval's
        client is, and the reason is logged: such a run is not valid.
        """
        results: list[Any] = []
        with tqdm(total=len(requests), desc="Model Responding") as progress:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                results += self._answer([self._prepare_request(request) for request in batch])
                progress.update(len(batch))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer requests of several rounds, one by one: the answers of the rounds of each."""
        progress = tqdm(requests, desc="Multi-round Responding")
        return [list(self._answer_rounds(request)) for request in progress]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse: lmms-eval's chat models are asked for texts only.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"loglikelihood: {len(requests)} requests; log probabilities of given answers are not "
            "supported, use tasks of the type generate_until"
        )

    def clean(self) -> None:
        """Free the weights and the caches."""
        self.llm.close()
        super().clean()

    def _prepare_request(self, request: Any) -> PreparedRequest | Qwen2VLError:
        _, doc_to_messages, options, doc_id, task, split = request.args
        return self._prepare(doc_to_messages(self.task_dict[task][split][doc_id]), options)

    def _prepare(
        self, raw_messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> PreparedRequest | Qwen2VLError:
        """Preprocess one request, or return why it cannot be run."""
        params = _sampling_params(options)
        messages = ChatMessages(messages=raw_messages).to_hf_messages(self.video_options)
        try:
            return self.llm.prepare(messages, params)
        except Qwen2VLError as error:
            return error

    def _answer(self, batch: Sequence[PreparedRequest | Qwen2VLError]) -> list[Any]:
        prepared = [one for one in batch if not isinstance(one, Qwen2VLError)]
        try:
            completions = iter(self.llm.generate_prepared(prepared))
        except Qwen2VLError as error:  # of several requests, those that failed have it
            if len(prepared) != 1:
                raise
            return [_failure(one if isinstance(one, Qwen2VLError) else error) for one in batch]
        return [
            _failure(one) if isinstance(one, Qwen2VLError) else _result(next(completions))
            for one in batch
        ]

    def _answer_rounds(self, request: Any) -> Iterator[str]:
        _, doc_to_messages, options, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        messages, answers, info = doc_to_messages(doc), [], None
        for round_number in count(1):
            (result,) = self._answer([self._prepare(messages, options)])
            answers.append(result.text)
            yield result.text
            following = doc_to_messages(
                doc,
                round_idx=round_number,
                previous_output=list(answers),
                previous_round_info=info,
            )
            if not (isinstance(following, tuple) and len(following) == 4):
                return
            messages, is_last, _, info = following
            if is_last:
                return


def _sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Return the parameters that lmms-eval's client would send; what it leaves out has no effect.

    It leaves out `until`, `do_sample` and `num_beams`: greedy is a temperature of 0. Grounding
    tokens are dropped from the answers, as a server does.

    Raises:
        InputError: a value is invalid, or several answers are asked for.
    """
    if options.get("n") not in (None, 1):
        raise InputError(f"n: got {options['n']}; one answer to each request can be evaluated")
    given = {name: options[name] for name in FORWARDED if options.get(name) is not None}
    temperature = options.get("temperature", 0)
    max_tokens = options.get("max_new_tokens", DEFAULT_MAX_TOKENS)
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, skip_grounding_tokens=True, **given
    )


def _video_options(max_num_frames: int | None, fps: float | None) -> dict[str, Any]:
    """Return the options of all videos, in qwen-vl-utils' names."""
    if fps is None:
        return {} if max_num_frames is None else {"nframes": max_num_frames}
    return {"fps": fps, **({} if max_num_frames is None else {"max_frames": max_num_frames})}


def _read_batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise InputError(f"batch_size: got {value}, must be a whole number from 1, such as 64")
    return size


def _check_one_process() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"WORLD_SIZE is {processes}: the model runs in one process; start lmms_eval without "
            "accelerate launch or torchrun, or evaluate a server, with one process for each GPU"
        )


def _failure(error: Qwen2VLError) -> Any:
    text = str(error).replace("\n", " ")
    logger.error("a request failed, so the scores of this run are not valid: %s", text)
    return GenerationResult(text=f"{FAILED}] {text}", token_counts=TokenCounts())


def _result(completion: Completion) -> Any:
    if completion.error is not None:
        return _failure(Qwen2VLError(completion.error))
    tokens = TokenCounts(
        input_tokens=completion.prompt_tokens, output_tokens=len(completion.token_ids)
    )
    return GenerationResult(text=completion.text, token_counts=tokens)
