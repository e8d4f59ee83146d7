"""Click options shared by several commands, and construction of the objects they configure.

The same option has the same meaning in every command. Decorators (`*_options`) add options; the
`*_from_options` functions convert the parsed values to a loaded model, a processor,
`SamplingParams` or a `Grammar`. Engine modules are imported inside these functions, so that --help
does not import torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

import qwen2vl
from qwen2vl import threads
from qwen2vl.cli import terminal
from qwen2vl.cli.media_arguments import MediaFile, MediaOption
from qwen2vl.cli.video.options import video_options
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, Completion, Grammar, SamplingParams
    from qwen2vl.processor.processor import Processor

__all__ = [
    "NANO_CAPABILITIES",
    "LoadedModel",
    "check_unnamed_adapter",
    "grammar_from_options",
    "load_model_from_options",
    "load_processor_from_options",
    "media_input_options",
    "media_preprocessing_options",
    "model_option",
    "model_options",
    "note_ineffective_media_options",
    "note_truncation",
    "sampling_options",
    "sampling_params_from_options",
    "structured_output_options",
    "system_option",
]

ADAPTER_NAME = re.compile(r"([\w.-]+)=(.+)")
PREPROCESSING = ("min_pixels", "max_pixels", "video_preset")  # that `load_processor` takes
GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)

F = TypeVar("F", bound=Callable[..., Any])

NANO_CAPABILITIES = (
    "nano reads lines of text, names and finds colored shapes, and follows simple "
    "motion; for anything else use --model Qwen/Qwen2-VL-2B-Instruct (downloads 4.4 GB once)"
)


def model_option(command: F) -> F:
    """Add --model."""
    return click.option(
        "--model",
        default="nano",
        show_default=True,
        metavar="DIR_OR_REPO",
        help="Model folder, Hugging Face repo id, or nano (included in the package).",
    )(command)


def model_options(command: F) -> F:
    """Add --model and the options of loading: device, dtype, adapter, quantization, compilation."""
    return _add_options(
        command,
        model_option,
        click.option(
            "--device",
            default="auto",
            show_default=True,
            help="Device: cpu, cuda, cuda:1, ...; auto: cuda if available.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            show_default=True,
            help="Data type of the weights; auto: by device and available memory.",
        ),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="[NAME=]DIR",
            help="LoRA adapter folder (PEFT format), merged into the weights. With a name it stays "
            "unmerged, and the option is repeatable.",
        ),
        click.option(
            "--quantize",
            type=click.Choice(["int8", "int4", "fp8"]),
            help="Quantize the weights at load time; fp8 requires a GPU.",
        ),
        click.option(
            "--kv-cache-dtype",
            type=click.Choice(["auto", "int8"]),
            default="auto",
            show_default=True,
            help="Data type of the KV cache; auto: that of the model. int8 is for the CPU.",
        ),
        click.option(
            "--compile",
            is_flag=True,
            help="Use torch.compile (experimental): half a minute at startup, then faster prefill "
            "and decode.",
        ),
    )


def media_input_options(command: F) -> F:
    """Add --image and --video; media_arguments.py returns their values in order."""
    return _add_options(
        command,
        click.option(
            "--image",
            multiple=True,
            metavar="PATH",
            cls=MediaOption,
            expose_value=False,
            help="Image of the prompt: path, pattern, URL, or - for stdin; repeatable.",
        ),
        click.option(
            "--video",
            multiple=True,
            metavar="PATH",
            cls=MediaOption,
            expose_value=False,
            help="Video of the prompt, in the same way; repeatable.",
        ),
    )


def system_option(command: F) -> F:
    """Add --system."""
    return click.option(
        "--system", metavar="TEXT", help="System prompt, in place of the model's default."
    )(command)


def media_preprocessing_options(command: F) -> F:
    """Add the options of image and video preprocessing: pixel limits and frames."""
    return _add_options(
        command,
        click.option("--min-pixels", type=int, help="Upscale images with fewer pixels than this."),
        click.option("--max-pixels", type=int, help="Downscale images with more pixels than this."),
        video_options,
        click.option(
            "--video-preset",
            type=click.Choice(["paper", "qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"]),
            default="paper",
            show_default=True,
            help="Rules of frame sampling and resizing: the paper's, or a qwen-vl-utils release's.",
        ),
    )


def sampling_options(command: F) -> F:
    """Add the sampling options; defaults are those of the checkpoint's generation_config.json."""
    return _add_options(
        command,
        click.option(
            "--max-tokens",
            type=int,
            default=512,
            show_default=True,
            help="Maximum number of output tokens.",
        ),
        click.option("--temperature", type=float, help="Sampling temperature; 0: greedy decoding."),
        click.option("--top-k", type=int, help="Sample from the K likeliest tokens; 0: from all."),
        click.option(
            "--top-p",
            type=float,
            help="Nucleus sampling: sample from the likeliest tokens of this total probability.",
        ),
        click.option(
            "--seed", type=int, help="Random seed of the sampling, for a reproducible output."
        ),
    )


