"""Which images `batch --images` asks about: those of folders, of patterns, and paths themselves.

A folder is searched by the extensions of the formats that are read. Images of other formats are
left out; their names are reported, so that no image is missing without a word.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence

from qwen2vl.cli.media_arguments import natural_key
from qwen2vl.errors import InputError
from qwen2vl.processor.image_formats.formats import IMAGE_SUFFIXES

__all__ = ["describe_skipped", "list_images"]

SHOWN_NAMES = 3  # of images that are skipped
# Images of other formats; what a folder has of them is reported.
OTHER_IMAGE_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".svg", ".svgz", ".jp2", ".j2k", ".psd", ".eps", ".ico", ".tga"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".exr", ".hdr"),
)


def list_images(
    sources: Sequence[str], *, on_skipped: Callable[[str], object] = lambda name: None
) -> list[str]:
    """Return the images of folders (with subfolders, by extension), patterns and paths, sorted.

    Numbers in names are compared as numbers. Hidden files of a folder are left out.

    Args:
        sources: folders, patterns and paths.
        on_skipped: called with each image of a folder whose format is not supported.

    Raises:
        InputError: a source has no image.
    """
    found: dict[str, None] = {}
    for source in sources:
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            skipped: list[str] = []
            names = sorted(_walk(path, skipped), key=natural_key)
            for name in skipped:
                on_skipped(name)
            what = f"the folder has no image ({', '.join(IMAGE_SUFFIXES)})"
            what += f", and {describe_skipped(skipped)}" if skipped else ""
        elif os.path.lexists(path):
            names, what = [path], ""
        elif glob.has_magic(path):
            matches = glob.glob(path, recursive=True)
            names = sorted((one for one in matches if os.path.isfile(one)), key=natural_key)
            what = "no file matches this pattern; check the folder and name"
        else:
            names, what = [], "does not exist; give a folder, a pattern or an image"
        if not names:
            raise InputError(f"--images {source}: {what}")
        found.update(dict.fromkeys(names))
    return list(found)


def describe_skipped(names: Sequence[str]) -> str:
    """Say how many images are skipped, with the names of the first ones."""
    first = ", ".join(sorted(names, key=natural_key)[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    count = "1 image is" if len(names) == 1 else f"{len(names):,} images are"
    return f"{count} skipped, as the format is not supported: {first}{more}"


def _walk(folder: str, skipped: list[str]) -> Iterator[str]:
    """Yield the images of a folder, and list those of formats that are not supported."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(parent, name)
            elif name.lower().endswith(OTHER_IMAGE_SUFFIXES):
                skipped.append(os.path.join(parent, name))
