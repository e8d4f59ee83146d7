"""`qwen2vl pack-text FILE... -o DIR`: pretokenize a text corpus into a memory-mapped folder.

In .jsonl and .ndjson files each row with a `text` is one document; any other file is one document.
The output is read by training as a data source. See `qwen2vl.data.sources.packed_text`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from qwen2vl.cli import options, terminal
from qwen2vl.errors import InputError

__all__ = ["pack_text"]

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


@click.command("pack-text")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder to create.")
@options.model_option
@terminal.debug_option
def pack_text(files: tuple[str, ...], output: str, model: str) -> None:
    """Tokenize FILEs with a model's tokenizer into the folder DIR.

    \b
    qwen2vl pack-text books/*.txt pages.jsonl -o text --model Qwen/Qwen2-VL-2B-Instruct
    qwen2vl train stage2_joint data.sources.7.path=text
    """
    from qwen2vl.data.sources.packed_text import pack_text as pack
    from qwen2vl.loading import load_processor

    tokenizer = load_processor(model).tokenizer
    with terminal.progress_bar() as update:
        packed = pack(_read_documents(files, update), tokenizer, output)
    terminal.echo(
        f"{packed.num_documents:,} documents, {packed.num_tokens:,} tokens, "
        f"{packed.num_bytes:,} bytes in {output}"
    )


def _read_documents(files: Sequence[str], update: Callable[[str, int, int], None]) -> Iterator[str]:
    for number, name in enumerate(files):
        update("packing", number, len(files))
        path = Path(name)
        try:
            if path.suffix not in JSON_LINES_SUFFIXES:
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                for line_number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _parse_row(line, f"{name}:{line_number}")
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from error


def _parse_row(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where} has no "text"; give rows like {{"text": "..."}}')
    return row["text"]
