"""Video files as they are displayed: pixel aspect ratio, rotation and transparency."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from qwen2vl.data.preprocess import HeaderPreprocessor, SamplePreprocessor
from qwen2vl.errors import MediaTooLargeError
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_frame import displayed_size, frame_to_rgb
from qwen2vl.processor.media.video_reader import PyAVVideoReader
from qwen2vl.processor.media.video_source import open_video
from tests.media import encoded_video, frames_of, video, with_matrix
from tests.tiny import tiny_processor
from tests.train.test_bad_inputs import DATA, conversation_about

CLIPS = Path(__file__).parent / "clips"
RED = (200, 0, 0)


def open_reader(content: bytes | Path, **options: Any) -> PyAVVideoReader:
    return PyAVVideoReader(Media(content=content), MediaLimits(), "video 1", **options)


def decoded(content: Any, indices: Sequence[int] = (0,), *, exif: bool = True) -> list[np.ndarray]:
    reader = open_video(content, MediaLimits(), "video 1", fps=2, apply_exif_orientation=exif)
    frames = frames_of(reader, indices)
    assert frames is not None
    return frames


def stretched(
    ratio: Fraction, *, codec: str = "libx264", container: str = "mp4", **size: int
) -> bytes:
    """Encode four frames of non-square pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = size.get("width", 64), size.get("height", 48)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for i in range(4):
            pixels = np.full((stream.height, stream.width, 3), 40 * i, np.uint8)
            pixels[:20, 40:] = 250
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def with_pasp(mp4: bytes, horizontal: int, vertical: int) -> bytes:
    """Write a sample aspect ratio into an MP4's box of it, in place of the one that is there."""
    start = mp4.index(b"pasp") + 4
    return mp4[:start] + struct.pack(">II", horizontal, vertical) + mp4[start + 8 :]


def quadrants(alphas: Sequence[int] = (255, 255, 128, 0)) -> np.ndarray:
    """Return 48 x 64 red pixels of four alphas: top left, bottom left, top right, bottom right."""
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[..., :3] = RED
    rgba[:24, :32, 3], rgba[24:, :32, 3], rgba[:24, 32:, 3], rgba[24:, 32:, 3] = alphas
    return rgba


def transparent(
    codec: str, pixel_format: str, container: str, frames: Sequence[Any], **options: str
) -> bytes:
    """Encode RGBA frames, or (indices, palette) for pal8."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        for index, content in enumerate(frames):
            if pixel_format == "pal8":
                frame = av.VideoFrame.from_ndarray(content, format="pal8")
            else:
                frame = av.VideoFrame.from_ndarray(content, format="rgba")
                frame = frame.reformat(format=pixel_format)
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def paletted() -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and the palette (ARGB) of `quadrants`."""
    palette = np.zeros((256, 4), np.uint8)
    palette[:3] = [(255, *RED), (128, *RED), (0, *RED)]
    indices = np.zeros((48, 64), np.uint8)
    indices[:24, 32:], indices[24:, 32:] = 1, 2
    return indices, palette


def assert_quadrants(frame: np.ndarray, top_right: Sequence[int], bottom_right: Any) -> None:
    for (y, x), color in {
        (10, 10): RED,
        (40, 10): RED,
        (10, 50): top_right,
        (40, 50): bottom_right,
    }.items():
        assert frame[y, x].tolist() == pytest.approx(list(color), abs=3), (y, x)


# Pixel aspect ratio ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "ratio", "displayed"),
    [
        ((480, 320), Fraction(2), (480, 640)),
        ((480, 720), Fraction(8, 9), (540, 720)),  # NTSC: taller, not narrower
        ((576, 720), Fraction(16, 15), (576, 768)),  # PAL
        ((768, 1366), Fraction(2048, 2049), (768, 1366)),  # half a pixel: of a rounded 16:9
        ((1, 1), Fraction(1, 10), (10, 1)),
    ],
)
def test_the_coarser_side_grows(
    stored: tuple[int, int], ratio: Fraction, displayed: tuple[int, int]
) -> None:
    assert displayed_size(*stored, ratio) == displayed


def test_clip_of_narrow_pixels_is_seen_twice_as_wide() -> None:
    item = video(CLIPS / "sar2.mp4")
    assert item.original_size == (480, 640)
    assert item.notes[0] == "320 x 480 pixels of aspect ratio 2:1, displayed as 640 x 480"
    assert item.resized_size == (476, 644)


