"""Model config: every form of config.json, round trips, and invalid values."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.errors import ConfigError
from tests.folders import official_config_json
from tests.tiny import tiny_config

TEXT_KEYS = (
    "attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
    "intermediate_size max_position_embeddings max_window_layers num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps use_cache use_sliding_window vocab_size"
).split()


def nested(raw: dict[str, Any], *, rope: dict[str, Any], tie_at_root: bool) -> dict[str, Any]:
    """Move the text fields to text_config, where transformers 4.52 and later write them."""
    raw = dict(raw)
    text = {key: raw.pop(key) for key in TEXT_KEYS} | rope
    text["model_type"] = "qwen2_vl_text"
    tied = raw.pop("tie_word_embeddings")
    del raw["rope_scaling"], raw["rope_theta"]
    if tie_at_root:
        raw["tie_word_embeddings"] = tied
    else:
        text["tie_word_embeddings"] = tied
    raw["vision_config"] = raw["vision_config"] | {"model_type": "qwen2_vl_vision"}
    return raw | {"text_config": text}


def form_4_57(raw: dict[str, Any]) -> dict[str, Any]:
    section = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    rope = {"rope_scaling": section, "rope_theta": 1000000.0}
    return nested(raw, rope=rope, tie_at_root=False)


def form_5_23(raw: dict[str, Any]) -> dict[str, Any]:
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1000000.0}
    raw = nested(raw, rope={"rope_parameters": rope}, tie_at_root=True)
    raw["text_config"]["layer_types"] = ["full_attention"] * 28
    raw["text_config"]["sliding_window"] = None
    axial = {"rope_type": "axial", "rope_theta": 10000.0}
    raw["vision_config"] |= {"rope_parameters": axial, "hidden_act": "quick_gelu"}
    return raw


def form_4_45(raw: dict[str, Any]) -> dict[str, Any]:
    """Flat, but without vision fields that equal the class defaults."""
    vision = {
        "hidden_size": raw["hidden_size"],
        "in_chans": 3,
        "model_type": "qwen2_vl",
        "spatial_patch_size": 14,
    }
    scaling = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    return raw | {"vision_config": vision, "rope_scaling": scaling}


@pytest.mark.parametrize("size", ["2B", "7B", "72B"])
@pytest.mark.parametrize("form", [dict, form_4_45, form_4_57, form_5_23], ids=lambda f: f.__name__)
def test_every_form_of_config_json_is_the_same_config(size: str, form: Any) -> None:
    config = Qwen2VLConfig.from_dict(form(official_config_json(size)))
    assert config == PRESETS[size]
    assert not config.extra


def test_omitted_vision_fields_take_hf_defaults() -> None:
    raw = official_config_json("7B") | {"vision_config": {"in_chans": 3, "model_type": "qwen2_vl"}}
    assert Qwen2VLConfig.from_dict(raw) == PRESETS["7B"]


@pytest.mark.parametrize("size", ["2B", "7B", "72B"])
def test_to_dict_round_trip(size: str) -> None:
    written = json.loads(json.dumps(PRESETS[size].to_dict()))
    assert Qwen2VLConfig.from_dict(written) == PRESETS[size]


def test_written_keys_are_the_official_ones() -> None:
    official = official_config_json("2B")
    written = PRESETS["2B"].to_dict()
    assert written.pop("vision_config").items() >= official.pop("vision_config").items()
    for key, value in written.items():
        assert official[key] == value, key
    omitted = set(official) - set(written)
    assert omitted == {
        "max_window_layers",
        "sliding_window",
        "transformers_version",
        "vision_token_id",
    }


def test_vision_rope_theta_round_trip() -> None:
    raw = form_5_23(official_config_json("2B"))
    raw["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 500.0}
    config = Qwen2VLConfig.from_dict(raw)
    assert config.vision.rope_theta == 500.0
    assert Qwen2VLConfig.from_dict(config.to_dict()) == config


def test_tie_word_embeddings_false_at_the_root_does_not_override_text_config() -> None:
    raw = form_4_57(official_config_json("2B")) | {"tie_word_embeddings": False}
    assert Qwen2VLConfig.from_dict(raw).text.tie_word_embeddings


def test_missing_rms_norm_eps_means_the_class_default() -> None:
    raw = official_config_json("7B")
    del raw["rms_norm_eps"]
    assert Qwen2VLConfig.from_dict(raw).text.rms_norm_eps == 1e-5


def test_null_rope_theta_falls_back_to_rope_scaling() -> None:
    raw = official_config_json("7B") | {"rope_theta": None}
    raw["rope_scaling"] = raw["rope_scaling"] | {"rope_theta": 5e5}
    assert Qwen2VLConfig.from_dict(raw).text.rope_theta == 5e5


def test_the_first_of_several_eos_token_ids_is_used() -> None:
    raw = official_config_json("7B") | {"eos_token_id": [151644, 151643]}
    assert Qwen2VLConfig.from_dict(raw).eos_token_id == 151644


def test_unknown_keys_are_stored_in_extra() -> None:
    config = Qwen2VLConfig.from_dict(official_config_json("7B") | {"novelty": 1, "auto_map": {}})
    assert config.extra == {"novelty": 1}


def test_a_config_can_be_copied_and_pickled() -> None:
    config = Qwen2VLConfig.from_dict(official_config_json("2B"))
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_mean_and_std_come_from_the_preprocessor() -> None:
    settings = {"image_mean": [0.5, 0.5, 0.0], "image_std": [0.5, 0.25, 1], "merge_size": 2}
    vision = Qwen2VLConfig.from_dict(official_config_json("7B"), settings).vision
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.5, 0.0), (0.5, 0.25, 1))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl', this library runs 'qwen2_vl'"),
        ({"num_attention_heads": 11}, "hidden_size 1536 must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_key_value_heads 5"),
        ({"num_attention_heads": "12"}, "num_attention_heads is '12', must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be a whole number from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"image_token_id": -1}, "image_token_id is -1, must be a whole number from 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', must be true or false"),
        ({"vocab_size": 151656}, "must lie below vocab_size 151656"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', must be 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True, must be False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is 'sliding_att"),
        ({"vision_config": [1]}, r"vision_config is \[1\], expected an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling type is 'yarn'"),
        ({"rope_scaling": {"type": "mrope"}}, "no mrope_section, as"),
        ({"rope_scaling": {"mrope_section": [16, 24, 23]}}, "sum to half of the head width 128"),
        ({"rope_scaling": {"mrope_section": [32, 32]}}, "must be three numbers"),
        ({"rope_scaling": {"mrope_section": 64}}, "mrope_section is 64, must be whole numbers"),
        ({"rope_scaling": "mrope"}, "rope_scaling is 'mrope', expected an object"),
        ({"hidden_size": 1664}, r"vision hidden_size 1536 \(the merger's output\) must equal"),
    ],
)
def test_invalid_configs_are_rejected_with_the_violated_rule(
    changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        Qwen2VLConfig.from_dict(official_config_json("2B") | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"embed_dim": 1270}, "embed_dim 1270 must be a multiple of 4"),
        ({"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu', must be 'quick_gelu'"),
        ({"spatial_merge_size": 3}, "merge_size in the preprocessing settings is 2, must be 3"),
        ({"patch_size": 16}, "patch_size in the preprocessing settings is 14, must be 16"),
        ({"in_channels": 1, "in_chans": 1}, "one number for each of 1 channels"),
    ],
)
def test_invalid_vision_configs_are_rejected(changes: dict[str, Any], text: str) -> None:
    raw = official_config_json("2B")
    raw["vision_config"] |= changes
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    with pytest.raises(ConfigError, match=text):
        Qwen2VLConfig.from_dict(raw, settings)


def test_another_spatial_merge_size_is_rejected() -> None:
    raw = official_config_json("2B")
    raw["vision_config"]["spatial_merge_size"] = 4
    with pytest.raises(ConfigError, match="spatial_merge_size is 4, this library runs 2"):
        Qwen2VLConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"do_resize": False}, "do_resize in the preprocessing settings is False, must be True"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor in the preprocessing settings is 0.0078"),
        ({"do_normalize": False}, "do_normalize in the preprocessing settings is False"),
        ({"temporal_patch_size": 1}, "temporal_patch_size in the preprocessing settings is 1"),
        ({"resample": 2}, "resample in the preprocessing settings is 2, must be 3"),
    ],
)
def test_unsupported_preprocessing_is_rejected(settings: dict[str, Any], text: str) -> None:
    raw = official_config_json("2B")
    del raw["vision_config"]["temporal_patch_size"]
    with pytest.raises(ConfigError, match=text):
        Qwen2VLConfig.from_dict(raw, settings)


def test_preprocessing_settings_written_by_transformers_are_accepted() -> None:
    written = '{"do_resize": true, "resample": 3, "do_rescale": true, "do_normalize": true, '
    settings = json.loads(written + '"rescale_factor": 0.00392156862745098}')
    assert Qwen2VLConfig.from_dict(official_config_json("2B"), settings) == PRESETS["2B"]


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_key_value_heads"])
def test_missing_fields_are_named(name: str) -> None:
    raw = official_config_json("2B")
    del raw[name]
    with pytest.raises(ConfigError, match=f"missing {name}"):
        Qwen2VLConfig.from_dict(raw)


def test_the_constructor_validates_too() -> None:
    with pytest.raises(ConfigError, match="image_token_id is 'x'"):
        tiny_config(image_token_id="x")
