"""A folder's tensors as one mapping, for any file and key layout."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen2vl.errors import CheckpointError
from qwen2vl.weights import tensors as tensors_module
from qwen2vl.weights.tensors import INDEX_FILE, SINGLE_FILE, official_name, open_tensors, shorten

PARTS = {
    "model-00001-of-00002.safetensors": {"model.norm.weight": torch.ones(3)},
    "model-00002-of-00002.safetensors": {
        "lm_head.weight": torch.arange(6.0).view(2, 3),
        "visual.merger.ln_q.bias": torch.zeros(4, dtype=torch.bfloat16),
    },
}


def write_shards(folder: Path, **index: Any) -> None:
    weight_map = {key: name for name, part in PARTS.items() for key in part}
    for name, part in PARTS.items():
        save_file(part, folder / name)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map} | index))


def check_refused(folder: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as caught:
        open_tensors(folder)
    assert "\n" not in str(caught.value)


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = open_tensors(tmp_path)
    assert len(tensors) == 3
    for part in PARTS.values():
        for name, tensor in part.items():
            assert torch.equal(tensors[name], tensor)
            assert tensors[name].dtype == tensor.dtype
            assert tensors.info(name).shape == tuple(tensor.shape)


def test_single_file_takes_precedence_over_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"only": torch.ones(1)}, tmp_path / SINGLE_FILE)
    assert list(open_tensors(tmp_path)) == ["only"]


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("opened for reading")

    monkeypatch.setattr(tensors_module, "_MappedFile", fail)
    folder = open_tensors(tmp_path)
    assert folder.info("model.norm.weight").dtype == "F32"
    assert "model.norm.weight" in folder and "model.norm.bias" not in folder


def test_empty_tensors_and_scalars_are_read(tmp_path: Path) -> None:
    stored = {"none": torch.zeros(0, 4), "one": torch.tensor(1.5)}
    save_file(stored, tmp_path / SINGLE_FILE)
    tensors = open_tensors(tmp_path)
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_writing_into_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000)}, tmp_path / SINGLE_FILE)
    tensors = open_tensors(tmp_path)
    tensors["a"].zero_()
    assert not tensors["a"].any()  # the mapping is private to the process
    assert bool(open_tensors(tmp_path)["a"].all())


def resident_bytes(path: Path) -> int:
    """Return the bytes of a file that are mapped and resident (Rss of /proc/self/smaps)."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            is_of_file = line.endswith(str(path))
        elif is_of_file and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_released_tensors_are_not_resident_and_can_be_read_again(tmp_path: Path) -> None:
    numel = 2**20
    stored = {name: torch.full((numel,), value) for name, value in (("a", 1.0), ("b", 2.0))}
    save_file(stored, tmp_path / SINGLE_FILE)
    tensors = open_tensors(tmp_path)
    kept, released = tensors["a"], tensors["b"]
    assert float(kept.sum() + released.sum()) == 3 * numel
    assert resident_bytes(tmp_path / SINGLE_FILE) >= 8 * numel
    tensors.release(["b", "unknown"])
    assert 4 * numel - 2**16 <= resident_bytes(tmp_path / SINGLE_FILE) <= 4 * numel + 2**16
    assert torch.equal(kept, stored["a"]) and torch.equal(released, stored["b"])


@pytest.mark.parametrize(
    ("key", "official"),
    [
        ("visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.language_model.layers.9.x", "model.layers.9.x"),
    ],
)
def test_both_key_layouts_map_to_one_name(key: str, official: str) -> None:
    assert official_name(key) == official


def test_nested_keys_are_found_under_official_names(tmp_path: Path) -> None:
    save_file({"model.language_model.norm.weight": torch.ones(3)}, tmp_path / SINGLE_FILE)
    assert torch.equal(open_tensors(tmp_path)["model.norm.weight"], torch.ones(3))


