"""An adapter trained by two ranks is the one that a single process trains, frozen parts and all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.parallel.mesh import join
from qwen2vl.recipes import lora
from qwen2vl.train import loop
from qwen2vl.train.config import override
from qwen2vl.train.state import build
from tests.folders import write_tiny
from tests.parallel.gang import Gang


def train_adapter(root: Path, out: str, *words: str) -> str:
    """Run the recipe `lora` for three steps on the folder and the data below `root`."""
    short = [
        f"model={root / 'base'}",
        f"data={root / 'data.jsonl'}",
        f"data.cache={root / 'cache'}",
        f"out={root / out}",
        *("data.bins=2", "data.max_tokens=512", "stages.0.steps=3", "adapter.dropout=0"),
        *("optim.lr=1e-2", "optim.warmup=1", "optim.eps=1e-3"),
        *("device=cpu", "dtype=float32", "workers=0", "threads=1"),
    ]
    return str(loop.train(override(lora.recipe(), [*short, *words])))


def masked(root: Path) -> list[bool]:
    """Tell what dropout would draw for a run that begins."""
    run = override(lora.recipe(), [f"model={root / 'base'}", f"out={root}", "device=cpu"])
    with join(run.device) as ranks:
        build(run, ranks)
    return (torch.rand(64) < 0.5).tolist()


def test_every_rank_draws_other_masks_and_the_first_those_of_one_process(
    gang: Gang, tmp_path: Path
) -> None:
    write_tiny(tmp_path / "base")
    first, second = gang.run(2, masked, tmp_path)
    assert first == masked(tmp_path)
    assert first != second


@pytest.mark.parametrize(
    "words",
    [
        ("adapter.quantize_base=nf4_double",),
        ("mesh.frozen=replicate", 'adapter.targets=["visual.*", "model.*q_proj"]'),
    ],
)
def test_two_ranks_train_what_one_process_does(
    gang: Gang, tmp_path: Path, words: tuple[str, ...]
) -> None:
    write_tiny(tmp_path / "base")
    turns = ({"role": "user", "content": "say"}, {"role": "assistant", "content": "this"})
    lines = [{"messages": [{**turns[0], "content": f"say {n}"}, turns[1]]} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_adapter(tmp_path, "one", "accumulate=2", *words)
    gang.run(2, train_adapter, tmp_path, "two", *words)
    one, two = (
        load_file(tmp_path / out / "adapter-000003" / "adapter_model.safetensors")
        for out in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
