"""Values that `serve` and `batch` share: lists, limits of media, the model's name."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from qwen2vl.cli.serve.server_options import (
    MAX_NUM_SEQS,
    parse_media_limits,
    served_model_name,
    split_values,
)
from qwen2vl.engine import EngineConfig
from qwen2vl.errors import ConfigError

OPTION = click.Option(["--name"], multiple=True)
CONTEXT = click.Context(click.Command("serve"))


def test_the_default_is_that_of_the_engine() -> None:
    assert EngineConfig().max_num_seqs == MAX_NUM_SEQS


def test_lists() -> None:
    values = ("a", "b, c,", '["d", "e,f"]')
    assert split_values(CONTEXT, OPTION, values) == ("a", "b", "c", "d", "e,f")
    for value in ("[", "[1]", "[[]]"):
        with pytest.raises(click.BadParameter, match="is not a JSON list of strings"):
            split_values(CONTEXT, OPTION, [value])


def test_media_limits() -> None:
    assert parse_media_limits("image=16, video=2") == {"image": 16, "video": 2}
    assert parse_media_limits('{"image": 16}') == {"image": 16}
    for text in ("x", "image", "image=a", "{", "image=1=2"):
        with pytest.raises(ConfigError, match=r"limit_mm_per_prompt: got .* must be as image=16"):
            parse_media_limits(text)


def test_a_model_has_the_name_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert served_model_name(f"{tmp_path}/model/.") == "model"
    assert served_model_name("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
