"""`batch` with a file of requests: the server's state without a listener, and its limits.

What a line may have is what a request to `serve` may have; media beyond data: URLs are refused
unless --allowed-local-media-path or --allowed-media-domains allows them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import options
from qwen2vl.cli.batch.report import BatchReport, LineCounter
from qwen2vl.cli.serve.lora_modules import is_named_adapter, parse_lora_modules
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.server.config import ServerConfig

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.server.batch.requests import BatchInput
    from qwen2vl.server.state import ServerState

__all__ = ["answer_requests"]

# Options that change answers; what a resumed batch must have as before.
DECIDING = ("quantize", "min_pixels", "max_pixels", "max_model_len")


def answer_requests(source: Path, output: Path, given: Mapping[str, Any]) -> int:
    """Answer the requests of a file, and return the exit code.

    Raises:
        Qwen2VLError: a file, an option or the model cannot be used.
        UsageError: --compile with adapters that stay unmerged.
    """
    if output.suffix.lower() == ".csv":
        raise InputError(f"-o {output}: answers to requests are JSON lines; name it .jsonl")
    if output.exists() and source.exists() and os.path.samefile(source, output):
        raise InputError(f"-o {output}: is the file of the requests; give another one")
    adapters = parse_lora_modules(
        (*given["lora_modules"], *filter(is_named_adapter, given["adapters"]))
    )
    merged = [one for one in given["adapters"] if not is_named_adapter(one)]
    if adapters and given["compile"]:
        raise click.UsageError(
            "--compile: adapters with names stay unmerged and cannot be compiled; merge one by "
            "--adapter DIR, or leave --compile out"
        )
    config = _server_config(given, adapters)
    identity = [*config.served_model_names, sorted(adapters), [Path(one).name for one in merged]]
    batch_input = _open_input(source, config, [*identity, *(given[name] for name in DECIDING)])
    report = BatchReport(output, "request")
    counter = LineCounter(source)

    def on_record(number: int, record: dict[str, Any]) -> None:
        batch_input.mark_answered(number, record)
        report.count_done(record)

    with ExitStack() as stack:
        from qwen2vl.server.batch.record_file import RecordFile
        from qwen2vl.server.batch.runner import BatchCounts

        file = stack.enter_context(RecordFile(output, on_record=on_record))
        requests = iter(batch_input)
        first = next(requests, None)
        if first is None:  # without loading the model
            return report.finish(BatchCounts())
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


def _open_input(source: Path, config: ServerConfig, identity: list[Any]) -> BatchInput:
    from qwen2vl.server.batch.requests import BatchInput

    return BatchInput(
        source,
        max_bytes=config.max_body_bytes,
        max_depth=config.max_json_depth,
        options=json.dumps(identity),
    )


def _server_config(given: Mapping[str, Any], adapters: Mapping[str, str]) -> ServerConfig:
    root = given["allowed_local_media_path"]
    return ServerConfig(
        served_model_names=given["served_model_name"] or (_model_name(given["model"]),),
        lora_modules=adapters,
        max_model_len=given["max_model_len"],
        allowed_local_media_path=None if root is None else Path(root),
        allowed_media_domains=given["allowed_media_domains"],
        limit_mm_per_prompt=_media_limits(given["limit_mm_per_prompt"]),
        num_media_workers=given["num_media_workers"],
    )


def _media_limits(text: str | None) -> dict[str, Any]:
    """Parse image=16,video=2, or JSON; ServerConfig validates the values."""
    if text is None:
        return {}
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        pairs = [part.split("=") for part in text.split(",")]
        return {kind.strip(): int(count) for kind, count in pairs}
    except ValueError:
        raise ConfigError(
            f'--limit-mm-per-prompt: got {text}, must be as image=16,video=2 or {{"image": 16}}'
        ) from None


def _model_name(model: str) -> str:
    """Return the name under which a model is served: the name of its folder, not its path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


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

    limits = WorkerLimits(image_seconds=config.media_decode_timeout)
    pool = MediaWorkerPool(config.num_media_workers, limits)
    stack.callback(pool.close)
    prepare_llm(stack.enter_context(loaded.llm), config, LazyDecoder(pool))
    engine = AsyncLLM(loaded.llm)
    stack.callback(engine.close)
    return build_state(engine, config)
