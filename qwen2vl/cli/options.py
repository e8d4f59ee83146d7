"""Click options shared by several commands, and construction of the objects they configure.

The same option has the same meaning in every command. Decorators (`*_options`) add options; the
`*_from_options` functions convert the parsed values to a loaded model, a processor,
`SamplingParams` or a `Grammar`. Engine modules are imported inside these functions, so that --help
does not import torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

import qwen2vl
from qwen2vl.cli import terminal
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, Completion, Grammar, SamplingParams
    from qwen2vl.processor.processor import Processor

__all__ = [
    "NANO_CAPABILITIES",
    "LoadedModel",
    "content_part",
    "grammar_from_options",
    "load_model_from_options",
    "load_processor_from_options",
    "media_preprocessing_options",
    "model_option",
    "model_options",
    "note_ignored_sampling_options",
    "note_truncation",
    "sampling_options",
    "sampling_params_from_options",
    "structured_output_options",
]

F = TypeVar("F", bound=Callable[..., Any])

NANO_CAPABILITIES = (
    "nano reads lines of text, names and finds colored shapes, and follows simple "
    "motion; for photographs use --model Qwen/Qwen2-VL-2B-Instruct (downloads 4.4 GB once)"
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
            metavar="DIR",
            help="LoRA adapter folder (PEFT format), merged into the weights.",
        ),
        click.option(
            "--quantize",
            type=click.Choice(["int8", "int4", "fp8"]),
            help="Quantize the weights at load time; fp8 requires a GPU.",
        ),
        click.option(
            "--compile",
            is_flag=True,
            help="Use torch.compile (experimental): half a minute at startup, then faster prefill "
            "and decode.",
        ),
    )


def media_input_options(command: F) -> F:
    """Add --image and --video."""
    return _add_options(
        command,
        click.option(
            "--image",
            "images",
            multiple=True,
            metavar="PATH",
            help="Image of the prompt; repeatable.",
        ),
        click.option(
            "--video",
            "videos",
            multiple=True,
            metavar="PATH",
            help="Video of the prompt; repeatable.",
        ),
    )


def media_preprocessing_options(command: F) -> F:
    """Add the options of image and video preprocessing: pixel limits and frame sampling."""
    return _add_options(
        command,
        click.option("--min-pixels", type=int, help="Upscale images with fewer pixels than this."),
        click.option("--max-pixels", type=int, help="Downscale images with more pixels than this."),
        click.option("--fps", type=float, help="Frames sampled per second of video."),
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
            metavar="FILE",
            help="Constrain the output to JSON that matches the schema in FILE.",
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
        return qwen2vl.Grammar.json_schema(_read_text(given["json_schema"]))
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
    has_adapter: bool = False

    @property
    def is_nano(self) -> bool:
        """Return whether this is the model included in the package."""
        return self.name == "nano"

    def note_capabilities(self) -> None:
        """Write to stderr what nano can do, unless another model or an adapter was loaded."""
        if self.is_nano and not self.has_adapter:
            terminal.note(NANO_CAPABILITIES)


def load_model_from_options(given: dict[str, Any]) -> LoadedModel:
    """Load the model of the parsed options, with a spinner on a terminal."""
    from qwen2vl.weights import resolve_model

    start = time.perf_counter()
    names = ("device", "dtype", "quantize", "compile", "adapter")
    names += ("min_pixels", "max_pixels", "video_preset")
    # A command without one of these options uses the default of the LLM.
    overrides = {name: given[name] for name in names if name in given}
    folder = resolve_model(given["model"])  # shows its own progress bar for downloads
    with terminal.spinner(f"loading {given['model']}"):
        llm = qwen2vl.LLM(folder, **overrides)
    if llm.compile_seconds is not None:
        terminal.note(f"compiled in {llm.compile_seconds:.0f} s; the next start reuses most of it")
    return LoadedModel(
        llm=llm,
        name=given["model"],
        load_seconds=time.perf_counter() - start,
        has_adapter=bool(given.get("adapter")),
    )


def load_processor_from_options(given: dict[str, Any]) -> Processor:
    """Load the processor of the parsed options, without the model weights."""
    from qwen2vl.loading import load_processor

    return load_processor(
        given["model"],
        min_pixels=given["min_pixels"],
        max_pixels=given["max_pixels"],
        video_preset=given["video_preset"],
    )


def note_ignored_sampling_options(llm: LLM, params: SamplingParams) -> None:
    """Note sampling options without effect because the checkpoint's defaults are greedy."""
    from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams

    resolved = ResolvedSamplingParams.resolve(params, llm.generation_defaults)
    given = {"--top-k": params.top_k, "--top-p": params.top_p, "--seed": params.seed}
    ignored = [option for option, value in given.items() if value is not None]
    if params.temperature and resolved.top_k == 1:
        terminal.note(
            "this checkpoint's default top_k=1 makes sampling greedy; add --top-k 0 --top-p 1"
        )
    elif params.temperature is None and resolved.temperature == 0 and ignored:
        terminal.note(
            f"this checkpoint uses greedy decoding: {', '.join(ignored)} without effect; add "
            "--temperature 1 to sample"
        )


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
    terminal.note(f"the answer was cut after {count:,} tokens{why}")


def content_part(kind: Literal["image", "video"], path: str, fps: float | None) -> dict[str, Any]:
    """Build the content part of one image or video of a message."""
    rate = {"fps": fps} if kind == "video" and fps is not None else {}
    return {"type": kind, kind: path, **rate}


def _add_options(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