@pytest.mark.parametrize("preset", ["qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"])
def test_presets_of_qwen_vl_utils_see_stored_pixels(preset: str) -> None:
    item = video(CLIPS / "sar2.mp4", preset=preset)
    assert item.original_size == (480, 320)
    assert len(item.notes) == 1


def test_frames_are_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the stored size to the last: that gives what one resize of the stored frames gives."""
    calls: list[tuple[int, ...]] = []
    interpolate = torch.nn.functional.interpolate

    def record(frame: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((*frame.shape[2:], *options["size"]))
        return interpolate(frame, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", record)
    video(CLIPS / "sar2.mp4")
    assert set(calls) == {(480, 320, 476, 644)}


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
def test_ratio_of_containers_and_codecs(container: str, codec: str) -> None:
    """AVI and MPEG-TS have none of their own: it is in the codec's headers."""
    reader = open_reader(stretched(Fraction(3, 2), codec=codec, container=container))
    assert (reader.metadata.height, reader.metadata.width) == (48, 96)


def test_the_container_takes_precedence() -> None:
    """As in ffplay: the codec of this file says 2:1."""
    reader = open_reader(with_pasp(stretched(Fraction(2)), 1, 2))
    assert (reader.metadata.height, reader.metadata.width) == (96, 64)
    reader = open_reader(with_pasp(stretched(Fraction(2)), 1, 1))
    assert (reader.metadata.height, reader.metadata.width) == (48, 64)


def test_ratio_is_applied_before_rotation() -> None:
    """A quarter turn: what is wide as stored is tall as displayed."""
    reader = open_reader(with_matrix(stretched(Fraction(2)), (0, 1, -1, 0)))
    assert (reader.metadata.height, reader.metadata.width) == (128, 48)
    item = video(with_matrix(stretched(Fraction(2)), (0, 1, -1, 0)))
    assert item.original_size == (128, 48)
    assert item.resized_size[0] > 2 * item.resized_size[1]
    half_turn = open_reader(with_matrix(stretched(Fraction(2)), (-1, 0, 0, -1)))
    assert (half_turn.metadata.height, half_turn.metadata.width) == (48, 128)


@pytest.mark.parametrize(
    ("pasp", "note"),
    [
        ((0, 1), ""),
        ((1, 0), ""),
        ((1, 1), ""),
        ((7, 7), ""),
        ((1000, 1), "sample aspect ratio 1000:1 ignored: more than 10 to 1"),
        ((1, 11), "sample aspect ratio 1:11 ignored: more than 10 to 1"),
        ((0xFFFFFFFF, 1), ""),  # negative in FFmpeg
    ],
)
def test_impossible_ratios_are_ignored(pasp: tuple[int, int], note: str) -> None:
    """The codec of these files says nothing."""
    mp4 = with_pasp(stretched(Fraction(2), codec="libvpx-vp9"), *pasp)
    reader = open_reader(mp4)
    assert (reader.metadata.height, reader.metadata.width) == (48, 64)
    assert reader.metadata.notes == ((note,) if note else ())


def test_displayed_size_is_limited() -> None:
    limits = MediaLimits(max_image_pixels=48 * 64)
    with pytest.raises(MediaTooLargeError, match="is 640 x 48, limit is 3,072 pixels a frame"):
        PyAVVideoReader(Media(content=stretched(Fraction(10))), limits, "video 1")


def test_square_pixels_are_unchanged() -> None:
    """Whether a file says 1:1 or nothing, in the preset that reads it and in those that do not."""
    plain, square = encoded_video(8), stretched(Fraction(1))
    assert video(plain).notes == ("4 of 8 frames, 5 fps, 56 x 56",)
    for data in (plain, square):
        shown, stored = decoded(data), decoded(data, exif=False)
        assert np.array_equal(shown[0], stored[0])
        with av.open(io.BytesIO(data)) as container:
            first = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.array_equal(shown[0], first)


@pytest.mark.parametrize("name", ["sar2.mp4", "al_vp9.webm"])
def test_training_by_headers_has_the_decoded_size(name: str) -> None:
    sample = conversation_about("video", str(CLIPS / name))
    by_headers, by_frames = (
        kind(tiny_processor(), DATA).prepare(sample).items[0]
        for kind in (HeaderPreprocessor, SamplePreprocessor)
    )
    assert by_headers.grid == by_frames.grid
    assert by_headers.original_size == by_frames.original_size


