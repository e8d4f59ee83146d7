"""`batch --images`: one question about each image of a folder or pattern.

    image -> LLM.prepare (a thread) -> AsyncLLM -> {"image", "answer", "finish_reason", "error"}

The images are the user's own files and are decoded in this process; one that cannot be read has an
error for its answer. The id is a digest of the image's name and of everything that decides the
answer (identity.py), by which a batch is resumed and answers of another question are recognized.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import boxes, options
from qwen2vl.cli.batch.identity import batch_identity
from qwen2vl.cli.batch.report import BatchReport
from qwen2vl.cli.media_arguments import IMAGE_SUFFIXES, natural_key
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

__all__ = ["answer_images", "list_images"]

logger = logging.getLogger(__name__)

COLUMNS = ("image", "answer", "finish_reason", "error")
NUM_THREADS = 4  # that read, decode and resize images


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
    suffix = output.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise InputError(f"-o {output}: give a name that ends in .jsonl or .csv")
    images = list_images(sources)
    grammar = options.grammar_from_options(given)
    params = replace(options.sampling_params_from_options(given), grammar=grammar)
    adapters = _adapter_names(given["adapters"])
    identity = batch_identity(given, question=question, system=system)
    key = blake2b(identity.encode("utf-8", "backslashreplace"), digest_size=16).digest()
    jobs = [
        _ImageJob(image=image, adapter=adapter, id=_job_id(image, adapter, key))
        for image in images
        for adapter in adapters or (None,)
    ]
    columns = (*COLUMNS, *(("adapter",) if adapters else ()), *(("boxes",) * given["boxes"]), "id")
    answered = _Answered(jobs)
    report = BatchReport(output, "image" if len(adapters) < 2 else "question")

    failed: set[int] = set()  # records of the output that are to be repeated

    def on_record(number: int, record: dict[str, Any]) -> None:
        is_repeated = answered.add(number, record, given["retry_failed"])
        if is_repeated:
            failed.add(number)
        else:
            report.count_done(record)

    with ExitStack() as stack:
        from qwen2vl.server.batch.record_file import RecordFile
        from qwen2vl.server.batch.runner import BatchCounts, run_jobs

        file = stack.enter_context(
            RecordFile(
                output,
                row_start=b'{"image": ',
                columns=columns if suffix == ".csv" else (),
                on_record=on_record,
            )
        )
        if failed:
            file.remove(failed)
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
    """Which jobs a file has answers to."""

    def __init__(self, jobs: Sequence[_ImageJob]) -> None:
        self._jobs = jobs
        self._shown = {(_shown(job.image), job.adapter or ""): job.id for job in jobs}
        self._ids: set[str] = set()

    def add(self, number: int, record: Mapping[str, Any], retry_failed: bool) -> bool:
        """Take one answer of the file, and return whether it is an error that will be replaced.

        An answer about an image that is not among the jobs stays in the file.

        Raises:
            InputError: it is of another question, or was not written by this command.
        """
        image, answer_id = record.get("image"), record.get("id")
        if not isinstance(image, str) or not isinstance(answer_id, str):
            raise InputError(
                f"line {number} of the output was not written by this command; give another file"
            )
        expected = self._shown.get((image, record.get("adapter") or ""))
        if expected not in (None, answer_id):
            raise InputError(
                f"line {number} of the output answers another question about {abbreviate(image)}, "
                "or one of another model or other options; give another file to -o"
            )
        if retry_failed and expected is not None and record.get("error"):
            return True
        self._ids.add(answer_id)
        return False

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
        return Answer(row=self._to_row(record), is_failed=record["error"] is not None)


def list_images(sources: Sequence[str]) -> list[str]:
    """Return the images of folders (with subfolders, by extension), patterns and paths, sorted.

    Numbers in names are compared as numbers. Hidden files of a folder are left out.

    Raises:
        InputError: a source has no image.
    """
    found: dict[str, None] = {}
    for source in sources:
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            names = sorted(_walk(path), key=natural_key)
            what = f"the folder has no image ({', '.join(IMAGE_SUFFIXES)})"
        elif os.path.lexists(path):
            names, what = [path], ""
        elif glob.has_magic(path):
            matches = glob.glob(path, recursive=True)
            names = sorted((one for one in matches if os.path.isfile(one)), key=natural_key)
            what = "no file matches this pattern; check the folder and name"
        else:
            names, what = [], "does not exist; give a folder, a pattern or an image"
        if not names:
            raise InputError(f"--images {source}: {what}")
        found.update(dict.fromkeys(names))
    return list(found)


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def _adapter_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the adapters that stay unmerged; each of them answers."""
    return tuple(parse_lora_modules(filter(is_named_adapter, values)))


def _job_id(image: str, adapter: str | None, key: bytes) -> str:
    text = os.fsencode(image) + b"\0" + (adapter or "").encode()
    return blake2b(text, digest_size=8, key=key).hexdigest()


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
