"""LoRA training under FSDP: two ranks train the same adapter as a single process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.parallel.mesh import init_distributed
from qwen2vl.recipes import lora
from qwen2vl.train import loop
from qwen2vl.train.config import override
from qwen2vl.train.state import build_train_state
from tests.folders import write_tiny
from tests.parallel.process_pool import ProcessPool


def train_adapter(root: Path, out: str, *overrides: str) -> str:
    """Run the recipe `lora` for three steps on the model and data below `root`."""
    base = [
        f"model={root / 'base'}",
        f"data={root / 'data.jsonl'}",
        f"data.cache_dir={root / 'cache'}",
        f"output_dir={root / out}",
        *(
            "data.global_batch_size=2",
            "data.max_tokens=512",
            "stages.0.steps=3",
            "adapter.dropout=0",
        ),
        *("optim.lr=1e-2", "optim.warmup_steps=1", "optim.eps=1e-3"),
        *("device=cpu", "dtype=float32", "num_workers=0", "num_threads=1"),
    ]
    return str(loop.train(override(lora.recipe(), [*base, *overrides])))


def dropout_draws(root: Path) -> list[bool]:
    """Return what the global generator would draw for dropout in a new run."""
    config = override(lora.recipe(), [f"model={root / 'base'}", f"output_dir={root}", "device=cpu"])
    with init_distributed(config.device) as distributed:
        build_train_state(config, distributed)
    return (torch.rand(64) < 0.5).tolist()


def test_ranks_draw_different_dropout_masks_and_rank_0_those_of_one_process(
    process_pool: ProcessPool, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "base")
    first, second = process_pool.run(2, dropout_draws, tmp_path)
    assert first == dropout_draws(tmp_path)
    assert first != second


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter.quantize_base=nf4_double",),
        ("mesh.frozen=replicate", 'adapter.target_modules=["visual.*", "model.*q_proj"]'),
    ],
)
def test_two_ranks_train_the_same_adapter_as_one_process(
    process_pool: ProcessPool, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    write_tiny(tmp_path / "base")
    messages = ({"role": "user", "content": "say"}, {"role": "assistant", "content": "this"})
    rows = [{"messages": [{**messages[0], "content": f"say {n}"}, messages[1]]} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_adapter(tmp_path, "one", "gradient_accumulation_steps=2", *overrides)
    process_pool.run(2, train_adapter, tmp_path, "two", *overrides)
    one, two = (
        load_file(tmp_path / out / "adapter-000003" / "adapter_model.safetensors")
        for out in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