# Transparency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["al_qtrle.mov", "al_vp9.webm"])
def test_transparent_clips_equal_the_animation(name: str) -> None:
    """The same frames as WebP, which Pillow decodes; VP9 has coarser colors at edges."""
    shown, animated = decoded(CLIPS / name, range(8)), decoded(CLIPS / "al.webp", range(8))
    for frame, want in zip(shown, animated, strict=True):
        assert frame[0, 0].tolist() == [255, 255, 255]
        assert np.abs(frame.astype(int) - want).mean() < 0.8
    assert "transparency composited on white" in video(CLIPS / name).notes


@pytest.mark.parametrize(
    ("codec", "pixel_format", "container", "options"),
    [
        ("libvpx-vp9", "yuva420p", "webm", {}),
        ("libvpx", "yuva420p", "webm", {"auto-alt-ref": "0"}),
        ("qtrle", "argb", "mov", {}),
        ("png", "rgba", "mov", {}),
        ("png", "rgba64be", "mov", {}),
        ("prores_ks", "yuva444p10le", "mov", {}),
        ("ffv1", "yuva420p", "matroska", {}),
        ("rawvideo", "bgra", "avi", {}),
        ("rawvideo", "argb", "mov", {}),
        ("utvideo", "gbrap", "avi", {}),
        ("cfhd", "gbrap12le", "mov", {}),
    ],
)
def test_transparency_is_composited_on_white(
    codec: str, pixel_format: str, container: str, options: dict[str, str]
) -> None:
    data = transparent(codec, pixel_format, container, [quadrants()] * 3, **options)
    first, last = decoded(data, [0, 2])
    assert_quadrants(first, (228, 127, 127), (255, 255, 255))
    assert_quadrants(last, (228, 127, 127), (255, 255, 255))
    (stored,) = decoded(data, exif=False)
    assert_quadrants(stored, RED, RED)


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m"])
@pytest.mark.parametrize("color_range", ["tv", "pc"])
def test_matrix_and_range_of_transparent_clips(matrix: str, color_range: str) -> None:
    """The visible colors are those of the conversion without alpha, which obeys both."""
    options = {"colorspace": matrix, "color_range": color_range}
    data = transparent("ffv1", "yuva420p", "matroska", [quadrants()] * 2, **options)
    with av.open(io.BytesIO(data)) as container:
        first = next(container.decode(video=0))
        assert first.color_range == {"tv": 1, "pc": 2}[color_range]
    shown, stored = decoded(data)[0], decoded(data, exif=False)[0]
    assert np.array_equal(shown[:, :32], stored[:, :32])


COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 80), (20, 20, 20), (235, 235, 235))
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of red and blue


def colored(matrix: int, color_range: int, pixel_format: str = "yuv444p") -> av.VideoFrame:
    """Return stripes of COLORS, converted as ITU-T H.273 defines a matrix and range."""
    r, g, b = (np.repeat(np.array(COLORS)[:, i], 8)[None].repeat(48, 0) / 255 for i in range(3))
    weight_r, weight_b = WEIGHTS[matrix]
    luma = weight_r * r + (1 - weight_r - weight_b) * g + weight_b * b
    blue, red = (b - luma) / (2 - 2 * weight_b), (r - luma) / (2 - 2 * weight_r)
    if color_range == 1:
        planes = [16 + 219 * luma, 128 + 224 * blue, 128 + 224 * red]
    else:
        planes = [255 * luma, 128 + 255 * blue, 128 + 255 * red]
    values = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(values, format="yuv444p").reformat(format=pixel_format)
    frame.colorspace, frame.color_range = matrix, color_range
    return frame


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_colors_are_those_of_the_declared_matrix_and_range(
    matrix: int, color_range: int, pixel_format: str
) -> None:
    frame = colored(matrix, color_range, pixel_format)
    rgb = frame_to_rgb(frame, composite_on_white=False)
    assert rgb[20, 4::8].tolist() == [pytest.approx(list(color), abs=3) for color in COLORS]