def sampling_params_from_options(given: dict[str, Any]) -> SamplingParams:
    """Build `SamplingParams` from the parsed sampling options."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    return qwen2vl.SamplingParams(**{name: given[name] for name in names})


def structured_output_options(command: F) -> F:
    """Add the options of structured output (constrained decoding); they are mutually exclusive."""
    return _add_options(
        command,
        click.option(
            "--json-schema",
            metavar="FILE_OR_JSON",
            help="Constrain the output to JSON that matches a schema: a file, or {...} itself.",
        ),
        click.option(
            "--regex", metavar="PATTERN", help="Constrain the output to a full match of PATTERN."
        ),
        click.option(
            "--choice",
            multiple=True,
            metavar="TEXT",
            help="Constrain the output to one of the given texts; repeatable.",
        ),
        click.option(
            "--boxes",
            is_flag=True,
            help="Constrain the output to bounding boxes and their phrases.",
        ),
    )


def grammar_from_options(given: dict[str, Any]) -> Grammar | None:
    """Build the grammar of the structured output options; None if none is given."""
    constraints = [name for name in ("json_schema", "regex", "choice", "boxes") if given[name]]
    if not constraints:
        return None
    if len(constraints) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in constraints)
        raise click.UsageError(f"{flags} are mutually exclusive; give one of them")
    if given["json_schema"]:
        schema = given["json_schema"]
        is_inline = schema.lstrip().startswith("{")
        return qwen2vl.Grammar.json_schema(schema if is_inline else _read_text(schema))
    if len(given["choice"]) == 1 and "," in (text := given["choice"][0]):
        repeated = " ".join(f"--choice {part.strip()}" for part in text.split(","))
        terminal.note(f"--choice {text!r} is one choice; for several, repeat it: {repeated}")
    if given["regex"]:
        return qwen2vl.Grammar.regex(given["regex"])
    return qwen2vl.Grammar.choice(given["choice"]) if given["choice"] else qwen2vl.Grammar.boxes()


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded LLM, its name, and the load time in seconds."""

    llm: LLM
    name: str
    load_seconds: float
    adapter_names: tuple[str, ...] = ()  # of adapters that stay unmerged, in the order given
    is_default: bool = False  # nano, because no model was named, and without an adapter


def load_model_from_options(
    given: dict[str, Any], *, adapters: Mapping[str, str] | None = None, **llm_arguments: Any
) -> LoadedModel:
    """Load the model of the options, with a spinner; `adapters` (name -> folder) stay unmerged."""
    from qwen2vl.weights import resolve_model

    start = time.perf_counter()
    # A command without one of these options uses the default of the LLM.
    names = ("device", "dtype", "quantize", "kv_cache_dtype", "compile", *PREPROCESSING)
    overrides = {name: given[name] for name in names if name in given}
    merged, named = _split_adapters(given.get("adapters", ()), bool(given.get("compile")))
    named |= adapters or {}
    folder = resolve_model(given["model"])  # shows its own progress bar for downloads
    with terminal.spinner(f"loading {given['model']}"):
        llm = qwen2vl.LLM(folder, adapter=merged, adapters=named, **overrides, **llm_arguments)
        _choose_num_threads(llm)
    if llm.compile_seconds is not None:
        terminal.note(f"compiled in {llm.compile_seconds:.0f} s; the next start reuses most of it")
    return LoadedModel(
        llm=llm,
        name=given["model"],
        load_seconds=time.perf_counter() - start,
        adapter_names=tuple(named),
        is_default=not (_is_given("model") or merged or named),
    )


