"""`qwen2vl quantize SRC DST`: write a model folder again in small integers.

DST opens like any other folder, without a flag. For int4 the weights are rounded with an eye on
examples: conversations of the procedural world, or of a file. It must not know how rounding works.
Next room: convert.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import terminal
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.processor.inputs import ModelInput
    from qwen2vl.processor.processor import Processor
    from qwen2vl.quantization.scheme import Mode

__all__ = ["quantize"]

SEED = 20240918
QUESTIONS = 3  # about one picture, at most

# Families of the world that need no font.
WITHOUT_LETTERS = ("shapes", "grounding", "motion", "text_only")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--to", "mode", type=click.Choice(["int8", "int4"]), default="int4", show_default=True
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Conversations that int4 is calibrated on; 0 rounds to the nearest.",
)
@click.option(
    "--prompts",
    metavar="JSONL",
    help="Take them from a file, a list of messages a line, instead of drawing them.",
)
@terminal.debug_option
def quantize(source: str, target: str, mode: Mode, examples: int, prompts: str | None) -> None:
    """Write the model of SRC to DST in small integers.

    \b
    qwen2vl quantize Qwen/Qwen2-VL-2B-Instruct 2b-int4
    qwen2vl ask --model 2b-int4 --image receipt.png "What is the total?"
    """
    if prompts and mode == "int8":
        raise click.UsageError("--prompts calibrates int4 only; leave it out for int8")
    # Imported here: torch takes a second, and a misspelled option should not cost that.
    from qwen2vl.convert import quantize_folder
    from qwen2vl.loading import load_processor
    from qwen2vl.weights import check_target, find

    folder = find(source)
    check_target(target)
    shown: list[ModelInput] = []
    if mode == "int4" and examples:
        processor = load_processor(folder)
        shown = list(
            _given(processor, prompts, examples) if prompts else _drawn(processor, examples)
        )
    with terminal.progress() as step:
        packing = quantize_folder(folder, target, mode, examples=shown, on_layer=step)
    terminal.say(f"model: {target} ({_size(Path(target))}; {source} has {_size(folder)})")
    per = "each output" if packing.group_size < 0 else f"{packing.group_size} inputs"
    terminal.say(
        f"the decoder has {packing.bits} bits, a scale for {per} ({packing.method.upper()}); head "
        "and vision tower are rounded to 8 bits as they are read"
    )
    if mode == "int4":
        terminal.say(f"calibrated on {len(shown)} conversations" if shown else "not calibrated")
    terminal.say(f"try:   qwen2vl ask --model {target} --image PICTURE QUESTION")


def _examples(processor: Processor, prompts: str | None, count: int) -> Iterator[ModelInput]:
    return _given(processor, prompts, count) if prompts else _drawn(processor, count)


def _drawn(processor: Processor, count: int) -> Iterator[ModelInput]:
    """Make up conversations about drawn pictures, with their answers."""
    from qwen2vl.synth import Mixture, render, sample
    from qwen2vl.synth.fonts import FontError
    from qwen2vl.synth.world import check_fonts

    mixture = Mixture(questions=QUESTIONS)
    try:
        check_fonts(mixture)
    except FontError:
        mixture = replace(mixture, weights=dict.fromkeys(WITHOUT_LETTERS, 1.0))
        terminal.note("no fonts to write with: calibrating on pictures without letters")
    for index in range(count):
        example = render(sample(SEED, index, mixture))
        yield processor(example.messages, add_generation_prompt=False)


def _given(processor: Processor, path: str, count: int) -> Iterator[ModelInput]:
    """Read conversations from a file.

    Raises:
        InputError: the file or a line of it cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read: {_reason(error)}") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise InputError(f"--prompts {path}: holds no conversation")
    for number, line in filled[:count]:
        try:
            yield processor(_messages(line), add_generation_prompt=False)
        except InputError as error:
            raise InputError(f"--prompts {path}, line {number}: {error}") from error


def _messages(line: str) -> Any:
    """Read a list of messages, or an object that has one; the processor looks at what it is."""
    try:
        found = json.loads(line)
    except ValueError:
        raise InputError("not JSON") from None
    return found["messages"] if isinstance(found, dict) and "messages" in found else found


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or "not UTF-8 text"


def _size(folder: Path) -> str:
    return terminal.person_bytes(sum(p.stat().st_size for p in folder.glob("*.safetensors")))
