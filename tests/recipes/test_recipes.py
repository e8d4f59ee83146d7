"""Recipes: found by name or path, and each one is a valid run."""

from pathlib import Path

import pytest
import torch

from qwen2vl import recipes
from qwen2vl.config import PRESETS
from qwen2vl.errors import ConfigError
from qwen2vl.lora.layers import init_factors, inject_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.train.loader.data_order import samples_of_step
from qwen2vl.train.optim.optimizers import match_lr_rules


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_every_recipe_loads_and_has_a_first_and_a_last_step(name: str) -> None:
    config = recipes.load_recipe(name)
    assert config.name == name
    assert samples_of_step(config, 0).stage is next(s for s in config.stages if s.steps)
    assert samples_of_step(config, config.steps - 1).stage is config.stages[-1]


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_the_rules_of_every_recipe_match_an_official_model(name: str) -> None:
    config = recipes.load_recipe(name)
    with torch.device("meta"):
        model = Qwen2VL(config.model or PRESETS["2B"])
    if config.adapter is not None:
        inject_lora(model, init_factors(model, config.adapter, seed=0))
    names = [name for name, _ in model.named_parameters()]
    for stage in config.stages:
        trainable = {name for name, scale in match_lr_rules(names, stage.rules).items() if scale}
        assert trainable


PUBLISHED = {"stage1_vision": 600e9, "stage2_joint": 800e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_stages_train_on_the_published_number_of_tokens(name: str) -> None:
    (stage,) = recipes.load_recipe(name).stages
    assert stage.data is not None
    tokens = stage.steps * stage.data.global_batch_size * stage.data.max_tokens
    assert tokens == pytest.approx(PUBLISHED[name], rel=1e-4)


def test_the_published_stages_freeze_the_published_parameters() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Qwen2VL(PRESETS["7B"]).named_parameters()]
    rules = {n: recipes.load_recipe(n).stages[0].rules for n in (*PUBLISHED, "stage3_instruct")}
    trainable = {n: {k for k, s in match_lr_rules(names, r).items() if s} for n, r in rules.items()}
    assert trainable["stage1_vision"] == {name for name in names if name.startswith("visual.")}
    assert trainable["stage2_joint"] == set(names)
    tower = {n for n in names if n.startswith("visual.") and "merger" not in n}
    assert trainable["stage3_instruct"] == set(names) - tower


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from qwen2vl.recipes.tiny import recipe\n")
    assert recipes.load_recipe(str(path)) == recipes.load_recipe("tiny")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan0", r"did you mean nano\? a file's name must end in \.py"),
        ("stages", "no recipe 'stages'"),  # the module that recipes share
        ("nowhere/x.py", "no such recipe file"),
        ("zzz", r"known are .*nano.*tiny; a file's name must end in \.py"),
    ],
)
def test_unknown_recipes_are_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recipes.load_recipe(name)


@pytest.mark.parametrize("text", ["def recipe(:", "import no_such_module", "1 / 0"])
def test_a_recipe_file_that_fails_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.py: the recipe fails when it is read: \w+: "):
        recipes.load_recipe(str(path))


def test_a_file_without_a_recipe_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"no function recipe\(\)"):
        recipes.load_recipe(str(path))
