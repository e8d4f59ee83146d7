"""Options that several commands share, and the model that they open.

A flag means the same wherever it stands. Models are imported inside the functions, so that the
help of any command stays instant. It must not know any command. Next room: ask.py.
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
    "NANO_LINE",
    "Opened",
    "form",
    "form_options",
    "media_options",
    "media_part",
    "model_option",
    "model_options",
    "open_model",
    "open_processor",
    "sampling_options",
    "sampling_params",
    "say_if_cut",
    "say_if_greedy",
]

F = TypeVar("F", bound=Callable[..., Any])

NANO_LINE = (
    "nano reads lines of text, names and finds colored shapes, and follows simple "
    "motion; for photographs use --model Qwen/Qwen2-VL-2B-Instruct (downloads 4.4 GB once)"
)


def model_option(command: F) -> F:
    """Add the choice of the model."""
    return click.option(
        "--model",
        default="nano",
        show_default=True,
        metavar="DIR_OR_REPO",
        help="A folder, a repo id of the hub, or nano.",
    )(command)


def model_options(command: F) -> F:
    """Add what decides which model runs, and how."""
    return _all(
        command,
        model_option,
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ..."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            show_default=True,
            help="Precision of the weights.",
        ),
        click.option("--adapter", metavar="DIR", help="A LoRA adapter of PEFT, to be merged in."),
        click.option(
            "--quantize",
            type=click.Choice(["int8", "int4", "fp8"]),
            help="Round the weights as they are read; fp8 on a GPU alone.",
        ),
        click.option(
            "--compile",
            is_flag=True,
            help="Compile first: half a minute once, then reading and answering are faster.",
        ),
    )


def shown_options(command: F) -> F:
    """Add the pictures and clips that are shown."""
    return _all(
        command,
        click.option(
            "--image", "images", multiple=True, metavar="PATH", help="A picture; repeatable."
        ),
        click.option(
            "--video", "videos", multiple=True, metavar="PATH", help="A clip; repeatable."
        ),
    )


def media_options(command: F) -> F:
    """Add what decides how much of a picture or clip the model sees."""
    return _all(
        command,
        click.option("--min-pixels", type=int, help="Enlarge smaller pictures to this many."),
        click.option("--max-pixels", type=int, help="Shrink larger pictures to this many."),
        click.option("--fps", type=float, help="Frames taken from a second of video."),
        click.option(
            "--preset",
            type=click.Choice(["paper", "qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"]),
            default="paper",
            show_default=True,
            help="Whose rules choose and size the frames.",
        ),
    )


def sampling_options(command: F) -> F:
    """Add what decides the choice of words; the checkpoint speaks where nothing is given."""
    return _all(
        command,
        click.option("--max-tokens", type=int, default=512, show_default=True),
        click.option("--temperature", type=float, help="0 is greedy; 1 the model's own odds."),
        click.option("--top-k", type=int, help="Draw among so many words; 0 turns it off."),
        click.option("--top-p", type=float, help="Draw among words with this share of the odds."),
        click.option("--seed", type=int, help="The same seed draws the same answer."),
    )


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """Collect the sampling options of a command into SamplingParams."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    return qwen2vl.SamplingParams(**{name: given[name] for name in names})


def form_options(command: F) -> F:
    """Add what the whole answer must look like; at most one of them counts."""
    return _all(
        command,
        click.option("--json-schema", metavar="FILE", help="Answer with JSON of this schema."),
        click.option("--regex", metavar="PATTERN", help="Answer with what this matches whole."),
        click.option("--choice", multiple=True, metavar="TEXT", help="Answer so; repeatable."),
        click.option("--boxes", is_flag=True, help="Answer with boxes, named or not."),
    )


def form(given: dict[str, Any]) -> Grammar | None:
    """Make the grammar that the options describe; None where nothing is asked for."""
    asked = [name for name in ("json_schema", "regex", "choice", "boxes") if given[name]]
    if not asked:
        return None
    if len(asked) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in asked)
        raise click.UsageError(f"{flags}: an answer has one form; give one of them")
    if given["json_schema"]:
        return qwen2vl.Grammar.json_schema(_text_of(given["json_schema"]))
    if given["regex"]:
        return qwen2vl.Grammar.regex(given["regex"])
    return qwen2vl.Grammar.choice(given["choice"]) if given["choice"] else qwen2vl.Grammar.boxes()


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model ready to answer, and how long that took."""

    llm: LLM
    name: str
    load_seconds: float
    has_adapter: bool = False

    @property
    def is_nano(self) -> bool:
        """Tell whether this is the packaged model."""
        return self.name == "nano"

    def say_what_it_can(self) -> None:
        """End a command of nano, as it is shipped, with what to expect of it."""
        if self.is_nano and not self.has_adapter:
            terminal.note(NANO_LINE)


def open_model(given: dict[str, Any]) -> Opened:
    """Load the model that the options name, showing progress where a person is watching."""
    from qwen2vl.weights import find

    start = time.perf_counter()
    same = ("device", "dtype", "quantize", "compile", "adapter", "min_pixels", "max_pixels")
    names = {name: name for name in same}
    names["preset"] = "video_preset"
    # A command without --max-pixels, say, leaves that to the model.
    wishes = {argument: given[name] for name, argument in names.items() if name in given}
    folder = find(given["model"])  # shows its own progress where it must fetch
    with terminal.waiting(f"loading {given['model']}"):
        llm = qwen2vl.LLM(folder, **wishes)
    if llm.compile_seconds is not None:
        terminal.note(f"compiled in {llm.compile_seconds:.0f} s; the next start finds most of it")
    return Opened(
        llm=llm,
        name=given["model"],
        load_seconds=time.perf_counter() - start,
        has_adapter=bool(given.get("adapter")),
    )


def open_processor(given: dict[str, Any]) -> Processor:
    """Open what feeds the model that the options name, without its weights."""
    from qwen2vl.loading import load_processor

    return load_processor(
        given["model"],
        min_pixels=given["min_pixels"],
        max_pixels=given["max_pixels"],
        video_preset=given["preset"],
    )


def say_if_greedy(llm: LLM, params: SamplingParams) -> None:
    """Warn where options ask for a draw and the checkpoint's habits leave nothing to draw."""
    from qwen2vl.engine.sampling.sampler import Rule

    rule = Rule.resolve(params, llm.generation)
    asked = {"--top-k": params.top_k, "--top-p": params.top_p, "--seed": params.seed}
    idle = [option for option, value in asked.items() if value is not None]
    if params.temperature and rule.top_k == 1:
        terminal.note(
            "this checkpoint's top-k of 1 leaves nothing to draw; add --top-k 0 --top-p 1"
        )
    elif params.temperature is None and rule.temperature == 0 and idle:
        terminal.note(
            f"this checkpoint takes the likeliest word: {', '.join(idle)} without effect; add "
            "--temperature 1 to draw"
        )


def say_if_cut(llm: LLM, params: SamplingParams, completion: Completion) -> None:
    """Tell that an answer is not whole, and which of the two limits it reached."""
    if completion.finish_reason != "length":
        return
    count = len(completion.token_ids)
    why = (
        "; --max-tokens allows more"
        if count == params.max_tokens
        else f", where the context of {llm.max_model_len:,} is full; show or ask less at once"
    )
    terminal.note(f"the answer was cut after {count:,} tokens{why}")


def media_part(kind: Literal["image", "video"], path: str, fps: float | None) -> dict[str, Any]:
    """Name one picture or clip in a message."""
    rate = {"fps": fps} if kind == "video" and fps is not None else {}
    return {"type": kind, kind: path, **rate}


def _all(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
