"""`batch` with a file of requests: the server's state without a listener, and its limits.

What a line may have is what a request to `serve` may have; media beyond data: URLs are refused
unless --allowed-local-media-path or --allowed-media-domains allows them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import options
from qwen2vl.cli.batch.answers import check_is_file, open_answers
from qwen2vl.cli.batch.identity import BatchIdentity, batch_identity
from qwen2vl.cli.batch.report import BatchReport, LineCounter
from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules
from qwen2vl.cli.serve.option_names import errors_name_options
from qwen2vl.cli.serve.server_options import parse_media_limits, served_model_name
from qwen2vl.errors import InputError
from qwen2vl.server.config import ServerConfig

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.server.batch.requests import BatchInput
    from qwen2vl.server.state import ServerState

__all__ = ["answer_requests"]

# For a media worker to become free: nobody waits for one answer, and all requests come at once.
WAIT_SECONDS = 7 * 86_400.0


def answer_requests(source: Path, output: Path, given: Mapping[str, Any]) -> int:
    """Answer the requests of a file, and return the exit code.

    Raises:
        Qwen2VLError: a file, an option or the model cannot be used.
        UsageError: --compile with adapters that stay unmerged.
    """
    check_is_file(source, "-i")
    check_is_file(output, "-o")
    if output.suffix.lower() == ".csv":
        raise InputError(f"-o {output}: answers to requests are JSON lines; name it .jsonl")
    if output.exists() and source.exists() and os.path.samefile(source, output):
        raise InputError(f"-o {output}: is the file of the requests; give another one")
    context = click.get_current_context()
    with errors_name_options(context):
        adapters = parse_lora_modules(
            (*given["lora_modules"], *filter(is_named_adapter, given["adapters"]))
        )
        config = _server_config(given, adapters)
        identity = batch_identity(given, context.command)
    merged = [one for one in given["adapters"] if not is_named_adapter(one)]
    if adapters and given["compile"]:
        raise click.UsageError(
            "--compile: adapters with names stay unmerged and cannot be compiled; merge one by "
            "--adapter DIR, or leave --compile out"
        )
    batch_input = _open_input(source, config, identity)
    report = BatchReport(output, "request")
    counter = LineCounter(source)

    def is_repeated(number: int, record: dict[str, Any]) -> bool:
        is_repeated = given["retry_failed"] and bool(record.get("error"))
        batch_input.mark_answered(number, record, is_repeated=is_repeated)
        return is_repeated

    with ExitStack() as stack:
        from qwen2vl.server.batch.runner import BatchCounts

        file = open_answers(
            stack,
            report,
            row_start=b'{"id": "batch_req_',
            is_repeated=is_repeated,
            before_removal=batch_input.check,
        )
        requests = iter(batch_input)
        first = next(requests, None)
        if first is None:  # without loading the model
            return report.finish(BatchCounts())
        with errors_name_options(context):
            loaded = options.load_model_from_options(
                {**given, "adapters": merged},
                adapters=adapters,
                max_model_len=config.max_model_len,
                engine=_engine_config(given),
            )
        from qwen2vl.server.batch.operations import run_requests

        state = _build_state(loaded, config, stack)
        counts = BatchCounts()
        return report.run(
            lambda on_answer: run_requests(
                state, chain([first], requests), file, counts, on_answer=on_answer
            ),
            counts,
            lambda: counter.count,
        )


def _open_input(source: Path, config: ServerConfig, identity: BatchIdentity) -> BatchInput:
    from qwen2vl.server.batch.requests import BatchInput

    return BatchInput(
        source,
        max_bytes=config.max_body_bytes,
        max_depth=config.max_json_depth,
        options=identity.digest,
        describe_options=identity.describe,
    )


def _server_config(given: Mapping[str, Any], adapters: Mapping[str, str]) -> ServerConfig:
    root = given["allowed_local_media_path"]
    return ServerConfig(
        served_model_names=given["served_model_name"] or (served_model_name(given["model"]),),
        lora_modules=adapters,
        max_model_len=given["max_model_len"],
        allowed_local_media_path=None if root is None else Path(root),
        allowed_media_domains=given["allowed_media_domains"],
        limit_mm_per_prompt=parse_media_limits(given["limit_mm_per_prompt"]),
        num_media_workers=given["num_media_workers"],
    )


def _engine_config(given: Mapping[str, Any]) -> Any:
    from qwen2vl.engine import EngineConfig

    return EngineConfig(max_num_seqs=given["max_num_seqs"])


def _build_state(loaded: LoadedModel, config: ServerConfig, stack: ExitStack) -> ServerState:
    """Build the state of a server that does not listen; `stack` ends its threads and processes."""
    from qwen2vl.engine import AsyncLLM
    from qwen2vl.processor.media_worker.pool import MediaWorkerPool
    from qwen2vl.processor.media_worker.worker_process import WorkerLimits
    from qwen2vl.server.batch.operations import LazyDecoder
    from qwen2vl.server.launch import build_state, prepare_llm

    limits = WorkerLimits(image_seconds=config.media_decode_timeout, wait_seconds=WAIT_SECONDS)
    pool = MediaWorkerPool(config.num_media_workers, limits)
    stack.callback(pool.close)
    prepare_llm(stack.enter_context(loaded.llm), config, LazyDecoder(pool))
    engine = AsyncLLM(loaded.llm)
    stack.callback(engine.close)
    return build_state(engine, config)
