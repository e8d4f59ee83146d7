"""Paths of a config file are those of its folder; tests/cli/commands/test_serve.py has the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.cli.commands.serve import serve
from qwen2vl.cli.serve.config_file import read_config_file


def read(folder: Path, content: str) -> dict[str, Any]:
    path = folder / "server.toml"
    path.write_text(content)
    return read_config_file(str(path), serve)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model", "nano", "x=y"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("model", "{}/model"),
        ("./model", "{}/model"),
        ("nano", "nano"),  # always the packaged one
        ("./nano", "{}/nano"),
        ("org/model", "org/model"),  # no such folder: a repo id
        ("~/model", "~/model"),
    ],
)
def test_models(folder: Path, model: str, path: str) -> None:
    assert read(folder, f"model = '{model}'") == {"model": path.format(folder)}


def test_lora_modules(folder: Path) -> None:
    expected = [{"name": "a", "path": f"{folder}/one"}, {"name": "b", "path": "/two"}]
    for content in (
        "lora-modules = ['a=one', 'b=/two']",
        "lora-modules = [{name = 'a', path = 'one'}, {name = 'b', path = '/two'}]",
        "[lora-modules]\na = 'one'\nb = '/two'",
    ):
        given = read(folder, content)["lora_modules"]
        assert [json.loads(one) for one in given] == expected


def test_other_folders(folder: Path) -> None:
    given = read(folder, "allowed-local-media-path = 'media'\nadapter = ['one', 'a=one', 'x=y']")
    assert given["allowed_local_media_path"] == f"{folder}/media"
    assert given["adapters"] == [f"{folder}/one", f"a={folder}/one", f"{folder}/x=y"]


def test_a_file_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("server.toml").write_text("model = './nano'\nallowed-local-media-path = 'media'")
    given = read_config_file("server.toml", serve)
    assert given == {"model": "./nano", "allowed_local_media_path": "media"}
