"""`qwen2vl batch`: answer a file of requests, or one question about many images, into a file.

Requests are JSON lines in OpenAI's batch form, in place of `vllm run-batch`, whose option names
hold. Answers are appended as they are finished; after any end, kill -9 included, the same command
continues where it stopped. The exit code is 1 if any answer is an error. Parts: cli/batch/.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qwen2vl.cli import options, terminal
from qwen2vl.cli.batch.image_batch import answer_images
from qwen2vl.cli.batch.request_batch import answer_requests
from qwen2vl.cli.serve.server_options import (
    DEFAULTS,
    list_option,
    local_media_option,
    max_model_len_option,
    max_num_seqs_option,
    max_pixels_option,
    media_domains_option,
    media_limits_option,
    min_pixels_option,
)

__all__ = ["batch"]

# Options that hold for one of the two inputs only.
OF_IMAGES = (
    *("system", "max_tokens", "temperature", "top_k", "top_p", "seed"),
    *("json_schema", "regex", "choice", "boxes"),
)
OF_REQUESTS = (
    *("input_file", "served_model_name", "lora_modules", "allowed_local_media_path"),
    *("allowed_media_domains", "limit_mm_per_prompt", "num_media_workers"),
)


@click.command()
@click.argument("arguments", metavar="[REQUESTS | QUESTION]", nargs=-1)
@click.option(
    "-i", "--input-file", metavar="FILE", help="Requests as JSON lines; the same as REQUESTS."
)
@click.option(
    "-o",
    "--output-file",
    metavar="FILE",
    required=True,
    help="Answers: .jsonl, or .csv with --images. A file of the same command is continued.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="DIR_OR_PATTERN",
    help="Images that QUESTION is asked about: a folder with its subfolders, a pattern, or a file; "
    "repeatable.",
)
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Repeat what has an error in the file of answers, from which the errors are removed.",
)
@options.system_option
@options.model_options
@list_option(
    "--served-model-name",
    "NAME",
    "Model name in the requests, in place of the repo id or the folder's name; repeatable.",
)
@click.option(
    "--lora-modules",
    multiple=True,
    metavar="NAME=DIR",
    help="LoRA adapter, which requests name as their model; repeatable. The same as --adapter.",
)
@max_model_len_option
@max_num_seqs_option
@options.sampling_options
@options.structured_output_options
@min_pixels_option
@max_pixels_option
@media_limits_option
@local_media_option
@media_domains_option
@click.option(
    "--num-media-workers",
    default=DEFAULTS.num_media_workers,
    show_default=True,
    help="Processes that decode images and videos of requests.",
)
@terminal.debug_option
@click.pass_context
def batch(
    context: click.Context,
    arguments: tuple[str, ...],
    input_file: str | None,
    output_file: str,
    images: tuple[str, ...],
    system: str | None,
    **given: Any,
) -> None:
    """Answer the REQUESTS of a file, or QUESTION about each of many images, into a file.

    \b
    qwen2vl batch requests.jsonl -o answers.jsonl
    qwen2vl batch --images photos "What is the total?" -o totals.csv
    qwen2vl batch --images "scans/*.png" --choice yes --choice no "Is it signed?" -o signed.jsonl
    """
    output = Path(os.path.expanduser(output_file))
    if images:
        _refuse_options(context, OF_REQUESTS, "--images QUESTION has none: it is for requests")
        files, question = _split_question(arguments)
        context.exit(answer_images((*images, *files), question, output, system, given))
    _refuse_options(context, OF_IMAGES, "each request has its own; it is for --images")
    source = _input_file(arguments, input_file)
    context.exit(answer_requests(source, output, given))


def _refuse_options(context: click.Context, names: Sequence[str], why: str) -> None:
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')}: {why}")


def _split_question(arguments: Sequence[str]) -> tuple[Sequence[str], str]:
    """Return further images, which a shell has made of a pattern, and the question."""
    if not arguments or not arguments[-1].strip():
        raise click.UsageError("QUESTION is missing; give a text after --images")
    *files, question = arguments
    if os.path.exists(question):
        raise click.UsageError(
            f"{question}: is a file, but the last argument is QUESTION; give a text"
        )
    missing = next((one for one in files if not os.path.exists(one)), None)
    if missing is not None:
        raise click.UsageError(
            f"got the texts {missing!r} and {question!r}, must be one; quote the question"
        )
    return files, question


def _input_file(arguments: Sequence[str], input_file: str | None) -> Path:
    sources = [*arguments, *([] if input_file is None else [input_file])]
    if len(sources) != 1:
        got = ", ".join(map(repr, sources)) or "none"
        raise click.UsageError(
            f"REQUESTS: got {got}, must be one file; --images asks a QUESTION about images"
        )
    return Path(os.path.expanduser(sources[0]))
