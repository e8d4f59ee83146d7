"""Meta, shard, fill: the parts that two ranks read are those of the whole model, bit for bit."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen2vl.lora.layers import LoraConfig
from qwen2vl.parallel.mesh import join
from qwen2vl.recipes import full_finetune, lora, tiny
from qwen2vl.train import checkpoint, loop
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.init import begin
from qwen2vl.train.state import build
from qwen2vl.weights import TensorFolder
from tests.folders import write_tiny
from tests.parallel.gang import Gang
from tests.parallel.jobs import whole
from tests.tiny import tiny_model

EVERY = LoraConfig(rank=4, targets=(".*",), quantize_base="nf4_double")


class Counter:
    """Counts the bytes of whole tensors that are alive, and how many at most."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.read = 0
        get = TensorFolder.__getitem__

        def counted(folder: TensorFolder, name: str) -> Tensor:
            tensor = get(folder, name)
            self.read += 1
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(tensor.untyped_storage(), self.forget)
            return tensor

        patch.setattr(TensorFolder, "__getitem__", counted)

    def forget(self) -> None:
        self.now -= 1


def in_parts(config: TrainConfig) -> tuple[dict[str, Tensor], int, int]:
    """Build on this rank; gives the state, put together, and how much was whole at once."""
    with join("cpu", replicate=config.mesh.replicate) as ranks, pytest.MonkeyPatch.context() as p:
        counter = Counter(p)
        run = build(config, ranks)
        state = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
        return state, counter.most, counter.read


def configs(root: Path) -> dict[str, TrainConfig]:
    full = override(full_finetune.recipe(), [f"init={root / 'tied'}", "device=cpu"])
    adapted = override(lora.recipe(), [f"init={root / 'untied'}", "device=cpu"])
    return {
        "fresh": replace(tiny.recipe(), out=str(root / "fresh")),
        "tied, in copies": override(full, ["mesh.replicate=2"]),
        "adapter": adapted,
        "adapter over 4 bits": replace(adapted, adapter=EVERY),
    }


@pytest.mark.parametrize("name", configs(Path()))
def test_parts_are_those_of_the_whole_model(gang: Gang, tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path / "tied", model=tiny_model(), dtype=torch.bfloat16)
    write_tiny(tmp_path / "untied", max_shard_bytes=200_000)
    config = configs(tmp_path)[name]
    (state, most, read), _ = gang.run(2, in_parts, config)
    wanted = begin(config)[0].state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype, key
    assert (most, read > 0) == ((0, False) if name == "fresh" else (1, True))


def test_what_stays_whole_is_read_in_bfloat16(gang: Gang, tmp_path: Path) -> None:
    write_tiny(tmp_path / "untied")
    config = override(configs(tmp_path)["adapter"], ["mesh.frozen=replicate"])
    (state, most, _), _ = gang.run(2, in_parts, config)
    wanted = begin(config)[0].state_dict()
    for key, tensor in wanted.items():
        kept = tensor if "lora_" in key else tensor.bfloat16()
        assert torch.equal(state[key], kept), key
    assert most == 1


def leg(root: Path, steps: int, readable: bool) -> str:
    """Run, or go on, on two ranks; a folder that is not to be read fails when it is."""
    words = [
        *(f"data={root / 'data.jsonl'}", f"data.cache={root / 'cache'}", "data.bins=2"),
        *("data.max_tokens=512", f"stages.0.steps={steps}", f"out={root / 'run'}"),
        *("optim.warmup=1", "dtype=float32", "workers=0", "threads=1", "device=cpu"),
        f"init={root / 'untied'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not readable:
            patch.setattr(TensorFolder, "_read", lambda *_: pytest.fail("read again"))
        return str(loop.train(override(lora.recipe(), words)))


def test_who_resumes_reads_the_checkpoint_alone(gang: Gang, tmp_path: Path) -> None:
    write_tiny(tmp_path / "untied")
    turns = ({"role": "user", "content": "say"}, {"role": "assistant", "content": "this"})
    rows = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gang.run(2, leg, tmp_path, 2, True)
    path = tmp_path / "run" / "step-000002"
    state = json.loads((path / "state.json").read_text())
    state["config"]["stages"][0]["steps"] = 3
    (path / "state.json").write_text(json.dumps(state))
    gang.run(2, leg, tmp_path, 3, False)
    before, after = (
        checkpoint.shapes(tmp_path / "run" / name) for name in ("step-000002", "step-000003")
    )
    assert before == after
