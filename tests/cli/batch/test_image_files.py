"""Which images `--images` finds, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.cli.batch.image_files import describe_skipped, list_images
from qwen2vl.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of files, and work in its parent."""
    monkeypatch.chdir(tmp_path)
    names = ("10.png", "2.PNG", "a.txt", ".b.png", "sub/1.tiff", ".git/c.png", "sub/deep/d.webp")
    for name in names:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "pictures"


def test_a_folder_has_its_images_and_those_of_subfolders(folder: Path) -> None:
    names = ["2.PNG", "10.png", "sub/1.tiff", "sub/deep/d.webp"]
    assert list_images(["pictures"]) == [f"pictures/{name}" for name in names]
    assert list_images([str(folder)]) == [f"{folder}/{name}" for name in names]


def test_patterns_have_all_files_that_match(folder: Path) -> None:
    assert list_images(["pictures/*"]) == ["pictures/2.PNG", "pictures/10.png", "pictures/a.txt"]
    assert list_images(["pictures/**/*.tiff"]) == ["pictures/sub/1.tiff"]


def test_files_are_taken_once_in_the_order_given(folder: Path) -> None:
    (folder / "[x].png").touch()
    sources = ["pictures/10.png", "pictures/[x].png", "pictures/*.png"]
    assert list_images(sources) == ["pictures/10.png", "pictures/[x].png"]


@pytest.mark.parametrize("source", ["none", "none/*.png", "pictures/sub/deep/deeper"])
def test_nothing_found_is_an_error(folder: Path, source: str) -> None:
    (folder / "sub/deep/deeper").mkdir()
    with pytest.raises(InputError, match="--images"):
        list_images([source])


def test_images_of_other_formats_are_named(folder: Path) -> None:
    for name in ("x10.heic", "x9.SVG", "x1.jxl", "x2.psd"):
        (folder / name).touch()
    skipped: list[str] = []
    found = list_images(["pictures", "pictures/2.PNG"], on_skipped=skipped.append)
    assert len(found) == 4
    assert sorted(skipped) == [f"pictures/{n}" for n in ("x1.jxl", "x10.heic", "x2.psd", "x9.SVG")]
    text = "4 images are skipped, as the format is not supported: "
    text += "pictures/x1.jxl, pictures/x2.psd, pictures/x9.SVG and 1 more"
    assert describe_skipped(skipped) == text
    (folder / "only").mkdir()
    (folder / "only/a.heic").touch()
    with pytest.raises(InputError, match=r"has no image .*1 image is skipped, .*only/a.heic"):
        list_images(["pictures/only"])
