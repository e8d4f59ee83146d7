"""`qwen2vl tokens`: preprocessing result of an image or video, without loading the model weights.

Prints original and resized size, patch grid and number of vision tokens under the given limits.
--output writes the exact pixels of the model input; for a video as a contact sheet with the
timestamp below each frame.
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
CAPTION = 18  # pixels below each frame for its timestamp


@click.command()
@click.argument("file", metavar="FILE")
@options.model_option
@options.media_preprocessing_options
@click.option(
    "--kind", type=click.Choice(["image", "video"]), help="Type of FILE; default: detected."
)
@click.option("-o", "--output", metavar="PNG", help="Write the resized pixels as an image.")
@terminal.debug_option
def tokens(
    file: str, kind: Literal["image", "video"] | None, output: str | None, **given: Any
) -> None:
    """Show the preprocessing of FILE, an image or video: size, patch grid, token count."""
    if output:
        terminal.check_image_path(output)
    processor = options.load_processor_from_options(given)
    part = options.content_part(kind or _detect_kind(file), file, given["fps"])
    item = processor([{"role": "user", "content": [part]}]).items[0]
    for name, value in _describe_item(item):
        terminal.echo(f"{name:<8} {value}")
    if output:
        terminal.save_image(contact_sheet(item, processor.config.vision), output)
        terminal.note(f"wrote {output}")


def contact_sheet(item: Item, vision: VisionConfig) -> Image.Image:
    """Return the frames of the model input in a grid with timestamps; an image as it is."""
    from PIL import Image, ImageDraw

    from qwen2vl.processor.image import unpatchify

    frames_FHWC = unpatchify(item.patches_NP, item.grid, vision).permute(0, 2, 3, 1).numpy()
    if item.kind == "image":
        return Image.fromarray(frames_FHWC[0])
    height, width = item.resized_size
    columns = min(MAX_COLUMNS, len(frames_FHWC))
    rows = -(-len(frames_FHWC) // columns)
    image = Image.new("RGB", (columns * width, rows * (height + CAPTION)), "white")
    drawing = ImageDraw.Draw(image)
    for number, frame_HWC in enumerate(frames_FHWC):
        corner = (number % columns * width, number // columns * (height + CAPTION))
        image.paste(Image.fromarray(frame_HWC), corner)
        drawing.text(
            (corner[0] + 2, corner[1] + height + 2), _frame_label(item, number), fill="black"
        )
    return image


def _frame_label(item: Item, number: int) -> str:
    """Return the timestamp of a frame; frames beyond the last one are padding by repetition."""
    times = item.frame_timestamps
    return f"{times[number]:.2f} s" if number < len(times) else "repeated"


def _describe_item(item: Item) -> list[tuple[str, str]]:
    rows = [
        ("file", item.name),
        ("original", f"{terminal.format_size(item.original_size)} pixels"),
        ("resized", f"{terminal.format_size(item.resized_size)} pixels"),
        ("grid", f"{item.grid.t} x {item.grid.h} x {item.grid.w} patches (time, height, width)"),
        ("tokens", f"{item.num_tokens:,}"),
    ]
    if item.frame_timestamps:
        times = ", ".join(f"{time:.2f}" for time in item.frame_timestamps)
        rows.insert(3, ("frames", f"{len(item.frame_timestamps)}, at {times} s"))
    return rows + [("note", text) for text in item.notes]


def _detect_kind(file: str) -> Literal["image", "video"]:
    """Detect whether a file is an image or a video, by its first bytes."""
    from qwen2vl.processor.media.source import MediaLimits, read_head, read_source, sniff_type

    media = read_source(file, MediaLimits(), file)
    return "video" if sniff_type(read_head(media)).startswith("video/") else "image"
