"""Meta-device initialization: the shards of two ranks equal the full model, bit for bit."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen2vl.lora.layers import LoraConfig
from qwen2vl.parallel.mesh import init_distributed
from qwen2vl.recipes import full_finetune, lora, tiny
from qwen2vl.train import checkpoint, loop
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.init import build_model
from qwen2vl.train.state import build_train_state
from qwen2vl.weights import TensorFolder
from tests.folders import write_tiny
from tests.parallel.process_pool import ProcessPool
from tests.parallel.training_jobs import full_tensor
from tests.tiny import tiny_model

ALL_LINEARS = LoraConfig(rank=4, target_modules=(".*",), quantize_base="nf4_double")


class TensorReadCounter:
    """Counts the full tensors read from the folder that are alive, and their maximum."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.alive = self.max_alive = self.num_read = 0
        get = TensorFolder.__getitem__

        def counting_getitem(folder: TensorFolder, name: str) -> Tensor:
            tensor = get(folder, name)
            self.num_read += 1
            self.alive += 1
            self.max_alive = max(self.max_alive, self.alive)
            weakref.finalize(tensor.untyped_storage(), self.release)
            return tensor

        patch.setattr(TensorFolder, "__getitem__", counting_getitem)

    def release(self) -> None:
        self.alive -= 1


def build_sharded(config: TrainConfig) -> tuple[dict[str, Tensor], int, int]:
    """Build on this rank; returns full state, maximum of full tensors alive, number read."""
    with (
        init_distributed("cpu", dp_replicate=config.mesh.dp_replicate) as distributed,
        pytest.MonkeyPatch.context() as p,
    ):
        counter = TensorReadCounter(p)
        train_state = build_train_state(config, distributed)
        state = {
            name: full_tensor(tensor) for name, tensor in train_state.model.state_dict().items()
        }
        return state, counter.max_alive, counter.num_read


def configs(root: Path) -> dict[str, TrainConfig]:
    full = override(full_finetune.recipe(), [f"init={root / 'tied'}", "device=cpu"])
    adapter = override(lora.recipe(), [f"init={root / 'untied'}", "device=cpu"])
    return {
        "fresh": replace(tiny.recipe(), output_dir=str(root / "fresh")),
        "tied, replicated": override(full, ["mesh.dp_replicate=2"]),
        "adapter": adapter,
        "qlora": replace(adapter, adapter=ALL_LINEARS),
    }


@pytest.mark.parametrize("name", configs(Path()))
def test_shards_equal_the_full_model(process_pool: ProcessPool, tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path / "tied", model=tiny_model(), dtype=torch.bfloat16)
    write_tiny(tmp_path / "untied", max_shard_bytes=200_000)
    config = configs(tmp_path)[name]
    (state, max_alive, num_read), _ = process_pool.run(2, build_sharded, config)
    expected = build_model(config)[0].state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor) and state[key].dtype == tensor.dtype, key
    assert (max_alive, num_read > 0) == ((0, False) if name == "fresh" else (1, True))


def test_replicated_parameters_are_bfloat16(process_pool: ProcessPool, tmp_path: Path) -> None:
    write_tiny(tmp_path / "untied")
    overrides = ["mesh.frozen=replicate", "dtype=bfloat16"]
    config = override(configs(tmp_path)["adapter"], overrides)
    (state, max_alive, _), _ = process_pool.run(2, build_sharded, config)
    expected = build_model(config)[0].state_dict()
    for key, tensor in expected.items():
        stored = tensor if "lora_" in key else tensor.bfloat16()
        assert torch.equal(state[key], stored), key
    assert max_alive == 1


def run_or_resume(root: Path, steps: int, base_readable: bool) -> str:
    """Train or resume on two ranks; fail if the base model is read though it must not be."""
    overrides = [
        *(
            f"data={root / 'data.jsonl'}",
            f"data.cache_dir={root / 'cache'}",
            "data.global_batch_size=2",
        ),
        *("data.max_tokens=512", f"stages.0.steps={steps}", f"output_dir={root / 'run'}"),
        *("optim.warmup_steps=1", "dtype=float32", "num_workers=0", "num_threads=1", "device=cpu"),
        f"init={root / 'untied'}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not base_readable:
            patch.setattr(TensorFolder, "_read", lambda *_: pytest.fail("read again"))
        return str(loop.train(override(lora.recipe(), overrides)))


def test_resuming_reads_the_checkpoint_and_not_the_base_model(
    process_pool: ProcessPool, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "untied")
    messages = ({"role": "user", "content": "say"}, {"role": "assistant", "content": "this"})
    rows = [{"messages": [{**messages[0], "content": f"say {n}"}, messages[1]]} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    process_pool.run(2, run_or_resume, tmp_path, 2, True)
    path = tmp_path / "run" / "step-000002"
    state = json.loads((path / "state.json").read_text())
    state["config"]["stages"][0]["steps"] = 3
    (path / "state.json").write_text(json.dumps(state))
    process_pool.run(2, run_or_resume, tmp_path, 3, False)
    before, after = (
        checkpoint.tensor_shapes(tmp_path / "run" / name) for name in ("step-000002", "step-000003")
    )
    assert before == after
