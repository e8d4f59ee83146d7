"""Summary of a prompt on stderr before generation: items, preprocessing notes, estimated TTFT.

Every adjustment of the input (dropped frames, damaged files, conversions) is reported. Where the
estimated time to first token (TTFT) is ten seconds or more, the summary also lists the items with
their token counts and an option that reduces it. After the first answer of a run, a prompt outside
of what nano was trained on is reported, if nano answered because no model was named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2vl.cli import options, terminal

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import LLM
    from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["format_item", "note_nano_limits", "print_prompt_summary"]

MIN_WAIT_SECONDS = 10.0
HINT_SHARE = 0.25  # of a video's frames
HINT_TOKENS = 1280  # an image of 1003520 pixels, as the documentation of qwen-vl-utils recommends

# Drawings and text, as nano knows them, have few colors: the most frequent ones cover nearly all.
# Of the demo's images at most four cover 90 %; of a photograph dozens do.
NUM_DRAWING_COLORS = 8
DRAWING_SHARE = 0.9

# Any machine computes this in less than ten seconds: throughput is not measured below it.
NEGLIGIBLE_FLOPS = 1e11


def print_prompt_summary(llm: LLM, prompt: ModelInput, *, num_noted_items: int = 0) -> None:
    """Write one line for each preprocessing note, and for each item if the TTFT is long.

    Notes of the first `num_noted_items` items are skipped (written in an earlier turn).
    """
    ttft = _format_ttft(llm, prompt)
    for number, item in enumerate(prompt.items):
        is_last = number + 1 == len(prompt.items)
        if ttft and is_last:
            terminal.note(f"{format_item(item)}, {ttft}")
        elif ttft:
            terminal.note(format_item(item))
    if ttft and not prompt.items:
        terminal.note(f"{len(prompt.input_ids):,} tokens, {ttft}")
    for item in prompt.items[num_noted_items:]:
        for text in item.notes:
            terminal.note(f"{item.name}: {text}")


def note_nano_limits(loaded: LoadedModel, prompt: ModelInput) -> bool:
    """Note what nano can do, if it got a photograph or no image; return whether it was written."""
    if not loaded.is_default or (prompt.items and not any(map(_is_photograph, prompt.items))):
        return False
    terminal.note(options.NANO_CAPABILITIES)
    return True


def format_item(item: Item) -> str:
    """Format the size of an item: `photo.jpg 4032 x 3024 -> 15,552 tokens`."""
    frames = f", {len(item.frame_timestamps)} frames" if item.frame_timestamps else ""
    size = terminal.format_size(item.original_size)
    return f"{item.name} {size}{frames} -> {item.num_tokens:,} tokens"


def _format_ttft(llm: LLM, prompt: ModelInput) -> str:
    """Format the estimated TTFT and an option that reduces it; empty if it is short."""
    from qwen2vl.engine.ttft import PromptFlops, Throughput

    flops = PromptFlops.from_prompt(prompt, llm.config)
    if flops.vision + flops.text < NEGLIGIBLE_FLOPS:
        return ""
    throughput = Throughput.measure(llm.model)
    seconds = throughput.estimate_ttft(flops)
    if seconds < MIN_WAIT_SECONDS:
        return ""
    text = f"about {terminal.format_duration(seconds)} here"
    if any(item.kind == "image" and item.num_tokens > HINT_TOKENS for item in prompt.items):
        faster = throughput.estimate_ttft(
            PromptFlops.with_max_image_tokens(prompt, llm.config, HINT_TOKENS)
        )
        pixels = HINT_TOKENS * llm.config.vision.factor**2
        text += (
            f"; --max-pixels {pixels} gives at most {HINT_TOKENS:,}, "
            f"about {terminal.format_duration(faster)}"
        )
    elif rate := max((_frame_rate(item) for item in prompt.items), default=0.0):
        faster = throughput.estimate_ttft(
            PromptFlops.with_frame_fraction(prompt, llm.config, HINT_SHARE)
        )
        text += (
            f"; --fps {rate * HINT_SHARE:.1g} shows a quarter of the frames, "
            f"about {terminal.format_duration(faster)}"
        )
    return text


def _frame_rate(item: Item) -> float:
    """Return the sampled frames per second of a video; 0 for an image or a very short video."""
    times = item.frame_timestamps
    if not times or len(times) < 2 / HINT_SHARE or times[-1] <= times[0]:
        return 0.0
    return (len(times) - 1) / (times[-1] - times[0])


def _is_photograph(item: Item) -> bool:
    """Return whether an image or the frames of a video have the many colors of a photograph."""
    patches_NP = item.load_pair(0) if item.source is not None else item.patches_NP
    bits = (patches_NP.reshape(len(patches_NP), 3, -1) >> 4).long()  # four bits of each channel
    colors = (bits[:, 0] * 256 + bits[:, 1] * 16 + bits[:, 2]).flatten()
    counts = colors.bincount().sort(descending=True).values
    return int(counts[:NUM_DRAWING_COLORS].sum()) < DRAWING_SHARE * len(colors)
