"""`batch --images`: one question about each image of a folder or pattern.

    image -> LLM.prepare (a thread) -> AsyncLLM -> {"image", "answer", "finish_reason", "error"}

The images are the user's own files and are decoded in this process; one that cannot be read has an
error for its answer. The id has digests of the image's name, of the question, and of the options
that decide the answer (identity.py), by which a batch is resumed and answers to another question or
of other options are recognized.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.batch.answers import check_is_file, open_answers
from qwen2vl.cli.batch.identity import batch_identity
from qwen2vl.cli.batch.image_files import describe_skipped, list_images
from qwen2vl.cli.batch.report import BatchReport
from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules
from qwen2vl.errors import (
    CapacityError,
    EngineDeadError,
    EngineError,
    InputError,
    Qwen2VLError,
    abbreviate,
)

if TYPE_CHECKING:
    from qwen2vl.engine import AsyncLLM, Completion, SamplingParams
    from qwen2vl.server.batch.runner import Answer, BatchCounts

__all__ = ["answer_images"]

logger = logging.getLogger(__name__)

COLUMNS = ("image", "answer", "finish_reason", "error")
NUM_THREADS = 4  # that read, decode and resize images
_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImageJob:
    image: str  # path
    adapter: str | None
    id: str


def answer_images(
    sources: Sequence[str], question: str, output: Path, system: str | None, given: dict[str, Any]
) -> int:
    """Answer a question about each image, and return the exit code.

    Raises:
        Qwen2VLError: a file, an option or the model cannot be used.
    """
    check_is_file(output, "-o")
    suffix = output.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise InputError(f"-o {output}: give a name that ends in .jsonl or .csv")
    skipped: dict[str, None] = {}
    images = list_images(sources, on_skipped=skipped.setdefault)
    if skipped:
        terminal.note(
            f"{describe_skipped(list(skipped))}; convert them to PNG or JPEG to ask about them"
        )
    grammar = options.grammar_from_options(given)
    params = replace(options.sampling_params_from_options(given), grammar=grammar)
    adapters = _adapter_names(given["adapters"])
    identity = batch_identity(given, click.get_current_context().command, system=system)
    id_end = _digest(question.encode("utf-8", "backslashreplace"), 4) + identity.digest
    jobs = [
        _ImageJob(image=image, adapter=adapter, id=_job_id(image, adapter) + id_end)
        for image in images
        for adapter in adapters or (None,)
    ]
    columns = (*COLUMNS, *(("adapter",) if adapters else ()), *(("boxes",) * given["boxes"]), "id")
    answered = _Answered(jobs, columns, id_end, identity.describe)
    report = BatchReport(output, "image" if len(adapters) < 2 else "question")

    with ExitStack() as stack:
        from qwen2vl.server.batch.runner import BatchCounts, run_jobs

        file = open_answers(
            stack,
            report,
            row_start=b'{"image": ',
            columns=columns if suffix == ".csv" else (),
            is_repeated=lambda number, record: answered.add(number, record, given["retry_failed"]),
        )
        if next(answered.remaining(), None) is None:  # without loading the model
            return report.finish(BatchCounts())
        from qwen2vl.engine import AsyncLLM, EngineConfig

        loaded = options.load_model_from_options(
            given,
            max_model_len=given["max_model_len"],
            engine=EngineConfig(max_num_seqs=given["max_num_seqs"]),
        )
        engine = AsyncLLM(stack.enter_context(loaded.llm))
        stack.callback(engine.close)
        threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prepare-image")
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        counts = BatchCounts()
        messages = [{"role": "system", "content": system}] if system else []
        handler = _ImageHandler(
            engine, threads, messages, question, params, file.to_row, columns, counts
        )
        return report.run(
            lambda on_answer: run_jobs(
                answered.remaining(),
                handler,
                file,
                engine,
                counts,
                # Images that wait take memory: no more than are being prepared.
                max_in_flight=given["max_num_seqs"] + NUM_THREADS,
                on_answer=on_answer,
            ),
            counts,
            lambda: len(jobs),
        )


class _Answered:
    """Which jobs a file has answers to.

    Args:
        jobs: of this run.
        columns: of a record.
        id_end: how the ids of all jobs end: with the digests of the question and of the options.
        describe_options: says which options another digest of them stands for.
    """

    def __init__(
        self,
        jobs: Sequence[_ImageJob],
        columns: Sequence[str],
        id_end: str,
        describe_options: Callable[[str], str],
    ) -> None:
        self._jobs = jobs
        self._columns = set(columns)
        self._id_end = id_end
        self._describe_options = describe_options
        self._asked = {(_shown(job.image), job.adapter or "") for job in jobs}
        self._ids: set[str] = set()

    def add(self, number: int, record: Mapping[str, Any], retry_failed: bool) -> bool:
        """Take one answer of the file, and return whether it is an error that will be replaced.

        An answer about an image that is not among the jobs stays in the file.

        Raises:
            InputError: it is of another question or other options, or was not written by this
                command.
        """
        image, answer_id = record.get("image"), str(record.get("id"))
        if not isinstance(image, str) or _ID.fullmatch(answer_id) is None:
            raise InputError(
                f"line {number} of the output was not written by this command, or by another "
                "version of it; give another file"
            )
        self._check_columns(number, record)
        is_asked = (image, record.get("adapter") or "") in self._asked
        if retry_failed and is_asked and record.get("error"):
            return True
        prompt, options = self._id_end[:8], self._id_end[8:]
        if answer_id[16:24] != prompt:
            raise InputError(
                f"line {number} of the output answers another question about {abbreviate(image)}; "
                "give another file to -o"
            )
        if answer_id[24:] != options:
            raise InputError(
                f"line {number} of the output was written {self._describe_options(answer_id[24:])}"
                "; give the same options, or another file to -o"
            )
        self._ids.add(answer_id)
        return False

    def _check_columns(self, number: int, record: Mapping[str, Any]) -> None:
        """Check the keys of a JSON line; RecordFile has checked those of CSV."""
        other = sorted(self._columns.symmetric_difference(record))
        if other:
            names = " and ".join(other)
            has = "has" if other[0] in record else "lacks"
            raise InputError(
                f"line {number} of the output {has} the key {names}: it was written with other "
                "options, such as --adapter NAME=DIR or --boxes; give another file to -o"
            )

    def remaining(self) -> Iterator[_ImageJob]:
        return (job for job in self._jobs if job.id not in self._ids)


class _ImageHandler:
    """Asks the question about one image."""

    def __init__(
        self,
        engine: AsyncLLM,
        threads: ThreadPoolExecutor,
        messages: list[dict[str, Any]],
        question: str,
        params: SamplingParams,
        to_row: Any,
        columns: Sequence[str],
        counts: BatchCounts,
    ) -> None:
        self._engine = engine
        self._threads = threads
        self._messages = messages
        self._question = question
        self._params = params
        self._to_row = to_row
        self._columns = columns
        self._counts = counts

    async def answer(self, job: _ImageJob) -> Answer:
        """Answer one job; whatever fails with its image becomes its answer.

        Raises:
            EngineError: the engine died.
        """
        params = replace(self._params, adapter=job.adapter)
        content = [{"image": job.image}, {"text": self._question}]
        messages = [*self._messages, {"role": "user", "content": content}]
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(
                self._threads, self._engine.llm.prepare, messages, params
            )
            stream = self._engine.stream_prepared(prepared, final_only=True)
            try:
                (completion,) = await stream.completions()
            finally:
                stream.abort()
            answer = self._answer(job, **_fields(completion))
            self._counts.output_tokens += len(completion.token_ids)
        except EngineDeadError:
            raise
        except (InputError, CapacityError, EngineError) as error:
            return self.failure(job, error)
        except Exception as error:
            logger.error("%s failed", job.image, exc_info=error)
            return self._answer(job, error=f"internal error: {type(error).__name__}")
        return answer

    def failure(self, job: _ImageJob, error: Qwen2VLError) -> Answer:
        """Return the answer of a job that failed."""
        return self._answer(job, error=" ".join(str(error).split()))

    def _answer(self, job: _ImageJob, **fields: Any) -> Answer:
        from qwen2vl.server.batch.runner import Answer

        record = dict.fromkeys(self._columns) | {"image": _shown(job.image), "id": job.id}
        known = {"adapter": job.adapter, **fields}
        record |= {name: value for name, value in known.items() if name in record}
        return Answer(row=self._to_row(record), error=record["error"])


def _adapter_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the adapters that stay unmerged; each of them answers."""
    return tuple(parse_lora_modules(filter(is_named_adapter, values)))


def _job_id(image: str, adapter: str | None) -> str:
    """Return the beginning of a job's id."""
    return _digest(os.fsencode(image) + b"\0" + (adapter or "").encode(), 8)


def _digest(content: bytes, size: int) -> str:
    return blake2b(content, digest_size=size).hexdigest()


def _shown(image: str) -> str:
    """Return a file name as the output has it: bytes that are not UTF-8 are escaped."""
    return image.encode("utf-8", "backslashreplace").decode()


def _fields(completion: Completion) -> dict[str, Any]:
    shapes = boxes.parse_shapes(completion.text, completion.items)
    return {
        "answer": boxes.readable_text(completion.text, completion.items),
        "finish_reason": completion.finish_reason,
        "error": completion.error,
        "boxes": [{"phrase": one.phrase, "pixels": one.corners} for one in shapes],
    }
