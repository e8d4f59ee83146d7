"""A run through all stages: resuming equals not stopping; exported models can be continued."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.errors import EngineError
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import tiny
from qwen2vl.synth import Mixture
from qwen2vl.synth.fonts import FontError
from qwen2vl.train import loop
from qwen2vl.train.checkpoint import latest_checkpoint, load_tensors, tensor_shapes
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.loss import LossOutput
from tests.fonts import hide_system_fonts

SHORT = ["num_workers=0", "num_threads=1", "logging_steps=1", "save_steps=100"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "global_batch_size=4")
]


def config(out: Path, *overrides: str) -> TrainConfig:
    return override(tiny.recipe(), [*SHORT, f"output_dir={out}", *overrides])


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

    overrides = (f"save_steps={stop}",)
    with pytest.raises(KilledError):
        loop.train(config(tmp_path / "parts", *overrides), report=kill)
    parts = loop.train(config(tmp_path / "parts", *overrides), report=kill)
    one, two = uninterrupted, weights(parts)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_a_time_limit_ends_the_invocation_with_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    folder = loop.train(config(tmp_path, "max_minutes=1e-9"))
    assert folder.name == "model-000000"
    assert (folder / "config.json").is_file()


def test_the_next_run_starts_from_the_exported_folder(tmp_path: Path) -> None:
    first = loop.train(config(tmp_path / "first"))
    second = loop.train(config(tmp_path / "second", f"init={first}"))
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_a_non_finite_loss_ends_the_run_before_any_weight_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.token_loss, count(1)

    def nan_in_step_three(*given: Any) -> LossOutput:
        output = real(*given)
        return output._replace(loss=output.loss * (float("nan") if next(calls) == 3 else 1))

    monkeypatch.setattr(loop, "token_loss", nan_in_step_three)
    with pytest.raises(EngineError, match=r"step 3: loss nan.*lower optim.lr"):
        loop.train(config(tmp_path, "logging_steps=100", "save_steps=1"))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == "step-000002"
    tensors = {
        name: torch.empty(shape)
        for name, shape in tensor_shapes(checkpoint).items()
        if "|" not in name
    }
    load_tensors(checkpoint, tensors, DistributedContext(torch.device("cpu")))
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("family", ["text", "two_pictures"])
def test_missing_fonts_stop_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    hide_system_fonts(monkeypatch)
    lines: list[dict[str, Any]] = []
    last = f'stages.3.mixture.weights={{"{family}":1}}'
    with pytest.raises(FontError, match="apt-get install fonts-dejavu-core") as caught:
        loop.train(config(tmp_path, last, "num_workers=1"), report=lines.append)
    assert "Traceback" not in str(caught.value)
    assert lines == []


def test_training_on_lines_of_text(tmp_path: Path) -> None:
    text = Mixture(weights={"text": 1.0}, text_length=(1, 4), layout="cells", fonts="bundled")
    stages = tuple(
        type(s)(name=s.name, steps=2, global_batch_size=4, mixture=text, rules=s.rules)
        for s in tiny.recipe().stages
    )
    lines = []
    base = config(tmp_path)
    loop.train(
        TrainConfig(
            name="t", stages=stages, model=base.model, output_dir=str(tmp_path), logging_steps=1
        ),
        report=lines.append,
    )
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(set(line["families"]) == {"text"} for line in lines)
