"""Recipes are found by name or path, and each one is a run that could begin."""

from pathlib import Path

import pytest
import torch

from qwen2vl import recipes
from qwen2vl.config import PRESETS
from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import fresh_factors, put_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.train.loader.data_order import draw
from qwen2vl.train.optim.optimizers import match_rules


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_builds_and_knows_its_first_and_last_step(name: str) -> None:
    config = recipes.build(name)
    assert config.name == name
    assert draw(config, 0).stage is next(s for s in config.stages if s.steps)
    assert draw(config, config.steps - 1).stage is config.stages[-1]


@pytest.mark.parametrize("name", recipes.names())
def test_the_rules_of_every_recipe_match_an_official_model(name: str) -> None:
    config = recipes.build(name)
    with torch.device("meta"):
        model = Qwen2VL(config.model or PRESETS["2B"])
    if config.adapter is not None:
        put_lora(model, fresh_factors(model, config.adapter, seed=0))
    names = [name for name, _ in model.named_parameters()]
    for stage in config.stages:
        moving = {name for name, scale in match_rules(names, stage.rules).items() if scale}
        assert moving


PUBLISHED = {"stage1_vision": 600e9, "stage2_joint": 800e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_stages_read_as_many_tokens_as_published(name: str) -> None:
    (stage,) = recipes.build(name).stages
    assert stage.data is not None
    tokens = stage.steps * stage.data.bins * stage.data.max_tokens
    assert tokens == pytest.approx(PUBLISHED[name], rel=1e-4)


def test_what_the_published_stages_freeze() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Qwen2VL(PRESETS["7B"]).named_parameters()]
    rules = {n: recipes.build(n).stages[0].rules for n in (*PUBLISHED, "stage3_instruct")}
    moving = {n: {k for k, s in match_rules(names, r).items() if s} for n, r in rules.items()}
    assert moving["stage1_vision"] == {name for name in names if name.startswith("visual.")}
    assert moving["stage2_joint"] == set(names)
    tower = {n for n in names if n.startswith("visual.") and "merger" not in n}
    assert moving["stage3_instruct"] == set(names) - tower


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from qwen2vl.recipes.tiny import recipe\n")
    assert recipes.build(str(path)) == recipes.build("tiny")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan0", r"did you mean nano\? a file's name must end in \.py"),
        ("nowhere/x.py", "no such recipe file"),
        ("zzz", r"known are .*nano.*tiny; a file's name must end in \.py"),
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
