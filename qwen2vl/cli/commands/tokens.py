"""`qwen2vl tokens`: how the model sees a file, without loading the model.

Sizes, grid and token count of a picture or clip under the chosen limits; -o writes the very
pixels that enter the network, for a clip as a contact sheet with the time under each frame.
Next room: doctor.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from qwen2vl.cli import options, terminal

if TYPE_CHECKING:
    from PIL import Image

    from qwen2vl.config import VisionConfig
    from qwen2vl.processor.inputs import Item

__all__ = ["contact_sheet", "tokens"]

MAX_COLUMNS = 8
CAPTION = 18  # pixels under each frame for its time


@click.command()
@click.argument("file", metavar="FILE")
@options.model_option
@options.media_options
@click.option("--kind", type=click.Choice(["image", "video"]), help="What FILE is, if in doubt.")
@click.option("-o", "output", metavar="PNG", help="Write the pixels that the model sees.")
@terminal.debug_option
def tokens(
    file: str, kind: Literal["image", "video"] | None, output: str | None, **given: Any
) -> None:
    """Show how the model sees FILE: size, grid and token count."""
    if output:
        terminal.check_picture_name(output)
    processor = options.open_processor(given)
    part = options.media_part(kind or _kind_of(file), file, given["fps"])
    item = processor([{"role": "user", "content": [part]}]).items[0]
    for name, value in _rows(item):
        terminal.say(f"{name:<8} {value}")
    if output:
        terminal.save_picture(contact_sheet(item, processor.config.vision), output)
        terminal.note(f"wrote {output}")


def contact_sheet(item: Item, vision: VisionConfig) -> Image.Image:
    """Put the frames that the model sees side by side, each with its time; a picture alone."""
    from PIL import Image, ImageDraw

    from qwen2vl.processor.image import unpatchify

    frames_FHWC = unpatchify(item.patches_NP, item.grid, vision).permute(0, 2, 3, 1).numpy()
    if item.kind == "image":
        return Image.fromarray(frames_FHWC[0])
    height, width = item.size_seen
    columns = min(MAX_COLUMNS, len(frames_FHWC))
    rows = -(-len(frames_FHWC) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, frame_HWC in enumerate(frames_FHWC):
        place = (number % columns * width, number // columns * (height + CAPTION))
        sheet.paste(Image.fromarray(frame_HWC), place)
        pen.text((place[0] + 2, place[1] + height + 2), _time(item, number), fill="black")
    return sheet


def _time(item: Item, number: int) -> str:
    """Name a frame; one past the last time repeats the last frame."""
    times = item.frame_times
    return f"{times[number]:.2f} s" if number < len(times) else "repeated"


def _rows(item: Item) -> list[tuple[str, str]]:
    rows = [
        ("file", item.name),
        ("given", f"{terminal.person_size(item.size_given)} pixels"),
        ("seen", f"{terminal.person_size(item.size_seen)} pixels"),
        ("grid", f"{item.grid.t} x {item.grid.h} x {item.grid.w} patches (time, height, width)"),
        ("tokens", f"{item.num_tokens:,}"),
    ]
    if item.frame_times:
        times = ", ".join(f"{time:.2f}" for time in item.frame_times)
        rows.insert(3, ("frames", f"{len(item.frame_times)}, at {times} s"))
    return rows + [("note", text) for text in item.notes]


def _kind_of(file: str) -> Literal["image", "video"]:
    """Tell a clip from a picture by the first bytes."""
    from qwen2vl.processor.media.source import MediaLimits, read_head, read_source, sniff_type

    media = read_source(file, MediaLimits(), file)
    return "video" if sniff_type(read_head(media)).startswith("video/") else "image"
