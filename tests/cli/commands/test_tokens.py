"""`tokens`: the numbers of the processor, and the pixels of the model input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen2vl.loading import load_processor
from tests.cli.conftest import Run

Rows = dict[str, str]


def rows(stdout: str) -> Rows:
    return {line[:8].strip(): line[9:] for line in stdout.splitlines()}


def test_an_image(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run("tokens", "--model", tiny_folder, image_file)
    assert result.exit_code == 0
    assert rows(result.stdout) == {
        "file": "a photo.png",
        "original": "150 x 100 pixels",
        "resized": "140 x 112 pixels",
        "grid": "1 x 8 x 10 patches (time, height, width)",
        "tokens": "20",
    }
    assert result.stderr == ""


def test_several_files(run: Run, tiny_folder: Path, image_file: Path) -> None:
    Image.new("RGB", (56, 56)).save("b.png")
    result = run("tokens", "--model", tiny_folder, image_file, "b*.png")
    first, second = result.stdout.split("\n\n")
    assert (rows(first)["file"], rows(first)["tokens"]) == ("a photo.png", "20")
    assert (rows(second)["file"], rows(second)["tokens"]) == ("b.png", "4")
    result = run("tokens", "--model", tiny_folder, image_file, "b.png", "-o", "seen.png")
    assert result.exit_code == 2
    assert "-o seen.png: takes the pixels of one file, got 2; give one" in result.stderr


def test_json_output(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run("tokens", "--model", tiny_folder, image_file, image_file, "--json")
    first, second = json.loads(result.stdout)["items"]
    assert first == second
    assert first["name"] == "a photo.png"
    assert (first["original_size"], first["resized_size"]) == ([100, 150], [112, 140])
    assert (first["grid"], first["tokens"]) == ([1, 8, 10], 20)


def test_limits_apply(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run("tokens", "--model", tiny_folder, image_file, "--max-pixels", 8 * 784)
    assert int(rows(result.stdout)["tokens"]) <= 8


def test_the_written_image_is_the_resized_one(
    run: Run, tiny_folder: Path, image_file: Path
) -> None:
    run("tokens", "--model", tiny_folder, image_file, "-o", "seen.png")
    want = Image.open(image_file).resize((140, 112), Image.Resampling.BICUBIC)
    assert np.array_equal(np.array(Image.open("seen.png")), np.array(want))


def write_gif(path: Path, count: int) -> Path:
    """Write a GIF of uniform gray frames, half a second each."""
    frames = [Image.new("RGB", (112, 112), (20 * i + 10,) * 3) for i in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    return path


def test_a_video_becomes_a_contact_sheet(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    path = write_gif(tmp_path / "clip.gif", 5)
    result = run("tokens", "--model", tiny_folder, "--kind", "video", path, "-o", "sheet.png")
    assert result.exit_code == 0, result.stderr
    facts = rows(result.stdout)
    part = {"type": "video", "video": str(path)}
    item = load_processor(tiny_folder)([{"role": "user", "content": [part]}]).items[0]
    assert facts["tokens"] == f"{item.num_tokens:,}"
    assert facts["frames"].startswith(f"{len(item.frame_timestamps)}, at 0.00, 0.50")
    sheet = Image.open("sheet.png")
    height, width = item.resized_size
    count = 2 * item.grid.t
    assert sheet.size == (min(8, count) * width, -(-count // 8) * (height + 18))
    grays = [sheet.getpixel((i * width + width // 2, height // 2)) for i in range(4)]
    assert grays == sorted(grays)
    assert len(set(grays)) == 4


def test_files_of_another_type_are_errors(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<!doctype html><p>404</p>")
    result = run("tokens", "--model", tiny_folder, "page.png")
    assert result.exit_code == 2
    assert "page.png" in result.stderr
    assert "text/html" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("output", ["seen.xyz", "no/seen.png"])
def test_invalid_output_paths_are_errors_before_any_work(
    run: Run, tiny_folder: Path, image_file: Path, output: str
) -> None:
    result = run("tokens", "--model", tiny_folder, image_file, "-o", output)
    assert result.exit_code == 2
    assert result.stdout == ""
