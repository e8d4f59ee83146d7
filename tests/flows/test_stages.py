"""From source models through the three published stages: each trains exactly its parameters."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from qwen2vl import recipes
from qwen2vl.train.config import override
from qwen2vl.train.loop import train
from qwen2vl.weights.init_pretrained import init_from_pretrained
from tests.source_models import write_open_clip, write_qwen2

STAGES = ("stage1_vision", "stage2_joint", "stage3_instruct", "full_finetune")


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Name the tensors in which two folders differ."""
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def test_stages_change_only_their_trainable_parameters(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    init_from_pretrained(tmp_path / "text", tmp_path / "vision", tmp_path / "start")
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "noise.png")
    rows = [
        {"image": "noise.png", "text": f"noise of number {n}, seen from afar"} for n in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = [
        f"data={tmp_path / 'data.jsonl'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.global_batch_size=1",
    ]
    overrides += [
        "data.max_tokens=512",
        "stages.0.steps=1",
        "optim.lr=1e-2",
        "optim.warmup_steps=1",
    ]
    overrides += ["device=cpu", "num_workers=0", "num_threads=1"]
    folders = [tmp_path / "start"]
    for name in STAGES:
        paths = [f"model={folders[-1]}", f"output_dir={tmp_path / name}"]
        folders.append(train(override(recipes.load_recipe(name), [*overrides, *paths])))
    changes = [changed_tensors(*pair) for pair in pairwise(folders)]
    names = load_file(folders[0] / "model.safetensors").keys()
    tower = {name for name in names if name.startswith("visual.")}
    merger = {name for name in tower if "merger" in name}
    assert changes[0] <= tower and changes[0] & merger and changes[0] - merger
    assert changes[1] & tower and changes[1] - tower
    assert not changes[2] & (tower - merger)
    assert changes[2] & merger and changes[2] - tower
    assert changes[3] & (tower - merger) and changes[3] - tower
