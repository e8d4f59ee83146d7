"""Pictures and videos on the page: tokens, the slider, frames, the camera, dropping and pasting."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import av
import httpx2
import numpy as np
import pytest
from PIL import Image

from qwen2vl.processor.image import smart_resize
from tests.requirements import needs_chromium
from tests.server.conftest import LiveServer
from tests.server.page.conftest import (
    EXAMPLES,
    ask,
    attach,
    expect,
    expect_value,
    requests_of,
    write_picture,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

COLORS = ["red", "lime", "blue", "yellow", "white", "black", "cyan", "magenta"]
TOKENS = re.compile(r"^\d+ tokens$")
SIZES = [
    *((1, 1), (28, 28), (27, 29), (14, 14), (42, 42), (70, 98), (112, 112), (113, 99)),
    *((106, 115), (125, 83), (640, 427), (896, 896), (1000, 800), (1024, 768), (4000, 3000)),
    *((20, 4000), (4000, 20), (3, 500), (500, 3), (2000, 10), (12_000, 100), (350, 350)),
]


def write_clip(path: Path) -> Path:
    """Write a clip of 16 frames in 4 s, two of each color, which a browser can play."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=4)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(16):
            image = Image.new("RGB", (128, 96), COLORS[index // 2])
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    return path


def write_animation(path: Path) -> Path:
    """Write an animated GIF of the same frames."""
    frames = [Image.new("RGB", (128, 96), COLORS[index // 2]) for index in range(16)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, loop=0)
    return path


# Tokens -------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_processor(page: Page) -> None:
    limits = [(12_544, 802_816), (3136, 12_845_056), (784, 784), (12_544, 50_176), (1, 100)]
    cases = [(w, h, low, high) for w, h in SIZES for low, high in limits]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(side) for side in rng.integers(1, 6000, 2))
        low, high = sorted(int(area) for area in np.exp(rng.uniform(6, 16, 2)))
        cases.append((width, height, low, high))
    script = """async (cases) => {
        const module = new URL("page/js/compose/resize.js", document.baseURI);
        const { resizedSize } = await import(module);
        return cases.map(([width, height, minPixels, maxPixels]) => {
            const size = resizedSize(width, height, { factor: 28, minPixels, maxPixels });
            return size && [size.height, size.width];
        });
    }"""
    for case, size in zip(cases, page.evaluate(script, cases), strict=True):
        width, height, low, high = case
        if max(width, height) / min(width, height) > 200:
            assert size is None, case
        else:
            expected = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
            assert tuple(size) == expected, case


def test_the_badge_is_what_the_server_counts(page: Page, tmp_path: Path) -> None:
    for size in [(640, 427), (30, 700), (1500, 1200)]:
        page.click("#new")
        attach(page, write_picture(tmp_path / f"{size[0]}.png", size))
        expect(page.locator(".badge")).to_have_text(TOKENS)
        badge = page.locator(".badge").inner_text()
        ask(page, "What is it?")
        expect(page.locator(".question .media .note")).to_have_text(re.compile(f"· {badge}$"))


def test_the_slider_limits_the_size_of_the_request(page: Page, tmp_path: Path) -> None:
    attach(page, write_picture(tmp_path / "large.png", (1000, 800)))
    badge, slider = page.locator(".badge"), page.locator("#picture-size")
    expect(badge).to_have_text("980 tokens")
    for key, text in [("Home", "16 tokens each"), ("End", "1,024 tokens each")]:
        slider.press(key)
        expect(page.locator("#size-text")).to_have_text(f"at most {text}")
    expect(badge).to_have_text("980 tokens")
    for number in range(1, 5):
        slider.press("PageDown")
        expect(slider).to_have_value(str(100 - 10 * number))
    expect(badge).not_to_have_text("980 tokens")
    tokens = badge.inner_text()
    limit = page.locator("#size-text").inner_text()
    assert int(tokens.split()[0]) < int(limit.split()[2]) + 1 < 1000
    sent = requests_of(page)
    ask(page, "What is it?")
    expect(page.locator(".question .media .note")).to_have_text(
        re.compile(f"· {tokens} · size limited$")
    )
    assert sent[0]["messages"][0]["content"][0]["max_pixels"] == int(limit.split()[2]) * 784


def test_the_limits_come_from_the_server(live_server: LiveServer) -> None:
    limits = httpx2.get(f"{live_server.base_url}/v1/models").json()["data"][0]["limits"]
    processor = live_server.state.engine.llm.processor
    assert limits["resize_factor"] == 28
    assert limits["min_pixels"] == processor.pixels.min_pixels
    assert limits["max_pixels"] == processor.pixels.max_pixels
    assert limits["max_body_bytes"] == live_server.state.config.max_body_bytes


# Videos -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"), [("clip.webm", write_clip), ("clip.gif", write_animation)]
)
def test_the_frames_that_the_server_used_are_drawn(
    page: Page, tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    attach(page, write(tmp_path / name))
    expect(page.locator(".badge")).to_have_text("video")
    expect(page.locator("#size-row")).to_be_hidden()
    posts = requests_of(page)
    ask(page, "Which one begins to move first?")
    expect(page.locator(".frames li")).to_have_count(8)
    times = [float(t.split()[0]) for t in page.locator(".frames span").all_inner_texts()]
    page.wait_for_function(  # until the last one is drawn
        """() => { const all = document.querySelectorAll(".frames canvas");
        const last = all[all.length - 1];
        return last.getContext("2d").getImageData(9, 9, 1, 1).data[3] > 0; }"""
    )
    drawn = page.evaluate(
        """() => [...document.querySelectorAll(".frames canvas")].map((one) =>
        [...one.getContext("2d").getImageData(one.width / 2, one.height / 2, 1, 1).data])"""
    )
    for seconds, pixel in zip(times, drawn, strict=True):
        index = round(seconds / 0.25 - 0.4) if seconds else 0
        candidates = {COLORS[i // 2] for i in (index, min(index + 1, 15))}
        assert any(is_near(pixel, color) for color in candidates), (seconds, pixel)
    assert len(posts) == 1
    expect(page.locator(".strip .note")).to_contain_text("8 frames of")


def is_near(pixel: list[int], color: str) -> bool:
    expected = Image.new("RGB", (1, 1), color).getpixel((0, 0))
    assert isinstance(expected, tuple)
    return all(abs(a - b) < 40 for a, b in zip(pixel[:3], expected, strict=True))


# Other ways to add pictures -----------------------------------------------------------------------

DISPATCH = """async ([type, name, mime, numbers]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(numbers)], name, { type: mime }));
    const event = type === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
    return event.defaultPrevented;
}"""


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page: Page, way: str) -> None:
    numbers = list((EXAMPLES / "text.png").read_bytes())
    if way == "drop":
        page.evaluate(DISPATCH, ["dragenter", "a.png", "image/png", numbers])
        expect(page.locator("#drop")).to_be_visible()
    assert page.evaluate(DISPATCH, [way, "a.png", "image/png", numbers])
    page.locator("#attachments li").wait_for()
    expect(page.locator("#drop")).to_be_hidden()
    assert ask(page, "What does it say?") == "Tea 3.50"


def test_the_camera_takes_a_picture(page: Page) -> None:
    page.click("#camera")
    page.locator("#camera-dialog[open]").wait_for()
    page.click("#camera-take")  # which can be used when there is a picture
    page.locator("#attachments li[title='camera.jpg']").wait_for()
    expect_value(page, "document.getElementById('camera-video').srcObject", None)


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("notes.txt", b"text", "notes.txt is neither a picture nor a video."),
        ("cut.png", b"\x89PNG\r\n", "cut.png cannot be opened"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg is an SVG drawing, which"),
        ("IMG_001.HEIC", b"\0\0\0\x18ftypheic", "IMG_001.HEIC is a HEIC photo, which the server"),
        ("a.avif", b"\0\0\0\x18ftypavif", "a.avif is an AVIF picture, which the server"),
        ("a.pdf", b"%PDF-1.7", "Save its pages as PNG."),
    ],
)
def test_other_files_are_refused_by_a_sentence(
    page: Page, tmp_path: Path, name: str, data: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(data)
    page.set_input_files("#file", tmp_path / name)
    page.locator("#composer-problem", has_text=sentence).wait_for()
    expect(page.locator("#attachments li")).to_have_count(0)


def test_an_upright_picture_has_its_boxes_in_the_right_place(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture = Image.open(EXAMPLES / "boxes.png").rotate(90, expand=True)
    picture.save(path, exif=exif, quality=95)
    ask(page, "Show me where the blue cross is.", path)
    image = "document.querySelector('.canvas img')"
    expect_value(page, f"[{image}.naturalWidth, {image}.naturalHeight]", [195, 155])
    line = page.locator("rect.line")
    x, y = (float(line.get_attribute(name) or "") for name in ("x", "y"))
    assert 115 < x < 130 and 60 < y < 75  # the cross lies right of the middle
