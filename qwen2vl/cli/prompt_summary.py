"""What a prompt will cost, said before it is paid: sizes, tokens, notes, and a long wait.

Nothing is adjusted silently: frames left out, damage and conversions have their lines on stderr,
and where the first word is more than ten seconds away so has the way to be faster. It must not
change the prompt. Next room: ask.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen2vl.cli import terminal

if TYPE_CHECKING:
    from qwen2vl.engine import LLM
    from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["item_line", "say_outlook"]

LONG_SECONDS = 10.0
HINT_SHARE = 0.25  # of a clip's frames
HINT_TOKENS = 1280  # an image of 1003520 pixels, which qwen-vl-utils' documents recommend

# So many operations in ten seconds are within the reach of any machine: no need to measure.
SMALL_WORK = 1e11


def say_outlook(llm: LLM, prompt: ModelInput, *, told: int = 0) -> None:
    """Write a line for each adjustment, and where the wait is long one for each item.

    The notes of the first `told` items were written before.
    """
    wait = _wait(llm, prompt)
    for number, item in enumerate(prompt.items):
        is_last = number + 1 == len(prompt.items)
        if wait and is_last:
            terminal.note(f"{item_line(item)}, {wait}")
        elif wait:
            terminal.note(item_line(item))
    if wait and not prompt.items:
        terminal.note(f"{len(prompt.input_ids):,} tokens, {wait}")
    for item in prompt.items[told:]:
        for text in item.notes:
            terminal.note(f"{item.name}: {text}")


def item_line(item: Item) -> str:
    """Tell how an item is seen: `photo.jpg 4032 x 3024 -> 15,552 tokens`."""
    frames = f", {len(item.frame_times)} frames" if item.frame_times else ""
    size = terminal.person_size(item.size_given)
    return f"{item.name} {size}{frames} -> {item.num_tokens:,} tokens"


def _wait(llm: LLM, prompt: ModelInput) -> str:
    """Say how long the first word will take and how to shorten it; nothing if it is soon."""
    from qwen2vl.engine.ttft import Speed, Work

    work = Work.of(prompt, llm.config)
    if work.vision + work.text < SMALL_WORK:
        return ""
    speed = Speed.measure(llm.model)
    seconds = speed.seconds(work)
    if seconds < LONG_SECONDS:
        return ""
    text = f"about {terminal.person_seconds(seconds)} here"
    if any(item.kind == "image" and item.num_tokens > HINT_TOKENS for item in prompt.items):
        faster = speed.seconds(Work.at_most(prompt, llm.config, HINT_TOKENS))
        pixels = HINT_TOKENS * llm.config.vision.factor**2
        text += (
            f"; --max-pixels {pixels} gives at most {HINT_TOKENS:,}, "
            f"about {terminal.person_seconds(faster)}"
        )
    elif rate := max((_rate(item) for item in prompt.items), default=0.0):
        faster = speed.seconds(Work.with_frames(prompt, llm.config, HINT_SHARE))
        text += (
            f"; --fps {rate * HINT_SHARE:.1g} shows a quarter of the frames, "
            f"about {terminal.person_seconds(faster)}"
        )
    return text


def _rate(item: Item) -> float:
    """Tell how many frames a second of a clip are used; 0 for a picture, or a very short clip."""
    times = item.frame_times
    if not times or len(times) < 2 / HINT_SHARE or times[-1] <= times[0]:
        return 0.0
    return (len(times) - 1) / (times[-1] - times[0])
