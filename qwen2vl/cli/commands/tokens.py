"""`qwen2vl tokens`: preprocessing result of images and videos, without loading the model weights.

Prints original and resized size, patch grid and number of vision tokens under the given limits.
--output writes the exact pixels of the model input; for a video as a contact sheet with the
timestamp below each frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import annotate, options, terminal
from qwen2vl.cli.media_arguments import expand_media
from qwen2vl.cli.video.options import part_options
from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from qwen2vl.processor.content import Modality
    from qwen2vl.processor.inputs import Item

__all__ = ["tokens"]


@click.command()
@click.argument("names", metavar="FILE...", nargs=-1, required=True)
@options.model_option
@options.media_preprocessing_options
@click.option(
    "--kind", type=click.Choice(["image", "video"]), help="Type of FILE; default: detected."
)
@click.option(
    "-o", "--output", metavar="PNG", help="Write the resized pixels of one FILE as an image."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of the text.")
@terminal.debug_option
def tokens(
    names: tuple[str, ...],
    kind: Modality | None,
    output: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show the preprocessing of each FILE, an image or video: size, patch grid, token count.

    An animation (GIF, WebP, APNG) is a video unless --kind says otherwise; - reads stdin.
    """
    if output:
        terminal.check_image_path(output)
    flag = f"--kind {kind}" if kind else ""
    files = [file for name in names for file in expand_media(kind, name, flag=flag)]
    if output and len(files) > 1:
        raise InputError(f"-o {output}: takes the pixels of one file, got {len(files)}; give one")
    processor = options.load_processor_from_options(given)
    options.note_ineffective_media_options(files)
    parts = [file.to_part(part_options(given)) for file in files]
    items = processor([{"role": "user", "content": parts}]).items
    if as_json:
        terminal.echo_json({"items": [_item_to_json(item) for item in items]})
    else:
        blocks = ["\n".join(_describe_item(item)) for item in items]
        terminal.echo("\n\n".join(blocks))
    if output:
        terminal.save_image(annotate.contact_sheet(items[0], processor.config.vision), output)
        terminal.note(f"wrote {output}")


def _item_to_json(item: Item) -> dict[str, Any]:
    """Return the fields of an item as in `ask --json`, and its patch grid."""
    return {
        "kind": item.kind,
        "name": item.name,
        "original_size": item.original_size,
        "resized_size": item.resized_size,
        "grid": (item.grid.t, item.grid.h, item.grid.w),
        "tokens": item.num_tokens,
        "frame_timestamps": item.frame_timestamps,
        "notes": item.notes,
    }


def _describe_item(item: Item) -> list[str]:
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
    rows += [("note", text) for text in item.notes]
    return [f"{name:<8} {value}" for name, value in rows]
