"""Recipes are found by name or path, and each one is a run that could begin."""

from pathlib import Path

import pytest

from qwen2vl import recipes
from qwen2vl.errors import ConfigError
from qwen2vl.train.schedule import draw


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_builds_and_knows_its_first_and_last_step(name: str) -> None:
    config = recipes.build(name)
    assert config.name == name
    assert draw(config, 0).stage is next(s for s in config.stages if s.steps)
    assert draw(config, config.steps - 1).stage is config.stages[-1]


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from qwen2vl.recipes.tiny import recipe\n")
    assert recipes.build(str(path)) == recipes.build("tiny")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan0", r"did you mean nano\? a file's name must end in \.py"),
        ("nowhere/x.py", "no such recipe file"),
        ("zzz", r"known are nano, tiny; a file's name must end in \.py"),
    ],
)
def test_what_is_not_there_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipes.build(name)


@pytest.mark.parametrize("text", ["def recipe(:", "import no_such_module", "1 / 0"])
def test_a_file_that_fails_is_its_own_fault(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.py: the recipe fails when it is read: \w+: "):
        recipes.build(str(path))


def test_a_file_without_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"no function recipe\(\)"):
        recipes.build(str(path))
