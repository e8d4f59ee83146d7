"""`qwen2vl demo`: draw a few pictures and a clip, ask about them, show answers beside the truth.

The pictures come from the procedural world (synth/), whose truth is known; their wordings are
those that training never saw. Boxes are drawn on a copy; answers are judged as `eval` does. Where
no nano is installed a model of its shape with fresh weights answers, so that the path is shown,
and it is said to mean nothing. Next room: main.py, to see where commands are listed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.options import Opened
from qwen2vl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from qwen2vl.synth import Example

__all__ = ["demo"]

# How many of each family; what the installed world lacks is left out.
SHOWN = {"text": 3, "shapes": 3, "grounding": 2, "two_pictures": 1, "motion": 2}
SEED = 20240918
FRAME_MILLISECONDS = 400


@click.command()
@click.option(
    "-o", "output", default="out/demo", show_default=True, metavar="DIR", help="For the pictures."
)
@options.model_options
@terminal.debug_option
def demo(output: str, **given: Any) -> None:
    """Draw pictures, ask about them, show answers beside the truth."""
    folder = _make_folder(output)
    is_trained = given["model"] != "nano" or _has_nano()
    opened = options.open_model(given) if is_trained else _untrained()
    shown = [_ask(opened, name, example, folder) for name, example in _examples()]
    _say_table(shown)
    terminal.say(f"The pictures are in {folder}.")
    if is_trained:
        right = sum(row.is_right for row in shown)
        terminal.say(f"{right} of {len(shown)} answers are right.")
    else:
        terminal.say("These answers mean nothing: the model that gave them was never trained.")
    terminal.say('Try your own: qwen2vl ask --image photo.png "What does it say?"')
    opened.say_what_it_can()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    file: str
    question: str
    answer: str
    truth: str
    is_right: bool


def _make_folder(output: str) -> Path:
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"-o {output}: cannot be made a folder: {error.strerror}") from error
    return folder


def _has_nano() -> bool:
    """Tell whether the package holds trained weights; damaged ones are there, and an error."""
    from qwen2vl.weights import find

    try:
        find("nano")
    except CheckpointError:
        return False
    return True


def _examples() -> Iterator[tuple[str, Example]]:
    """Draw the examples, family by family; a missing font costs only its family."""
    from qwen2vl.synth import FAMILIES, Mixture, render, sample

    for family in (name for name in SHOWN if name in FAMILIES):
        mixture = Mixture(weights={family: 1.0}, split="held_out", text_length=(4, 12))
        try:
            for index in range(SHOWN[family]):
                yield f"{family}_{index + 1}", render(sample(SEED, index, mixture))
        except ConfigError as error:
            terminal.note(str(error))


def _ask(opened: Opened, name: str, example: Example, folder: Path) -> Row:
    import qwen2vl
    from qwen2vl.eval.drawn import is_right

    question = example.truth[0]
    file = _save(example, folder / name)
    params = qwen2vl.SamplingParams(temperature=0, max_tokens=64)
    (completion,) = opened.llm.chat(example.prompt, params)
    found = boxes.find(completion.text, completion.items)
    if found:
        picture = _pictures(example)[0]
        boxes.draw_shapes(picture, found)
        terminal.save_picture(picture, str(folder / f"{name}_boxes.png"))
    return Row(
        file=file,
        question=boxes.without_marks(question.text),
        answer=_readable(completion.text, completion.items),
        truth=_readable(question.answer, completion.items),
        is_right=is_right(example.spec, completion.text),
    )


def _readable(text: str, items: Any) -> str:
    """Put boxes into pixels and phrases into plain words."""
    found = boxes.find(text, items)
    return "; ".join(shape.text for shape in found) if found else boxes.without_marks(text)


def _pictures(example: Example) -> list[Image.Image]:
    """Unpack the pictures of an example, or the frames of its clip."""
    from PIL import Image

    content = example.prompt[0]["content"]
    pictures = [part["image"] for part in content if part["type"] == "image"]
    pictures += [frame for part in content if part["type"] == "video" for frame in part["video"]]
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pictures]


def _save(example: Example, stem: Path) -> str:
    """Write what is shown: one picture, several, or a clip that any browser plays."""
    pictures = _pictures(example)
    if example.spec.clip:
        path = stem.with_suffix(".gif")
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0
        )
        return path.name
    names = [f"{stem.name}{'ab'[i] if len(pictures) > 1 else ''}.png" for i in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        terminal.save_picture(picture, str(stem.parent / name))
    return ", ".join(names)


def _say_table(rows: list[Row]) -> None:
    titles = ("picture", "question", "answer", "truth", "right")
    lines = [
        (r.file, r.question, terminal.plain(r.answer), r.truth, "yes" if r.is_right else "no")
        for r in rows
    ]
    terminal.say_table(titles, lines, words=titles)


def _untrained() -> Opened:
    """Build a model of nano's shape with fresh weights, and say so."""
    from qwen2vl.engine import LLM
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.image import PixelLimits
    from qwen2vl.processor.processor import Processor
    from qwen2vl.processor.tokenizer import Tokenizer
    from qwen2vl.processor.tokenizer_files import write_byte_tokenizer
    from qwen2vl.recipes.nano import MODEL
    from qwen2vl.train.init import initialize, with_ids_of

    terminal.note(
        "no trained nano is installed: random weights answer, to show the way; --model DIR_OR_REPO "
        "asks another model"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder), characters="")
        tokenizer = Tokenizer.from_folder(Path(folder))
    config = with_ids_of(MODEL, tokenizer)
    model = Qwen2VL(config).eval()
    initialize(model, SEED)
    pixels = PixelLimits(min_pixels=3136, max_pixels=1003520)
    llm = LLM.of(model, Processor(config, tokenizer, pixels=pixels))
    return Opened(llm=llm, name="an untrained model", load_seconds=0.0)