def test_tensor_in_both_layouts_is_refused(tmp_path: Path) -> None:
    both = {"model.norm.weight": torch.ones(3), "model.language_model.norm.weight": torch.ones(3)}
    save_file(both, tmp_path / SINGLE_FILE)
    check_refused(tmp_path, "stored twice, in both key layouts: model.norm.weight")


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    for name in PARTS:
        (tmp_path / name).unlink()
    check_refused(
        tmp_path,
        "2 of 2 shards are missing: model-00001-of-00002.safetensors, "
        "model-00002-of-00002.safetensors, with 3 tensors: lm_head.weight, model.norm.weight, ",
    )


def test_all_wrong_index_entries_are_named(tmp_path: Path) -> None:
    first, second = PARTS
    write_shards(tmp_path, weight_map={"model.norm.weight": second, "lm_head.weight": second})
    check_refused(
        tmp_path,
        rf"1 tensors listed, but not in the shard: model.norm.weight \({second}\); "
        rf"1 tensors in a shard, but not listed: visual.merger.ln_q.bias \({second}\)",
    )
    write_shards(tmp_path, weight_map={"gone": first})
    check_refused(tmp_path, r"listed, but not in the shard: gone .*not listed: model.norm.weight")


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"a": 1}, {"a": "../other/model.safetensors"}, {"a": "model.bin"}, {"a": ""}],
)
def test_index_with_paths_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_shards(tmp_path, weight_map=weight_map)
    check_refused(tmp_path, "no weight_map of tensor names to file names in this folder")


def test_truncated_shard_is_refused_on_opening(tmp_path: Path) -> None:
    write_shards(tmp_path)
    last = tmp_path / "model-00002-of-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    check_refused(
        tmp_path, "model-00002-of-00002.safetensors: truncated, 1 of 32 bytes are missing"
    )


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    check_refused(tmp_path, "model.safetensors.index.json is missing for model-00001-of-00002")


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
    check_refused(
        tmp_path, rf"{name}: a pickle can run code and is never loaded; convert it offline: pyt"
    )
    assert not marker.exists()


def test_pickle_with_a_safetensors_name_is_not_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"a": Payload(marker)}, tmp_path / SINGLE_FILE)
    check_refused(tmp_path, "looks like a pickle")
    assert not marker.exists()


def test_remedy_for_pickles_works(tmp_path: Path) -> None:
    import shlex
    import subprocess
    import sys

    tied = torch.ones(2)
    torch.save({"a": tied, "b": tied}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        open_tensors(tmp_path)
    command = shlex.split(str(caught.value).split("convert it offline: ")[1])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert torch.equal(open_tensors(tmp_path)["b"], tied)


@pytest.mark.parametrize(
    ("key", "dtype", "text"),
    [
        ("model.layers.0.mlp.up_proj.qweight", torch.int32, "quantized"),
        ("base_model.model.x.lora_A.weight", torch.float32, "holds a LoRA adapter"),
        ("model.norm.weight", torch.int64, r"1 tensors are not of .*model.norm.weight \(I64\)"),
        ("model.norm.weight", torch.float8_e4m3fn, r"model.norm.weight \(F8_E4M3\)"),
    ],
)
def test_unsupported_weights_are_refused(
    tmp_path: Path, key: str, dtype: torch.dtype, text: str
) -> None:
    save_file({key: torch.zeros(3).to(dtype)}, tmp_path / SINGLE_FILE)
    check_refused(tmp_path, text)


def test_adapter_folder_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    check_refused(tmp_path, "holds a LoRA adapter, not a model; open its base")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    check_refused(tmp_path, r"no weights: .* is missing \(found nothing\)")
    (tmp_path / "model.gguf").touch()
    check_refused(tmp_path, r"is missing \(found model.gguf\)")


def test_file_deleted_after_opening(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = open_tensors(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.norm.weight cannot be read"):
        tensors["model.norm.weight"]


def test_long_lists_are_shortened() -> None:
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(i) for i in range(2000)], 3) == "0, 1, 2 and 1,997 more"
