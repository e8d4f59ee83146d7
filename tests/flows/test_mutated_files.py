"""Mutated pictures, clips, rows and adapters: refused, or right; in bounded time and memory.

Each property runs with 100 examples, and, marked slow, with 2,000 of another seed.
"""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import SampleError
from qwen2vl.data.preprocess import HeaderPreprocessor
from qwen2vl.data.sources.source import open_source
from qwen2vl.errors import Qwen2VLError
from qwen2vl.lora.peft import parse_peft_adapter
from qwen2vl.model import meta_model
from qwen2vl.processor.media.rgb import decode_media, open_encoded, oriented_size
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media.video_source import open_video
from qwen2vl.weights import read_adapter
from tests.data.formats.prepared import write_pictures
from tests.flows.mutations import (
    Mutation,
    adapter_files,
    clips,
    mutated,
    mutations,
    pictures,
    row_files,
)
from tests.media import frames_of
from tests.properties import at_both_sizes
from tests.tiny import tiny_config, tiny_processor

LIMITS = MediaLimits(
    max_image_pixels=10**6,
    max_frames=1000,
    max_seconds=3600,
    decode_timeout=10,
    allow_files=False,
    allow_urls=False,
)
MAX_CPU_SECONDS = 2.0  # of one file, in this process
MAX_SECONDS = 30.0  # by the clock, on a busy machine
MAX_GROWTH = 64 << 20  # bytes, of the largest resident set over all files of a surface
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
ROWS = DataConfig(sources=(SourceConfig(path="x"),), frame_cache_gb=0)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


@contextmanager
def bounded(peak_before: int) -> Iterator[None]:
    """Check time and memory, and that an error has a text of one line."""
    cpu, clock = time.process_time(), time.monotonic()
    try:
        yield
    except (Qwen2VLError, SampleError) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 1000, text
    assert time.process_time() - cpu < MAX_CPU_SECONDS
    assert time.monotonic() - clock < MAX_SECONDS
    assert peak_bytes() - peak_before < MAX_GROWTH


def check_picture(data: bytes) -> None:
    """The decoded image has the size of the header."""
    with open_encoded(Media(content=data), LIMITS, "x") as (image, _):
        size = oriented_size(image)
    decoded = decode_media(Media(content=data), LIMITS, "x").image
    assert decoded.mode == "RGB"
    assert size == (decoded.height, decoded.width)


def first_and_last(video: VideoReader) -> list[np.ndarray] | None:
    last = len(video.metadata.timestamps) - 1
    return frames_of(video, sorted({0, min(1, last), last}))


def check_clip(data: bytes) -> None:
    """The first and last frames are RGB."""
    video = open_video(data, LIMITS, "x", fps=2, apply_exif_orientation=True)
    try:
        frames = first_and_last(video) or first_and_last(video)  # new timestamps, once
        assert frames
        for frame in frames:
            assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    finally:
        video.close()


@functools.cache
def peak_after_valid_pictures() -> int:
    for data in pictures():
        check_picture(data)
    return peak_bytes()


@functools.cache
def peak_after_valid_clips() -> int:
    for data in clips():
        check_clip(data)
    return peak_bytes()


def picture_is_refused_or_right(index: int, changes: list[Mutation]) -> None:
    data = mutated(pictures()[index % len(pictures())], changes, pictures())
    with bounded(peak_after_valid_pictures()):
        check_picture(data)


def clip_is_refused_or_right(index: int, changes: list[Mutation]) -> None:
    data = mutated(clips()[index % len(clips())], changes, clips())
    with bounded(peak_after_valid_clips()):
        check_clip(data)


def check_rows(name: str, data: bytes) -> int:
    """Read and measure the rows of a file; return how many could be used."""
    num_used, texts = 0, []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        path = Path(folder, name)
        path.write_bytes(data)
        processor = tiny_processor()
        source = open_source(
            SourceConfig(path=str(path)),
            ROWS,
            tokenizer=processor.tokenizer,
            cache_dir=Path(folder, "cache"),
            seed=0,
            default_system=0.0,
        )
        preprocessor = HeaderPreprocessor(processor, ROWS, media_root=source.media_root)
        for index in range(min(len(source), 8)):
            try:
                assert len(preprocessor.prepare(source.read(index)).input_ids) > 0
                num_used += 1
            except SampleError as error:
                texts.append(f"{error.reason}: {error}")
    assert not [text for text in texts if "\n" in text or text.startswith(":")], texts
    return num_used


@functools.cache
def peak_after_valid_rows() -> int:
    for name, data in row_files().items():
        assert check_rows(name, data) > 0
    return peak_bytes()


def rows_are_refused_or_used(name: str, changes: list[Mutation]) -> None:
    data = mutated(row_files()[name], changes, list(row_files().values()))
    with bounded(peak_after_valid_rows()):
        check_rows(name, data)


@functools.cache
def valid_adapter() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return adapter_files(Path(folder, "adapter"))


def check_adapter(files: dict[str, bytes]) -> int:
    """Read an adapter from its files; return the number of layers that it has factors of."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        settings, tensors = read_adapter(folder)
        return len(parse_peft_adapter(settings, tensors, meta_model(tiny_config()), where="x"))


@functools.cache
def peak_after_valid_adapter() -> int:
    assert check_adapter(valid_adapter()) > 0
    return peak_bytes()


def adapter_is_refused_or_read(name: str, changes: list[Mutation]) -> None:
    files = valid_adapter()
    data = mutated(files[name], changes, list(files.values()))
    with bounded(peak_after_valid_adapter()):
        check_adapter({**files, name: data})


INDEX = st.integers(0, 10_000)


@pytest.mark.parametrize(
    "check", at_both_sizes(picture_is_refused_or_right, INDEX, mutations, examples=100)
)
def test_mutated_pictures(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check", at_both_sizes(clip_is_refused_or_right, INDEX, mutations, examples=100)
)
def test_mutated_clips(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    at_both_sizes(
        rows_are_refused_or_used, st.sampled_from(sorted(row_files())), mutations, examples=100
    ),
)
def test_mutated_rows(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    at_both_sizes(
        adapter_is_refused_or_read,
        st.sampled_from(
            ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")
            + ("added_tokens.json", "vit.safetensors")
        ),
        mutations,
        examples=100,
    ),
)
def test_mutated_adapters(check: Callable[[], None]) -> None:
    check()
