"""`qwen2vl ask`: generate the answer to one question about images and videos, streamed to stdout.

Notes about the prompt (preprocessing, estimated time to first token) are written to stderr; --json
prints one JSON object in place of the text. Bounding boxes of the answer are written as phrases and
pixels of the original image (`text` of the object; `raw_text` has the tokens of the model), and
drawn with --output. With several adapters each answers in turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import annotate, boxes, options, terminal
from qwen2vl.cli.media_arguments import read_media_arguments, split_question
from qwen2vl.cli.prompt_summary import note_nano_limits, print_prompt_summary
from qwen2vl.cli.video.options import VIDEO_TIME, part_options
from qwen2vl.cli.video.windows import ask_in_windows, window_of_training

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import Completion, SamplingParams
    from qwen2vl.processor.inputs import ModelInput

__all__ = ["ask"]


@click.command()
@click.argument("arguments", metavar="[FILE]... QUESTION", nargs=-1)
@options.media_input_options
@options.system_option
@options.model_options
@options.sampling_options
@options.structured_output_options
@options.media_preprocessing_options
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="Draw the answer's boxes on a copy of the image, or on the frames of the video. Several "
    "get -1, -2, ... before the extension; a folder takes them under their own names.",
)
@click.option(
    "--skip-special-tokens/--no-skip-special-tokens",
    default=True,
    show_default=True,
    help="Without special tokens, and boxes as pixels; or the text as the model wrote it.",
)
@click.option(
    "--window",
    type=VIDEO_TIME,
    help="Ask about each part of this length of a long video, as 2m, and join the answers.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the text.")
@terminal.debug_option
def ask(
    arguments: tuple[str, ...],
    system: str | None,
    output: str | None,
    skip_special_tokens: bool,
    window: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer QUESTION about images and videos, or without any.

    FILE is an image or a video, recognized by its content; an animated GIF is a video.

    \b
    qwen2vl ask receipt.png "What is the total?"
    qwen2vl ask --fps 1 goal.mp4 "Who scores?"
    qwen2vl ask movie.mp4 --every 5s --window 10m "Who enters?"
    qwen2vl ask cat.jpg --choice yes --choice no "Is it asleep?"
    """
    names, question = split_question(arguments)
    files = read_media_arguments(names)
    if output:
        annotate.check_output(output, len(files))
    if output and len(given["adapters"]) > 1:
        raise click.UsageError("-o draws the boxes of one answer; give one --adapter")
    video_options = part_options(given)
    params = replace(
        options.sampling_params_from_options(given),
        grammar=options.grammar_from_options(given),
        skip_special_tokens=skip_special_tokens,
    )
    loaded = options.load_model_from_options(given)
    options.note_ineffective_media_options(files)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    media = [file.to_part(video_options) for file in files]
    content = [*media, {"type": "text", "text": question}]
    messages.append({"role": "user", "content": content})
    if window is None and [file.kind for file in files] == ["video"]:
        window = window_of_training(loaded, messages, video_options)
    if window is not None:
        ask_in_windows(
            loaded, files, question, params, video_options, seconds=window, as_json=as_json
        )
        return
    for number, adapter in enumerate(loaded.adapter_names or (None,)):
        if len(loaded.adapter_names) > 1 and not as_json:
            terminal.echo(f"{adapter}:")
        request_params = replace(params, adapter=adapter)
        prompt, completion = _answer(
            loaded, messages, request_params, streaming=not as_json, is_first=number == 0
        )
        if as_json:
            text = (
                boxes.readable_text(completion.text, completion.items)
                if skip_special_tokens
                else completion.text
            )
            terminal.echo_json(_completion_to_json(completion, text, adapter, loaded))
        if output:
            processor = loaded.llm.processor
            annotate.save_annotated(completion.text, files, prompt.items, output, processor)
        options.note_truncation(loaded.llm, params, completion)
        if not as_json:  # with adapters there is no note, so at most one is written
            note_nano_limits(loaded, prompt)


def _answer(
    loaded: LoadedModel,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    *,
    streaming: bool,
    is_first: bool,
) -> tuple[ModelInput, Completion]:
    """Preprocess the prompt, print its summary before the first answer, and generate."""
    prepared = loaded.llm.prepare(messages, params)
    prompt = prepared.prompt
    if is_first:
        print_prompt_summary(loaded.llm, prompt)
    converter = boxes.GroundingText(prompt.items) if params.skip_special_tokens else None
    writer = terminal.DeltaWriter(converter) if streaming else None
    (completion,) = loaded.llm.generate_prepared([prepared], on_delta=writer)
    return prompt, completion


def _completion_to_json(
    completion: Completion, text: str, adapter: str | None, loaded: LoadedModel
) -> dict[str, Any]:
    full = completion.to_dict()
    names = "token_ids finish_reason prompt_tokens image_tokens video_tokens items".split()
    pixel_boxes = [
        {"phrase": shape.phrase, "pixels": shape.corners, "item": number}
        for number, item in enumerate(completion.items)
        for shape in boxes.parse_shapes(completion.text, [item])
    ]
    return {
        "text": text,
        "raw_text": completion.text,
        **{name: full[name] for name in names},
        "boxes": pixel_boxes,
        "adapter": adapter,
        "seconds": {"load": loaded.load_seconds, **full["seconds"]},
    }
