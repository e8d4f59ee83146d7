"""`qwen2vl demo`: answer questions about a few synthetic images and videos, next to the truth.

The examples are synthetic data (`qwen2vl.synth`) with known answers, in wordings held out of
training. Boxes are drawn on a copy of the image; answers are scored as by `qwen2vl eval`. If nano
is not installed, a randomly initialized model of its architecture is used, with a note.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import annotate, boxes, options, terminal
from qwen2vl.cli.options import LoadedModel
from qwen2vl.errors import CheckpointError

if TYPE_CHECKING:
    from PIL import Image

    from qwen2vl.synth import SyntheticExample

__all__ = ["demo"]

# Examples by task family; families that are not in FAMILIES are skipped.
SHOWN = {"text": 3, "shapes": 3, "grounding": 2, "two_pictures": 1, "motion": 2}
SEED = 20240918
FRAME_MILLISECONDS = 400


@click.command()
@click.option(
    "-o",
    "--output",
    default="out/demo",
    show_default=True,
    metavar="DIR",
    help="Folder for the images.",
)
@options.model_options
@terminal.debug_option
def demo(output: str, **given: Any) -> None:
    """Answer questions about synthetic images and videos, and compare with the truth."""
    options.check_unnamed_adapter(given)
    folder = _make_folder(output)
    is_trained = given["model"] != "nano" or _has_nano()
    opened = options.load_model_from_options(given) if is_trained else _build_untrained_model()
    shown = [_answer_example(opened, name, example, folder) for name, example in _examples()]
    _say_table(shown)
    terminal.echo(f"The images are in {folder}.")
    if is_trained:
        right = sum(row.is_correct for row in shown)
        terminal.echo(f"{right} of {len(shown)} answers are right.")
    else:
        terminal.echo("These answers mean nothing: the model was not trained.")
    terminal.echo(f'Try your own: {_program_name()} ask photo.png "What does it say?"')
    if opened.is_default:
        terminal.note(options.NANO_CAPABILITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One row of the table."""

    file: str
    question: str
    answer: str
    truth: str
    is_correct: bool


def _program_name() -> str:
    """Return how to run this program again: by name if PATH has it, else by its path."""
    started = Path(sys.argv[0])
    if shutil.which("qwen2vl") or started.name != "qwen2vl":
        return "qwen2vl"
    return os.path.relpath(started)


def _make_folder(output: str) -> Path:
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"-o {output}: cannot be made a folder: {error.strerror}") from error
    return folder


def _has_nano() -> bool:
    """Return whether trained weights are installed; damaged ones count, and raise later."""
    from qwen2vl.weights import resolve_model

    try:
        resolve_model("nano")
    except CheckpointError:
        return False
    return True


def _examples() -> Iterator[tuple[str, SyntheticExample]]:
    """Render the examples, family by family, in bundled fonts: the same on every machine."""
    from qwen2vl.synth import FAMILIES, Mixture, render, sample

    for family in (name for name in SHOWN if name in FAMILIES):
        mixture = Mixture(
            weights={family: 1.0}, split="held_out", fonts="bundled", text_length=(4, 12)
        )
        for index in range(SHOWN[family]):
            yield f"{family}_{index + 1}", render(sample(SEED, index, mixture))


def _answer_example(
    opened: LoadedModel, name: str, example: SyntheticExample, folder: Path
) -> DemoRow:
    import qwen2vl
    from qwen2vl.eval.synthetic import is_correct

    question = example.truth[0]
    file = _save(example, folder / name)
    params = qwen2vl.SamplingParams(temperature=0, max_tokens=64)
    (completion,) = opened.llm.chat(example.prompt, params)
    found = boxes.parse_shapes(completion.text, completion.items)
    if found:
        picture = annotate.annotated_image(_pictures(example)[0], found)
        terminal.save_image(picture, str(folder / f"{name}_boxes.png"))
    return DemoRow(
        file=file,
        question=boxes.strip_grounding_tokens(question.text),
        answer=_readable(completion.text, completion.items),
        truth=_readable(question.answer, completion.items),
        is_correct=is_correct(example.spec, completion.text),
    )


def _readable(text: str, items: Any) -> str:
    """Format boxes in pixels, and remove grounding tokens from other text."""
    found = boxes.parse_shapes(text, items)
    return "; ".join(shape.text for shape in found) if found else boxes.strip_grounding_tokens(text)


def _pictures(example: SyntheticExample) -> list[Image.Image]:
    """Return the images of an example, or the frames of its video."""
    from PIL import Image

    content = example.prompt[0]["content"]
    pictures = [part["image"] for part in content if part["type"] == "image"]
    pictures += [frame for part in content if part["type"] == "video" for frame in part["video"]]
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pictures]


def _save(example: SyntheticExample, stem: Path) -> str:
    """Write the images of an example as PNG, or its video as an animated GIF."""
    pictures = _pictures(example)
    if example.spec.clip:
        path = stem.with_suffix(".gif")
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0
        )
        return path.name
    names = [f"{stem.name}{'ab'[i] if len(pictures) > 1 else ''}.png" for i in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        terminal.save_image(picture, str(stem.parent / name))
    return ", ".join(names)


def _say_table(rows: list[DemoRow]) -> None:
    titles = ("image", "question", "answer", "truth", "right")
    lines = [
        (
            r.file,
            r.question,
            terminal.escape_control_characters(r.answer),
            r.truth,
            "yes" if r.is_correct else "no",
        )
        for r in rows
    ]
    terminal.echo_table(titles, lines, left_aligned=titles)


def _build_untrained_model() -> LoadedModel:
    """Build a randomly initialized model of nano's architecture, with a note to stderr."""
    from qwen2vl.engine import LLM
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.image import PixelLimits
    from qwen2vl.processor.processor import Processor
    from qwen2vl.processor.tokenizer import Tokenizer
    from qwen2vl.processor.tokenizer_files import write_byte_tokenizer
    from qwen2vl.recipes.nano import MODEL
    from qwen2vl.train.init import init_weights, with_special_token_ids

    terminal.note(
        "no trained nano is installed: random weights answer, as an illustration; "
        "--model DIR_OR_REPO uses another model"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder), characters="")
        tokenizer = Tokenizer.from_folder(Path(folder))
    config = with_special_token_ids(MODEL, tokenizer)
    model = Qwen2VL(config).eval()
    init_weights(model, SEED)
    pixels = PixelLimits(min_pixels=3136, max_pixels=1003520)
    llm = LLM(model, Processor(config, tokenizer, pixels=pixels))
    return LoadedModel(llm=llm, name="an untrained model", load_seconds=0.0)
