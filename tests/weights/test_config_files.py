"""JSON config files: every file name and key spelling, and errors for missing or invalid ones."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import (
    GenerationDefaults,
    log_foreign_chat_template,
    read_config,
    read_generation_defaults,
    read_preprocessor_config,
)
from qwen2vl.weights.config_files import read_json
from tests.folders import official_config_json

SPELLINGS: list[dict[str, Any]] = [
    {"min_pixels": 3136, "max_pixels": 12845056},
    {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 1, "longest_edge": 2}},
]


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "name",
    ["preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"],
)
def test_pixel_limits_in_three_files_and_two_spellings(
    tmp_path: Path, name: str, spelling: dict[str, Any]
) -> None:
    nested = name == "processor_config.json"
    write(tmp_path, name, {"image_processor": spelling} if nested else spelling)
    limits = PixelLimits.from_dict(read_preprocessor_config(tmp_path))
    assert limits == PixelLimits(min_pixels=3136, max_pixels=12845056)


def test_precedence_of_preprocessor_files(tmp_path: Path) -> None:
    write(tmp_path, "video_preprocessor_config.json", {"min_pixels": 1})
    assert read_preprocessor_config(tmp_path)["min_pixels"] == 1
    write(tmp_path, "preprocessor_config.json", {"min_pixels": 2})
    assert read_preprocessor_config(tmp_path)["min_pixels"] == 2
    write(tmp_path, "processor_config.json", {"processor_class": "Qwen2VLProcessor"})
    assert read_preprocessor_config(tmp_path)["min_pixels"] == 2
    write(tmp_path, "processor_config.json", {"image_processor": {"min_pixels": 3}})
    assert read_preprocessor_config(tmp_path)["min_pixels"] == 3


def test_missing_preprocessor_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is missing .* copy it"):
        read_preprocessor_config(tmp_path)


def test_image_mean_and_std_are_part_of_the_config(tmp_path: Path) -> None:
    write(tmp_path, "config.json", official_config_json("2B"))
    write(tmp_path, "preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]})
    assert read_config(tmp_path).vision.image_mean == (0.5, 0.5, 0.5)


def test_code_in_a_folder_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
    auto_map = {"AutoModel": "modeling.Model"}
    write(tmp_path, "config.json", official_config_json("2B") | {"auto_map": auto_map})
    with caplog.at_level(logging.DEBUG, "qwen2vl"):
        read_config(tmp_path)
    assert "auto_map ignored, code of a model folder is never run" in caplog.text


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        ({"quant_method": "fp8"}, r"quantized \(FP8\); this library runs GPTQ of 4 or 8 bits, "),
        ({"bits": 8}, r"quantized \(UNKNOWN 8-bit\)"),
        ("int8", r"quantized \(UNKNOWN\)"),
    ],
)
def test_unsupported_quantization_is_named(tmp_path: Path, quantization: Any, text: str) -> None:
    raw = official_config_json("7B") | {"quantization_config": quantization}
    write(tmp_path, "config.json", raw)
    with pytest.raises(CheckpointError, match=text):
        read_config(tmp_path)


def test_official_quantized_folders_are_read(tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    write(
        tmp_path, "config.json", official_config_json("7B") | {"quantization_config": quantization}
    )
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert read_config(tmp_path).text.hidden_size == 3584


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], r"the folder is empty; fill it with `hf download Qwen/Qwen2-VL-2B-Instruct --local-d"),
        (["adapter_config.json"], "holds a LoRA adapter, not a model; open its base"),
        (["a.txt", "b.txt"], r"config.json is missing \(found a.txt, b.txt\)"),
        (list("abcdefg"), r"config.json is missing \(found a, b, c, d, e and 2 more\)"),
    ],
)
def test_folder_without_config_is_refused(tmp_path: Path, names: list[str], text: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=text):
        read_config(tmp_path)


def test_the_folder_of_a_run_is_answered_with_the_model_inside(tmp_path: Path) -> None:
    (tmp_path / "step-000020").mkdir()
    (tmp_path / "step-000020" / "state.json").touch()
    for folder in (tmp_path, tmp_path / "step-000020"):
        with pytest.raises(CheckpointError, match=rf"`qwen2vl export {folder} -o DIR` makes"):
            read_config(folder)
    for name in ("model-000010", "model-000020"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    text = rf"is no model, but has one inside; give {tmp_path}/model-000020, the last of 2"
    with pytest.raises(CheckpointError, match=text):
        read_config(tmp_path)


NESTED_FORMS = ("flat", "text_config", "rope_parameters")


def write_config(folder: Path, form: str) -> None:
    """Write a config in one of its forms."""
    raw = official_config_json("2B")
    vision = raw.pop("vision_config")
    if form == "rope_parameters":
        raw["rope_parameters"] = {**raw.pop("rope_scaling"), "rope_theta": raw.pop("rope_theta")}
    root = {"text_config": raw, "model_type": "qwen2_vl"} if form == "text_config" else raw
    write(folder, "config.json", {**root, "vision_config": vision})


@pytest.mark.parametrize("form", NESTED_FORMS)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_nested_overrides_are_merged(tmp_path: Path, form: str, name: str) -> None:
    write_config(tmp_path, form)
    plain = read_config(tmp_path)
    changed = read_config(
        tmp_path,
        {
            "vision_config": {"depth": 3},
            "text_config": {"num_hidden_layers": 5, "tie_word_embeddings": False},
            name: {"rope_theta": 12345.0},
        },
    )
    text = {"num_hidden_layers": 5, "tie_word_embeddings": False, "rope_theta": 12345.0}
    assert changed.vision == replace(plain.vision, depth=3)
    assert changed.text == replace(plain.text, **text)
    assert plain.text.tie_word_embeddings


@pytest.mark.parametrize(
    ("hf_overrides", "text"),
    [
        ({"max_positon_embeddings": 9}, "config.json has no field 'max_positon_embeddings'; did "),
        ({"vision_config": {"dept": 9}}, "vision_config has no field 'dept'; did you mean depth"),
        ({"text_config": {"depth": 9}}, "text_config has no field 'depth'; "),
        ({"rope_scaling": {"mrope": 9}}, "rope_scaling has no field 'mrope'; "),
        ({3: 9}, "config.json has no field 3; "),
        ({"vision_config": 3}, "vision_config is 3, must be a mapping"),
        ({"hidden_size": -1}, "hidden_size is -1, must be a whole number"),
    ],
)
def test_invalid_overrides_are_errors_of_their_own(
    tmp_path: Path, hf_overrides: Any, text: str
) -> None:
    write_config(tmp_path, "flat")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path, hf_overrides)
    assert str(caught.value).startswith(f"hf_overrides: {text}")


def test_an_invalid_file_is_not_blamed_on_overrides(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {**official_config_json("2B"), "hidden_size": -1})
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path, {"max_position_embeddings": 99})
    assert str(caught.value).startswith(f"{tmp_path}: config.json: hidden_size is -1")


def test_invalid_config_names_its_folder(tmp_path: Path) -> None:
    write(tmp_path, "config.json", official_config_json("7B") | {"num_attention_heads": 5})
    with pytest.raises(ConfigError, match="hidden_size 3584 must be a multiple") as caught:
        read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": 1,\n "b": }', r"not valid JSON \(line 2\); fetch this file again"),
        (b"\xff\xfe\xfa{}", "not valid JSON; fetch"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b"", r"not valid JSON \(line 1\)"),
    ],
)
def test_invalid_json_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_json(tmp_path / "config.json")


def test_generation_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    official = {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.05,
        "temperature": 0.1,
        "top_p": 0.001,
        "top_k": 1,
        "transformers_version": "4.37.0",
    }
    write(tmp_path, "generation_config.json", official)
    assert read_generation_defaults(tmp_path) == GenerationDefaults(
        do_sample=True,
        temperature=0.1,
        top_p=0.001,
        top_k=1,
        repetition_penalty=1.05,
        eos_token_ids=(151645, 151643),
    )
    write(tmp_path, "generation_config.json", {"eos_token_id": 7, "max_new_tokens": 99})
    assert read_generation_defaults(tmp_path) == GenerationDefaults(
        eos_token_ids=(7,), max_new_tokens=99
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"top_k": True}, "top_k is True, expected a number"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected an id or a list of ids"),
        ({"eos_token_id": [1, 2.5]}, r"eos_token_id is \[1, 2.5\]"),
    ],
)
def test_invalid_generation_defaults_are_refused(tmp_path: Path, content: Any, text: str) -> None:
    write(tmp_path, "generation_config.json", content)
    with pytest.raises(CheckpointError, match=text):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.json", "tokenizer_config.json"])
def test_foreign_chat_template_is_logged_and_not_used(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, name, {"chat_template": "{{ 1 / 0 }}"})
    with caplog.at_level(logging.DEBUG, "qwen2vl"):
        log_foreign_chat_template(tmp_path)
    assert f"{name}: its chat template is not the official one; not used" in caplog.text
