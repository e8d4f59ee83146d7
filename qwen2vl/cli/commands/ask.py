"""`qwen2vl ask`: generate the answer to one question about images and videos, streamed to stdout.

Notes about the prompt (preprocessing, estimated time to first token) are written to stderr; --json
prints one JSON object in place of the text. Bounding boxes of the answer are printed in pixels of
the original image (key `boxes` of the object), and drawn on the image with --output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.prompt_summary import print_prompt_summary

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import Completion, SamplingParams

__all__ = ["ask"]


@click.command()
@click.argument("question")
@options.media_input_options
@options.model_options
@options.sampling_options
@options.structured_output_options
@options.media_preprocessing_options
@click.option(
    "-o", "--output", metavar="PNG", help="Draw the answer's boxes on the image, write it here."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the text.")
@terminal.debug_option
def ask(
    question: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    output: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer QUESTION about images and videos, or without any.

    \b
    qwen2vl ask --image receipt.png "What is the total?"
    qwen2vl ask --video goal.mp4 --fps 1 "Who scores?"
    qwen2vl ask --image cat.jpg --choice yes --choice no "Is it asleep?"
    """
    if not question.strip():
        raise click.UsageError("QUESTION is empty; give a text")
    if output and len(images) != 1:
        raise click.UsageError(f"-o draws on one image, got {len(images)}; give one --image")
    if output:
        terminal.check_image_path(output)
    params = replace(
        options.sampling_params_from_options(given), grammar=options.grammar_from_options(given)
    )
    loaded = options.load_model_from_options(given)
    options.note_ignored_sampling_options(loaded.llm, params)
    media = [options.content_part("image", path, None) for path in images]
    media += [options.content_part("video", path, given["fps"]) for path in videos]
    completion = _generate(loaded, media, question, params, streaming=not as_json)
    shapes = boxes.parse_shapes(completion.text, completion.items)
    if as_json:
        terminal.echo_json(_completion_to_json(completion, shapes, loaded))
    for shape in shapes if not as_json else ():
        terminal.echo(shape.text)
    if output:
        boxes.save_annotated_image(images[0], shapes, output, loaded.llm.processor)
    options.note_truncation(loaded.llm, params, completion)
    if not as_json:
        loaded.note_capabilities()


def _generate(
    loaded: LoadedModel,
    media: list[dict[str, Any]],
    question: str,
    params: SamplingParams,
    *,
    streaming: bool,
) -> Completion:
    """Preprocess the prompt, print its summary, and generate the answer."""
    content = [*media, {"type": "text", "text": question}]
    prepared = loaded.llm.prepare([{"role": "user", "content": content}], params)
    print_prompt_summary(loaded.llm, prepared.prompt)
    writer = terminal.DeltaWriter() if streaming else None
    (completion,) = loaded.llm.generate_prepared([prepared], on_delta=writer)
    return completion


def _completion_to_json(
    completion: Completion, shapes: Sequence[boxes.PixelShape], loaded: LoadedModel
) -> dict[str, Any]:
    full = completion.to_dict()
    names = "text token_ids finish_reason prompt_tokens image_tokens video_tokens items".split()
    pixel_boxes = [{"phrase": shape.phrase, "pixels": shape.corners} for shape in shapes]
    seconds = {"load": loaded.load_seconds, **full["seconds"]}
    return {name: full[name] for name in names} | {"boxes": pixel_boxes, "seconds": seconds}
