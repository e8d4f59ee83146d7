"""Frame pairs of a long video, decoded while they are consumed: `FramePairStream`.

A thread decodes, resizes, hashes and patchifies a bounded number of pairs ahead of the engine's
prefill, so that memory does not grow with the length of the video. Digests (32 bytes a pair) are
kept, patches only until the consumer has passed them. After a preemption, or for a second consumer,
decoding begins again at the pair that is wanted. Short videos are decoded at once (video.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, islice

import torch
from torch import Tensor

from qwen2vl.config import VisionConfig
from qwen2vl.errors import EngineError, InputError, copy_error
from qwen2vl.processor.image import pair_digests, patchify
from qwen2vl.processor.media.video_metadata import (
    FramesDifferError,
    FrameTransform,
    VideoMetadata,
    VideoReader,
)

__all__ = ["DecodedPair", "FramePairStream", "OpenPairs", "decode_pairs"]

MAX_BUFFERED_BYTES = 32 * 2**20  # of patches; a single pair may be larger
MAX_PASSED = 8  # pairs that are decoded in vain rather than decoding anew from a later one


@dataclass(frozen=True, slots=True)
class DecodedPair:
    """One frame pair."""

    digest: bytes  # as those of Item.pair_digests
    patches_NP: Tensor


# Decodes the pairs from the one of this index; closing the generator closes the video.
OpenPairs = Callable[[int], Generator[DecodedPair, None, None]]


@dataclass(eq=False)
class _State:
    """What the decoding thread and the stream share, under `changed`."""

    num_pairs: int
    open_pairs: OpenPairs
    changed: threading.Condition = field(default_factory=threading.Condition)
    digests: dict[int, bytes] = field(default_factory=dict[int, bytes])
    patches: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    first: int = 0  # the pair that decoding began with
    next: int = 0  # the pair that is decoded next
    wanted: int = 0  # patches of earlier pairs are not kept
    generation: int = 0  # a thread of an older one ends
    is_running: bool = False
    error: Exception | None = None

    @property
    def is_full(self) -> bool:
        return sum(patches.nbytes for patches in self.patches.values()) >= MAX_BUFFERED_BYTES

    def close(self) -> None:
        """End the thread."""
        with self.changed:
            self.generation += 1
            self.is_running = False
            self.patches.clear()
            self.changed.notify_all()


class FramePairStream:
    """The frame pairs of one video. Thread-safe; the thread ends with the last reference."""

    def __init__(self, num_pairs: int, open_pairs: OpenPairs, held_bytes: int = 0) -> None:
        """Decode nothing yet; the first `prefetch` starts.

        Args:
            num_pairs: of the video.
            open_pairs: decodes them.
            held_bytes: that `open_pairs` keeps in memory, such as the file.
        """
        self.num_bytes = held_bytes + MAX_BUFFERED_BYTES
        self._state = _State(num_pairs, open_pairs)
        weakref.finalize(self, self._state.close)

    def digest(self, index: int) -> bytes | None:
        """Return the digest of a pair; None if it has not been decoded yet."""
        return self._state.digests.get(index)

    def patches(self, index: int) -> Tensor | None:
        """Return the patches of a pair; None if they are not decoded, or released again."""
        with self._state.changed:
            return self._state.patches.get(index)

    def prefetch(self, index: int) -> None:
        """Decode from this pair on, and release the patches of earlier ones.

        Raises:
            InputError: the video cannot be decoded there.
            EngineError: no decoder is available.
        """
        state = self._state
        with state.changed:
            if state.error is not None:
                raise _raisable(state.error)
            is_ahead = 0 <= index - state.next <= MAX_PASSED
            if index in state.patches or (state.is_running and is_ahead):
                self._release_before(index)
                return
            # Another consumer's pair is delivered first, so that two make progress by turns.
            if state.is_running and not state.patches and state.next == state.first:
                return
            self._release_before(state.num_pairs)
            self._start(index)

    def wait(self, index: int, timeout: float) -> None:
        """Return when the next pair has been decoded, or after `timeout`; at once if it is there.

        That may be another consumer's pair: then `prefetch` is called again.
        """
        state = self._state
        with state.changed:
            if index not in state.patches and state.error is None and state.is_running:
                state.changed.wait(timeout)

    def close(self) -> None:
        """End decoding; a later `prefetch` begins again."""
        self._state.close()

    def _release_before(self, index: int) -> None:
        state = self._state
        state.wanted = index
        released = [i for i in state.patches if i < index]
        for i in released:
            del state.patches[i]
        if released:
            state.changed.notify_all()

    def _start(self, index: int) -> None:
        state = self._state
        state.generation += 1
        state.first = state.next = state.wanted = index
        state.is_running = True
        state.changed.notify_all()
        threading.Thread(
            target=_decode,
            args=(state, state.generation),
            name="video-decoding",
            daemon=True,
        ).start()


def _decode(state: _State, generation: int) -> None:
    """Decode pairs from `state.next` on while there is space, until the generation has changed."""
    try:
        with closing(state.open_pairs(state.next)) as pairs:
            for pair in pairs:
                with state.changed:
                    if state.generation != generation:
                        return
                    state.digests[state.next] = pair.digest
                    if state.next >= state.wanted:
                        state.patches[state.next] = pair.patches_NP
                    state.next += 1
                    state.changed.notify_all()
                    if state.next == state.num_pairs:
                        return  # without waiting: the file is closed
                    state.changed.wait_for(
                        lambda: state.generation != generation or not state.is_full
                    )
                    if state.generation != generation:
                        return
    except Exception as error:
        with state.changed:
            if state.generation == generation:
                state.error = error
    finally:
        with state.changed:
            if state.generation == generation:
                state.is_running = False
                state.changed.notify_all()


def decode_pairs(
    open_reader: Callable[[], VideoReader],
    metadata: VideoMetadata,
    indices: Sequence[int],
    resize: FrameTransform[Tensor],
    vision: VisionConfig,
    name: str,
) -> OpenPairs:
    """Return a function that decodes the pairs of the frames `indices`, in display order.

    Args:
        open_reader: opens the video anew.
        metadata: that the frames were chosen by.
        indices: of the frames, with repeats; two of them are a pair, and an odd last one is.
        resize: makes a frame a tensor (C, H, W).
        vision: sizes of patches.
        name: for errors.
    """
    step = vision.temporal_patch_size

    def decode(first: int) -> Generator[DecodedPair, None, None]:
        wanted = indices[first * step :]
        with closing(open_reader()) as reader:
            if reader.metadata != metadata:
                raise InputError(f"{name} has changed since it was opened; ask again")
            frames = _repeated(reader.frames_at(sorted(set(wanted)), resize), wanted)
            while pair := list(islice(frames, step)):
                yield _preprocess_pair(torch.stack(pair), vision)

    def open_pairs(first: int) -> Generator[DecodedPair, None, None]:
        count = first
        try:
            for pair in decode(first):
                yield pair
                count += 1
        except FramesDifferError as error:
            seconds = metadata.timestamps[indices[count * step]]
            raise InputError(
                f"{name}: its frames are not those that its index lists, from {seconds:.1f} s on; "
                f"give video_end {seconds:.1f}, or repair it by writing it anew (ffmpeg -i {name} "
                "-c:v libx264 repaired.mp4)"
            ) from error

    return open_pairs


def _repeated(frames: Iterator[Tensor], indices: Sequence[int]) -> Iterator[Tensor]:
    """Yield a frame for each of `indices`, from one for each distinct index."""
    for _, group in groupby(indices):
        frame = next(frames)
        yield from (frame for _ in group)


def _preprocess_pair(frames_FCHW: Tensor, vision: VisionConfig) -> DecodedPair:
    patches_NP, grid = patchify(frames_FCHW, vision)
    (digest,) = pair_digests(frames_FCHW, grid, vision)
    return DecodedPair(digest, patches_NP)


def _raisable(error: Exception) -> Exception:
    """Return an error to raise in another thread."""
    if isinstance(error, (InputError, EngineError)):
        return copy_error(error)
    wrapped = EngineError(
        f"decoding a video failed by a bug of this library: {type(error).__name__}: {error}; "
        "report it, and convert the video to MP4"
    )
    wrapped.__cause__ = error
    return wrapped