def _choose_num_threads(llm: LLM) -> None:
    """Set the number of CPU threads at which a decode step is fastest; prefill takes all CPUs."""
    import torch

    if llm.device.type != "cpu" or threads.is_num_threads_given():
        return
    params = qwen2vl.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    count = threads.measure_num_threads(
        lambda: llm.generate("\n", params), max_seconds=0.1, slow_seconds=0.03
    )
    threads.set_num_threads_batch(threads.default_num_threads())
    torch.set_num_threads(count)
    llm.reset_caches()


def check_unnamed_adapter(given: dict[str, Any]) -> None:
    """Check that at most one adapter was given, to be merged, to a command that selects none.

    Raises:
        UsageError: there are several, or one has a name.
    """
    _, named = _split_adapters(given["adapters"], is_compiled=False)
    if named:
        raise click.UsageError(
            f"--adapter {next(iter(named))}=...: this command uses one adapter, which is merged; "
            "give it without a name: --adapter DIR"
        )


def _split_adapters(values: Sequence[str], is_compiled: bool) -> tuple[str | None, dict[str, str]]:
    """Return the adapter to merge, or those to keep unmerged by name.

    Raises:
        UsageError: several adapters without names, a name twice, or names with --compile.
    """
    named: dict[str, str] = {}
    unnamed: list[str] = []
    for value in values:
        match = ADAPTER_NAME.fullmatch(value)
        if match is None or Path(value).exists():  # a folder may have = in its name
            unnamed.append(value)
        elif match[1] in named:
            raise click.UsageError(f"--adapter {value}: the name {match[1]} is given twice")
        else:
            named[match[1]] = match[2]
    if unnamed and len(values) > 1:
        raise click.UsageError(
            f"--adapter {unnamed[0]}: one of several adapters needs a name: "
            f"--adapter NAME={unnamed[0]}"
        )
    if named and is_compiled:
        raise click.UsageError(
            "--compile: adapters with names stay unmerged and cannot be compiled; give one without "
            "a name, which is merged: --adapter DIR"
        )
    return (unnamed[0] if unnamed else None), named


def load_processor_from_options(given: dict[str, Any]) -> Processor:
    """Load the processor of the parsed options, without the model weights."""
    from qwen2vl.loading import load_processor

    return load_processor(given["model"], **{name: given[name] for name in PREPROCESSING})


def note_ineffective_media_options(files: Sequence[MediaFile]) -> None:
    """Note the options of preprocessing that nothing in the prompt responds to."""
    kinds = {file.kind for file in files}
    unused = ["fps"] if "video" not in kinds else []
    unused += [] if kinds else PREPROCESSING
    for name in filter(_is_given, unused):
        what = "a video" if name == "fps" else "an image or video"
        terminal.note(f"--{name.replace('_', '-')} has no effect without {what}")


def note_truncation(llm: LLM, params: SamplingParams, completion: Completion) -> None:
    """Note that the output was truncated, and by which limit: max_tokens or the context length."""
    if completion.finish_reason != "length":
        return
    count = len(completion.token_ids)
    why = (
        "; --max-tokens allows more"
        if count == params.max_tokens
        else f", where the context of {llm.max_model_len:,} is full; show or ask less at once"
    )
    terminal.note(f"the answer was cut after {count:,} token{'s' * (count != 1)}{why}")


def _is_given(name: str) -> bool:
    """Return whether an option of the running command was given on the command line."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) in GIVEN


def _add_options(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
