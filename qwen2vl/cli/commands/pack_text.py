"""`qwen2vl pack-text FILE... -o STORE`: tokenize plain text once, for training to map from disk.

JSON lines with a `text` in each row are documents each; any other file is one document. It must
not know bins. Next room: data/sources/packed_text.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from qwen2vl.cli import options, terminal
from qwen2vl.errors import InputError

__all__ = ["pack_text"]

LINES = (".jsonl", ".ndjson")


@click.command("pack-text")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", required=True, metavar="STORE", help="A folder to be made.")
@options.model_option
@terminal.debug_option
def pack_text(files: tuple[str, ...], output: str, model: str) -> None:
    """Tokenize FILEs by a model's tokenizer into the folder STORE.

    \b
    qwen2vl pack-text books/*.txt pages.jsonl -o text --model Qwen/Qwen2-VL-2B-Instruct
    qwen2vl train stage2_joint data.sources.7.path=text
    """
    from qwen2vl.data.sources.packed_text import pack_text as pack
    from qwen2vl.loading import load_processor

    tokenizer = load_processor(model).tokenizer
    with terminal.progress() as progress:
        packed = pack(_documents(files, progress), tokenizer, output)
    terminal.say(
        f"{packed.documents:,} documents, {packed.tokens:,} tokens, {packed.bytes:,} bytes "
        f"in {output}"
    )


def _documents(files: Sequence[str], progress: Callable[[str, int, int], None]) -> Iterator[str]:
    for number, name in enumerate(files):
        progress("packing", number, len(files))
        path = Path(name)
        try:
            if path.suffix not in LINES:
                yield path.read_text(encoding="utf-8")
                continue
            with path.open(encoding="utf-8") as lines:
                for line_number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text(line, f"{name}:{line_number}")
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}; check the path") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from error


def _text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f'{where} has no "text"; give rows like {{"text": "..."}}')
    return row["text"]
