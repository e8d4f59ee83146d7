"""`qwen2vl quantize SRC DST`: quantize a model folder to int8 or int4 (compressed-tensors).

DST loads like any other model folder, without an option. int4 weights are calibrated (GPTQ) on
conversations: synthetic ones, or those of a file. See `qwen2vl.convert`.
"""

from __future__ import annotations

import json
import time
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
    from qwen2vl.quantization.scheme import CpuQuantizationMode
    from qwen2vl.weights import QuantizationConfig

__all__ = ["quantize"]

SEED = 20240918
MAX_QUESTIONS = 3  # about one image


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", required=False)
@click.option("-o", "--output", metavar="DST", help="The same as the argument DST.")
@click.option(
    "--weight-format",
    type=click.Choice(["int8", "int4"]),
    default="int4",
    show_default=True,
    help="int8: per output channel; int4: in groups, calibrated.",
)
@click.option(
    "--num-calibration-samples",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Conversations for the calibration of int4; 0: round to nearest (RTN).",
)
@click.option(
    "--calibration-data",
    metavar="JSONL",
    help="Calibrate on this file, a list of messages per line; default: synthetic data.",
)
@terminal.debug_option
def quantize(
    source: str,
    target: str | None,
    output: str | None,
    weight_format: CpuQuantizationMode,
    num_calibration_samples: int,
    calibration_data: str | None,
) -> None:
    """Quantize the model SRC and write it to the folder DST.

    \b
    qwen2vl quantize Qwen/Qwen2-VL-2B-Instruct 2b-int4
    qwen2vl ask --model 2b-int4 --image receipt.png "What is the total?"
    """
    if (target is None) == (output is None):
        raise click.UsageError("give the folder to write once: as DST or by -o DST")
    target = target or output or ""
    if calibration_data and weight_format == "int8":
        raise click.UsageError("--calibration-data is for int4 only; leave it out for int8")
    # Imported here, so that usage errors do not wait for the import of torch.
    from qwen2vl.convert import quantize_folder
    from qwen2vl.loading import load_processor
    from qwen2vl.weights import check_output_folder, resolve_model

    folder = resolve_model(source)
    check_output_folder(target)
    samples: list[ModelInput] = []
    if weight_format == "int4" and num_calibration_samples:
        processor = load_processor(folder)
        samples = list(_calibration_samples(processor, calibration_data, num_calibration_samples))
    start = time.monotonic()
    with terminal.progress_bar() as update:
        quantization_config = quantize_folder(
            folder, target, weight_format, examples=samples, on_progress=update
        )
    seconds = terminal.format_duration(time.monotonic() - start)
    sizes = _format_folder_size(Path(target)), _format_folder_size(folder)
    terminal.echo(f"model: {target} ({sizes[0]}; {source} has {sizes[1]}), written in {seconds}")
    _print_layers(quantization_config, len(samples))
    terminal.echo(f"try:   qwen2vl ask --model {target} --image IMAGE QUESTION")


def _print_layers(config: QuantizationConfig, num_samples: int) -> None:
    decoder = config.formats[0]
    scales = f"group size {decoder.group_size}"
    if decoder.group_size < 0:
        scales = "one scale per output channel"
    rounding = "rounded to nearest (RTN)"
    if num_samples:
        rounding = f"calibrated by GPTQ on {num_samples} conversations"
    terminal.echo(f"decoder: {decoder.bits} bits, {scales}, {rounding}")
    terminal.echo("vision tower: 8 bits, one scale per output channel, rounded to nearest (RTN)")
    terminal.echo("lm_head: stored unquantized, quantized to 8 bits at load time")
    terminal.echo(f"format: {config.method} ({config.to_dict()['format']})")


def _calibration_samples(
    processor: Processor, path: str | None, count: int
) -> Iterator[ModelInput]:
    if path:
        return _conversations_from_file(processor, path, count)
    return _synthetic_conversations(processor, count)


def _synthetic_conversations(processor: Processor, count: int) -> Iterator[ModelInput]:
    """Sample synthetic conversations about images, with their answers."""
    from qwen2vl.synth import Mixture, render, sample
    from qwen2vl.synth.fonts import FontError
    from qwen2vl.synth.world import check_resources

    mixture = Mixture(max_questions=MAX_QUESTIONS)
    try:
        check_resources(mixture)
    except FontError:
        mixture = replace(mixture, fonts="bundled")
        terminal.note(
            "fonts of the training data are not installed: calibrating on text in the fonts of "
            "this package"
        )
    for index in range(count):
        example = render(sample(SEED, index, mixture))
        yield processor(example.messages, add_generation_prompt=False)


def _conversations_from_file(processor: Processor, path: str, count: int) -> Iterator[ModelInput]:
    """Read conversations from a file.

    Raises:
        InputError: the file or a line of it is invalid.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--calibration-data {path}: cannot be read: {_reason(error)}") from None
    non_empty = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not non_empty:
        raise InputError(f"--calibration-data {path}: holds no conversation")
    for number, line in non_empty[:count]:
        try:
            yield processor(_messages(line), add_generation_prompt=False)
        except InputError as error:
            raise InputError(f"--calibration-data {path}, line {number}: {error}") from error


def _messages(line: str) -> Any:
    """Parse a list of messages, or an object with the key `messages`, without validation."""
    try:
        parsed = json.loads(line)
    except ValueError:
        raise InputError("not JSON") from None
    return parsed["messages"] if isinstance(parsed, dict) and "messages" in parsed else parsed


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or "not UTF-8 text"


def _format_folder_size(folder: Path) -> str:
    return terminal.format_bytes(sum(p.stat().st_size for p in folder.glob("*.safetensors")))
