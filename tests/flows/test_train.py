"""A run through all stages: resumed equals uninterrupted, and goes on from what it exported."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.errors import EngineError
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import tiny
from qwen2vl.synth import Mixture
from qwen2vl.synth.fonts import FontError
from qwen2vl.train import loop
from qwen2vl.train.checkpoint import latest, read, shapes
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.loss import Outcome
from tests.eval.fontless import hide_fonts
from tests.fonts import needs_training_fonts

SHORT = ["workers=0", "threads=1", "log_every=1", "save_every=100"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "examples=4")
]


def config(out: Path, *words: str) -> TrainConfig:
    return override(tiny.recipe(), [*SHORT, f"out={out}", *words])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return weights(loop.train(config(tmp_path_factory.mktemp("whole"))))


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], stop: int
) -> None:
    class KilledError(Exception):
        pass

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == stop + 1 and not (tmp_path / "parts" / "killed").exists():
            (tmp_path / "parts" / "killed").touch()
            raise KilledError

    words = (f"save_every={stop}",)
    with pytest.raises(KilledError):
        loop.train(config(tmp_path / "parts", *words), report=kill)
    parts = loop.train(config(tmp_path / "parts", *words), report=kill)
    one, two = uninterrupted, weights(parts)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_a_time_limit_ends_a_leg_with_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    folder = loop.train(config(tmp_path, "minutes=1e-9"))
    assert folder.name == "model-000000"
    assert (folder / "config.json").is_file()


def test_the_next_run_starts_from_the_exported_folder(tmp_path: Path) -> None:
    first = loop.train(config(tmp_path / "first"))
    second = loop.train(config(tmp_path / "second", f"init={first}"))
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_a_loss_that_is_not_finite_ends_the_run_before_a_weight_takes_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.token_loss, count(1)

    def broken_at_the_third(*given: Any) -> Outcome:
        outcome = real(*given)
        return outcome._replace(loss=outcome.loss * (float("nan") if next(calls) == 3 else 1))

    monkeypatch.setattr(loop, "token_loss", broken_at_the_third)
    with pytest.raises(EngineError, match=r"step 3: loss nan.*lower optim.lr"):
        loop.train(config(tmp_path, "log_every=100", "save_every=1"))
    kept = latest(tmp_path)
    assert kept is not None and kept.name == "step-000002"
    found = {name: torch.empty(shape) for name, shape in shapes(kept).items() if "|" not in name}
    read(kept, found, Ranks(torch.device("cpu")))
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("family", ["text", "two_pictures"])
def test_fonts_that_are_missing_stop_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    hide_fonts(monkeypatch)
    lines: list[dict[str, Any]] = []
    last = f'stages.3.mixture.weights={{"{family}":1}}'
    with pytest.raises(FontError, match="apt-get install fonts-dejavu-core") as caught:
        loop.train(config(tmp_path, last, "workers=1"), report=lines.append)
    assert "Traceback" not in str(caught.value)
    assert lines == []


@needs_training_fonts
def test_lines_of_text_can_be_learned_from(tmp_path: Path) -> None:
    text = Mixture(weights={"text": 1.0}, text_length=(1, 4), layout="cells", fonts="mono2")
    stages = tuple(
        type(s)(name=s.name, steps=2, examples=4, mixture=text, rules=s.rules)
        for s in tiny.recipe().stages
    )
    lines = []
    base = config(tmp_path)
    loop.train(
        TrainConfig(name="t", stages=stages, model=base.model, out=str(tmp_path), log_every=1),
        report=lines.append,
    )
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(set(line["families"]) == {"text"} for line in lines)
