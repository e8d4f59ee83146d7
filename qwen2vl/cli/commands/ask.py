"""`qwen2vl ask`: one question about pictures and clips, answered on stdout as it is written.

Everything about the answer (what was seen, how long it may take) goes to stderr; --json prints
one object in place of the text. Boxes in an answer are printed in pixels of the picture as given
(in the object: `boxes`), and drawn on it with -o. Next room: chat.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.prompt_summary import say_outlook

if TYPE_CHECKING:
    from qwen2vl.cli.options import Opened
    from qwen2vl.engine import Completion, SamplingParams

__all__ = ["ask"]


@click.command()
@click.argument("question")
@options.shown_options
@options.model_options
@options.sampling_options
@options.form_options
@options.media_options
@click.option("-o", "output", metavar="PNG", help="Draw the answer's boxes on the picture.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@terminal.debug_option
def ask(
    question: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    output: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Ask QUESTION about pictures and clips.

    \b
    qwen2vl ask --image receipt.png "What is the total?"
    qwen2vl ask --video goal.mp4 --fps 1 "Who scores?"
    qwen2vl ask --image cat.jpg --choice yes --choice no "Is it asleep?"
    """
    if not question.strip():
        raise click.UsageError("QUESTION is empty; write what you want to know")
    if output and len(images) != 1:
        raise click.UsageError(f"-o draws on one picture, got {len(images)}; give one --image")
    if output:
        terminal.check_picture_name(output)
    params = replace(options.sampling_params(given), grammar=options.form(given))
    opened = options.open_model(given)
    options.say_if_greedy(opened.llm, params)
    media = [options.media_part("image", path, None) for path in images]
    media += [options.media_part("video", path, given["fps"]) for path in videos]
    completion = _answer(opened, media, question, params, streaming=not as_json)
    found = boxes.find(completion.text, completion.items)
    if as_json:
        terminal.say_json(_as_object(completion, found, opened))
    for line in found if not as_json else ():
        terminal.say(line.text)
    if output:
        boxes.draw(images[0], found, output, opened.llm.processor)
    options.say_if_cut(opened.llm, params, completion)
    if not as_json:
        opened.say_what_it_can()


def _answer(
    opened: Opened,
    media: list[dict[str, Any]],
    question: str,
    params: SamplingParams,
    *,
    streaming: bool,
) -> Completion:
    """Process, tell what to expect, then write the answer as it comes."""
    start = time.perf_counter()
    content = [*media, {"type": "text", "text": question}]
    prompt = opened.llm.processor([{"role": "user", "content": content}])
    process = time.perf_counter() - start
    opened.llm.check(prompt, params)
    say_outlook(opened.llm, prompt)
    writer = terminal.Writer() if streaming else None
    (completion,) = opened.llm.generate(prompt, params, on_delta=writer)
    return replace(completion, seconds=replace(completion.seconds, process=process))


def _as_object(
    completion: Completion, found: Sequence[boxes.Found], opened: Opened
) -> dict[str, Any]:
    full = completion.to_dict()
    names = "text token_ids finish_reason prompt_tokens image_tokens video_tokens items".split()
    shapes = [{"phrase": shape.phrase, "pixels": shape.corners} for shape in found]
    seconds = {"load": opened.load_seconds, **full["seconds"]}
    return {name: full[name] for name in names} | {"boxes": shapes, "seconds": seconds}
