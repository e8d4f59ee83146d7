"""Random messages and random damage to media files: a prompt, or an error of this library.

Each property runs with 200 examples, and, marked slow, with 2,000 of another seed.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from qwen2vl.errors import Qwen2VLError
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from tests.media import FORMATS, animation, encoded, encoded_video, noise
from tests.properties import at_both_sizes
from tests.tiny import tiny_processor

# Random strings must not open the machine's files or reach its network.
LIMITS = MediaLimits(allow_files=False, allow_urls=False, decode_timeout=10, max_image_pixels=10**6)
KEYS = (
    "role content type text image image_url video url detail fps nframes box picture tool_calls "
    "function name arguments id refusal max_pixels min_pixels resized_height path base64 "
    "tool_call_id"
).split()
WORDS = (
    "system user assistant tool developer function text input_text image image_url input_image "
    "video refusal box low high"
).split()

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(WORDS)
    | st.binary(max_size=6)
    | st.sampled_from(["data:image/png;base64,iVBO", "file:///a", "http://[x", "data:,", "\ud800"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=8,
)
sources = st.sampled_from(
    [
        noise(28, 28),
        torch.rand(3, 28, 28),
        torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8),
        encoded(noise(28, 28)),
        io.BytesIO(encoded(noise(28, 28))),
        [noise(28, 28)] * 3,
    ]
)
items = values | st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(KEYS, values), "image": sources, "video": sources}
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | values,
        "content": st.lists(
            items
            | st.builds(lambda source: {"image": source}, sources)
            | st.builds(lambda source: {"video": source}, sources)
            | st.builds(lambda text: {"text": text}, st.text(max_size=9)),
            max_size=4,
        )
        | values,
    },
    optional=dict.fromkeys(KEYS[10:], values),
)


@functools.cache
def processors() -> Sequence[Processor]:
    plain = tiny_processor(limits=LIMITS)
    return plain, plain.with_item_cache(10**6)


def prompt_or_error(conversation: Any) -> None:
    """Process a conversation; errors of this library are expected, in one printable line."""
    errors = []
    for processor in processors():
        try:
            processor(conversation)
        except Qwen2VLError as error:
            errors.append(str(error))
    assert len(set(errors)) <= 1 and len(errors) != 1, errors
    for text in errors:
        assert text and "\n" not in text and len(text) < 1000, text


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Return small valid files by name of their format."""
    files = {kind: encoded(noise(20, 24), kind) for kind in FORMATS}
    files |= {f"animated {kind}": animation(kind, 3) for kind in ("GIF", "WEBP", "PNG", "TIFF")}
    files["MP4"] = encoded_video(4, width=32, height=32)
    files["MKV"] = encoded_video(4, width=32, height=32, codec="mpeg4", container="matroska")
    return files


def damaged_prompt_or_error(
    kind: str, changes: list[tuple[float, int]], end: float, tail: bytes, modality: str
) -> None:
    """Bytes are changed, the end is cut off, and other bytes follow."""
    data = np.frombuffer(whole_files()[kind], np.uint8).copy()
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    source = data.tobytes()[: int(end * len(data))] + tail
    prompt_or_error([{"role": "user", "content": [{modality: source}]}])


@pytest.mark.parametrize(
    "check", at_both_sizes(prompt_or_error, st.lists(messages, max_size=3) | values)
)
def test_random_messages_give_a_prompt_or_an_error(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    at_both_sizes(
        damaged_prompt_or_error,
        st.sampled_from([*FORMATS, "animated GIF", "animated WEBP", "animated PNG", "MP4", "MKV"]),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
        st.floats(0, 1) | st.just(1.0),
        st.binary(max_size=8),
        st.sampled_from(["image", "video"]),
    ),
)
def test_random_damage_gives_a_prompt_or_an_error(check: Callable[[], None]) -> None:
    check()