@pytest.mark.parametrize(
    ("pixel_format", "matrix", "color_range", "expected"),
    [
        ("yuv420p", 1, 1, (1, 1)),
        ("yuv420p", 5, 2, (5, 2)),
        ("yuva444p10le", 1, 1, (1, 1)),
        ("yuvj420p", 9, 0, (9, 2)),
    ],
)
def test_matrix_and_range_are_given_to_every_version_of_pyav(
    pixel_format: str, matrix: int, color_range: int, expected: tuple[int, int]
) -> None:
    """Versions before 17 use them only where those of the destination differ."""

    class Frame:
        format = av.VideoFormat(pixel_format)
        colorspace = matrix

        def reformat(self, **options: Any) -> av.VideoFrame:
            self.options = options
            return av.VideoFrame(8, 8, options["format"])

    frame: Any = Frame()
    frame.color_range = color_range
    frame_to_rgb(frame, composite_on_white=False)
    assert (frame.options["src_colorspace"], frame.options["src_color_range"]) == expected
    assert frame.options["dst_colorspace"] != matrix
    assert frame.options["dst_color_range"] == 2


def test_transparent_colors_of_a_palette() -> None:
    data = transparent("png", "pal8", "mov", [paletted()] * 2)
    assert_quadrants(decoded(data)[0], (228, 127, 127), (255, 255, 255))
    opaque = transparent("msrle", "pal8", "avi", [paletted()] * 2)
    assert_quadrants(decoded(opaque)[0], RED, RED)


def test_gray_with_alpha() -> None:
    data = transparent("png", "ya8", "mov", [quadrants()] * 2)
    frame = decoded(data)[0]
    assert frame[10, 10].tolist() == pytest.approx([60, 60, 60], abs=1)
    assert frame[40, 50].tolist() == [255, 255, 255]


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le", "gray16le", "yuvj420p", "bgr0"])
def test_formats_without_alpha_are_unchanged(pixel_format: str) -> None:
    codec = "mjpeg" if pixel_format == "yuvj420p" else "ffv1"
    data = transparent(codec, pixel_format, "matroska", [quadrants()] * 2)
    assert np.array_equal(decoded(data)[0], decoded(data, exif=False)[0])
    assert open_reader(data).metadata.notes == ()


def test_opaque_pixels_of_a_format_with_alpha_are_unchanged() -> None:
    data = transparent("ffv1", "yuva420p", "matroska", [quadrants([255] * 4)] * 2)
    assert np.array_equal(decoded(data)[0], decoded(data, exif=False)[0])
    assert open_reader(data).metadata.notes == ()


def test_alpha_of_zeros_alone_is_padding() -> None:
    """32-bit AVI, whose fourth byte most programs leave 0."""
    data = transparent("rawvideo", "bgra", "avi", [quadrants([0] * 4)] * 3)
    reader = open_reader(data)
    assert reader.metadata.notes == ("alpha channel ignored: it is 0 in all frames",)
    frames = decoded(data, [0, 2])
    assert all((frame == RED).all() for frame in frames)


def test_a_clip_that_fades_in_begins_white() -> None:
    data = transparent("qtrle", "argb", "mov", [quadrants([0] * 4)] * 2 + [quadrants()])
    first, last = decoded(data, [0, 2])
    assert (first == 255).all()
    assert_quadrants(last, (228, 127, 127), (255, 255, 255))


def test_clip_that_becomes_transparent() -> None:
    """Chromium records alpha from the first transparent frame on; before, it encodes none."""
    opaque = transparent("png", "rgb24", "mov", [quadrants([255] * 4)] * 3)
    clear = transparent("png", "rgba", "mov", [quadrants()] * 3)
    packets: list[bytes] = []
    for data, indices in ((opaque, (0, 1)), (clear, (2,))):
        with av.open(io.BytesIO(data)) as container:
            frames = [bytes(p) for p in container.demux(video=0) if p.size]
        packets += [frames[i] for i in indices]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as output:
        stream = output.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for i, content in enumerate(packets):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts = stream, i, i
            packet.time_base = Fraction(1, 10)
            packet.is_keyframe = True
            output.mux(packet)
    first, last = decoded(buffer.getvalue(), [0, 2])
    assert_quadrants(first, RED, RED)
    assert_quadrants(last, (228, 127, 127), (255, 255, 255))


def test_missing_decoder_of_alpha_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"vp9"})
    reader = open_reader(CLIPS / "al_vp9.webm")
    assert reader.metadata.notes == ("transparency dropped: this build of FFmpeg lacks libvpx-vp9",)


@pytest.mark.parametrize("name", ["sar2.mp4", "al_vp9.webm"])
def test_files_and_bytes_give_equal_items(name: str) -> None:
    assert video(CLIPS / name).pair_digests == video((CLIPS / name).read_bytes()).pair_digests
