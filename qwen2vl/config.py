"""Model configuration: frozen dataclasses with the field names of config.json, and presets.

`Qwen2VLConfig.from_dict` reads every form of config.json found in official and re-saved checkpoints
(text fields flat at the root or nested under `text_config`; `rope_scaling` or `rope_parameters`);
`to_dict` writes the official flat form. Standard library only.
(Qwen2-VL Table 1; HF: Qwen2VLConfig.)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from types import MappingProxyType
from typing import Any, cast

from qwen2vl.errors import ConfigError, abbreviate

__all__ = ["MERGED_ADAPTERS", "PRESETS", "Qwen2VLConfig", "TextConfig", "VisionConfig"]

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_ROPE_THETA = 10000.0
MERGED_ADAPTERS = "merged_adapters"  # our key of config.json, which other programs ignore

# Older names of the same fields, which the official files use.
_VISION_ALIASES = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}

# Fields that preprocessor_config.json repeats: its name -> the name in `VisionConfig`.
_PREPROCESSOR_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}

# The only supported values of other fields of preprocessor_config.json; resample 3 is Pillow's
# bicubic.
_PREPROCESSING = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}

# Fields of config.json that describe training, serving or the writer, or are handled separately.
_IGNORED = frozenset(
    "architectures attention_dropout auto_map dtype hidden_act initializer_range max_window_layers "
    "model_type rope_parameters rope_scaling sliding_window text_config torch_dtype "
    "transformers_version use_cache use_sliding_window vision_config vision_token_id layer_types "
    "head_dim quantization_config rope_theta pad_token_id".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower. Defaults are HF's class defaults, which re-saved files omit."""

    depth: int = 32  # number of blocks
    embed_dim: int = 1280  # E, vision width
    num_heads: int = 16
    mlp_ratio: float = 4  # MLP width over embed_dim
    hidden_size: int = 3584  # D, text width: output of the merger
    in_channels: int = 3
    patch_size: int = 14  # pixels a side
    temporal_patch_size: int = 2  # frames a patch
    spatial_merge_size: int = 2  # patches a side that become one vision token
    rope_theta: float = VISION_ROPE_THETA
    image_mean: tuple[float, ...] = CLIP_MEAN  # from preprocessor_config.json, in [0, 1]
    image_std: tuple[float, ...] = CLIP_STD

    @property
    def head_dim(self) -> int:
        """C: channels of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """P: numbers in one patch, 3 * 2 * 14 * 14 = 1176."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Side of one vision token in pixels, 28: image height and width are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The language model: a Qwen2 decoder with M-RoPE."""

    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    vocab_size: int  # V, rows of the embedding matrix; the last ones may be unused padding
    mrope_section: tuple[int, int, int]  # frequencies for (time, height, width)
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """C: channels of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VLConfig:
    """Configuration of the whole model, immutable; from `from_dict` or PRESETS."""

    vision: VisionConfig
    text: TextConfig
    bos_token_id: int = 151643  # <|endoftext|>; never prepended
    eos_token_id: int = 151645  # <|im_end|>
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    video_token_id: int = 151656
    extra: Mapping[str, Any] = field(  # unknown keys of config.json
        default_factory=dict[str, Any], compare=False
    )

    def __post_init__(self) -> None:
        # Callers without a type checker may have given anything.
        for name, kind in (("vision", VisionConfig), ("text", TextConfig)):
            value: object = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(f"{name}: got {abbreviate(value)}, must be a {kind.__name__}")
        _validate(self)

    @property
    def placeholder_ids(self) -> tuple[int, int]:
        """Token ids of the image and video placeholders, <|image_pad|> and <|video_pad|>."""
        return self.image_token_id, self.video_token_id

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> Qwen2VLConfig:
        """Build from the content of config.json, and of preprocessor_config.json for mean and std.

        Raises:
            ConfigError: another model type, a missing field, or inconsistent or unsupported values.
        """
        if not isinstance(cast("object", raw), Mapping):
            raise ConfigError(f"config.json: got {abbreviate(raw)}, must be a JSON object")
        kind = raw.get("model_type", "qwen2_vl")
        if kind != "qwen2_vl":
            raise ConfigError(f"config.json: model_type is {kind!r}, this library runs 'qwen2_vl'")
        nested = _json_object(raw, "text_config")
        text: dict[str, Any] = {**raw, **nested}
        # transformers 5 writes the flag at the root, 4.5x in text_config; either ties the head.
        text["tie_word_embeddings"] = (
            raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings") or False
        )
        text |= _mrope_fields(text)
        # If absent, HF uses its class default 1e-5, not the 1e-6 of the released models.
        text.setdefault("rms_norm_eps", 1e-5)
        raw_vision = _json_object(raw, "vision_config")
        # HF reads only the newer names; the older ones are used where those are absent.
        vision = {_VISION_ALIASES[k]: v for k, v in raw_vision.items() if k in _VISION_ALIASES}
        vision |= raw_vision
        vision |= _vision_rope_theta(vision)
        for key in ("image_mean", "image_std"):
            if preprocessor and preprocessor.get(key):
                vision[key] = _as_tuple(preprocessor[key])
        _check_supported(text, vision, preprocessor or {})
        token_ids = {k: _first_token_id(text.get(k)) for k in _field_names(cls)}
        token_ids = {k: v for k, v in token_ids.items() if v is not None}
        known = _IGNORED | _field_names(cls) | _field_names(TextConfig)
        extra = {k: v for k, v in raw.items() if k not in known}
        if extra:
            logger.debug(
                "config.json: unknown keys stored in `extra`: %s", ", ".join(sorted(extra))
            )
        return cls(
            vision=_from_fields(VisionConfig, vision, "vision_config"),
            text=_from_fields(TextConfig, text, "config.json"),
            extra=extra,
            **token_ids,
        )

    def to_dict(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the official flat form of config.json, which every Qwen2-VL engine can read."""
        text = {k: getattr(self.text, k) for k in sorted(_field_names(TextConfig))}
        section = list(text.pop("mrope_section"))
        vision = {k: getattr(self.vision, k) for k in sorted(_field_names(VisionConfig))}
        for key in ("image_mean", "image_std"):
            del vision[key]  # stored in preprocessor_config.json
        if (theta := vision.pop("rope_theta")) != VISION_ROPE_THETA:
            vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        vision["in_chans"] = vision["in_channels"]
        vision["spatial_patch_size"] = vision["patch_size"]
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
            **text,
            "vision_config": vision,
            **{key: self.extra[key] for key in (MERGED_ADAPTERS,) if key in self.extra},
        }


def _field_names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)} - {"vision", "text", "extra"}


def _from_fields(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    """Build `cls` from the keys of `raw` that it has; fields without a default are required."""
    picked = {k: raw[k] for k in _field_names(cls) if raw.get(k) is not None}
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in picked]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**picked)


def _json_object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the JSON object under `key`; absent and null are empty."""
    value: Any = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} is {value!r}, expected an object")
    return cast("Mapping[str, Any]", value)


def _as_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _first_token_id(value: Any) -> Any:
    """Return the first id of a list: some files list all end tokens, that of the chat first."""
    values = cast("list[Any]", value if isinstance(value, list) else [value])
    return values[0] if values else None


def _mrope_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """Read mrope_section and rope_theta; the types "mrope" and "default" are synonyms."""
    rope = _json_object(text, "rope_scaling") or _json_object(text, "rope_parameters")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("mrope", "default"):
        raise ConfigError(
            f"config.json: rope_scaling type is {kind!r}, supported are 'mrope' and 'default'; "
            "remove the scaling and keep mrope_section"
        )
    if "mrope_section" not in rope:
        raise ConfigError("config.json: rope_scaling has no mrope_section, as [16, 24, 24]")
    theta = text.get("rope_theta") or rope.get("rope_theta")
    return {"mrope_section": _as_tuple(rope["mrope_section"])} | (
        {"rope_theta": theta} if theta else {}
    )


def _vision_rope_theta(vision: Mapping[str, Any]) -> dict[str, Any]:
    theta = _json_object(vision, "rope_parameters").get("rope_theta")
    return {"rope_theta": theta} if theta else {}


def _check_supported(
    text: Mapping[str, Any], vision: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    """Raise for settings that would change the computation in a way that is not implemented."""
    default = VisionConfig()  # for fields that the file omits
    required = _PREPROCESSING | {
        name: vision.get(field_name) or getattr(default, field_name)
        for name, field_name in _PREPROCESSOR_SIZES.items()
    }
    rules = [
        ("hidden_act", text.get("hidden_act"), "silu"),
        ("attention_dropout", text.get("attention_dropout"), 0.0),
        ("use_sliding_window", text.get("use_sliding_window"), False),
        *(("layer_types", kind, "full_attention") for kind in text.get("layer_types") or ()),
        ("vision_config.hidden_act", vision.get("hidden_act"), "quick_gelu"),
        *(
            (f"{name} in the preprocessing settings", preprocessor.get(name), expected)
            for name, expected in required.items()
        ),
    ]
    for name, value, expected in rules:
        if value is not None and value != expected:
            raise ConfigError(f"config.json: {name} is {value!r}, must be {expected!r}")


def _check_field_type(name: str, kind: str, value: Any) -> None:
    """Check one field against its annotation `kind`; integers must be at least 1, token ids 0."""
    minimum = 0 if name.endswith("_token_id") else 1
    is_tuple = kind.startswith("tuple")
    numbers = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
    if kind == "bool":
        is_valid, expected = isinstance(value, bool), "true or false"
    elif "int" in kind:
        is_valid = all(type(n) is int and n >= minimum for n in numbers)
        expected = f"{'whole numbers' if is_tuple else 'a whole number'} from {minimum}"
    else:
        is_finite = all(type(n) in (int, float) and isfinite(n) for n in numbers)
        is_valid = is_finite and (min(numbers) > 0 or name == "image_mean")
        expected = "numbers above 0" if is_tuple else "a number above 0"
    if not is_valid or is_tuple != isinstance(value, tuple):
        raise ConfigError(f"config.json: {name} is {value!r}, must be {expected}")


def _validate(config: Qwen2VLConfig) -> None:
    """Raise ConfigError for inconsistent sizes, with every violated rule in the message."""
    vision, text = config.vision, config.text
    for part in (vision, text, config):
        for f in fields(part):
            if f.name in _field_names(type(part)):
                _check_field_type(f.name, str(f.type), getattr(part, f.name))
    rules = [
        (
            vision.embed_dim % (4 * vision.num_heads) == 0,
            f"vision embed_dim {vision.embed_dim} must be a multiple of 4 * num_heads "
            f"{vision.num_heads}",
        ),
        (
            text.hidden_size % text.num_attention_heads == 0,
            f"hidden_size {text.hidden_size} must be a multiple of num_attention_heads "
            f"{text.num_attention_heads}",
        ),
        (
            text.num_attention_heads % text.num_key_value_heads == 0,
            f"num_attention_heads {text.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {text.num_key_value_heads}",
        ),
        (
            len(text.mrope_section) == 3 and sum(text.mrope_section) * 2 == text.head_dim,
            f"mrope_section {list(text.mrope_section)} must be three numbers that sum to half of "
            f"the head width {text.head_dim}",
        ),
        (
            vision.hidden_size == text.hidden_size,
            f"vision hidden_size {vision.hidden_size} (the merger's output) must equal "
            f"hidden_size {text.hidden_size}",
        ),
        (
            max(config.image_token_id, config.video_token_id) < text.vocab_size,
            f"image_token_id {config.image_token_id} and video_token_id {config.video_token_id} "
            f"must lie below vocab_size {text.vocab_size}",
        ),
        (
            vision.spatial_merge_size == 2,
            f"spatial_merge_size is {vision.spatial_merge_size}, this library runs 2, as in every "
            "released model",
        ),
        (
            len(vision.image_mean) == len(vision.image_std) == vision.in_channels,
            f"image_mean {list(vision.image_mean)} and image_std {list(vision.image_std)} must "
            f"have one number for each of {vision.in_channels} channels",
        ),
    ]
    violations = [message for holds, message in rules if not holds]
    if violations:
        raise ConfigError("config.json: " + "; ".join(violations))


def _official_config(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, *, tied: bool
) -> Qwen2VLConfig:
    return Qwen2VLConfig(
        vision=VisionConfig(hidden_size=hidden),
        text=TextConfig(
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocab,
            mrope_section=(16, 24, 24),
            tie_word_embeddings=tied,
        ),
    )


# Numbers of parameters: 2,208,985,600 / 8,291,375,616 / 73,405,560,320.
PRESETS: Mapping[str, Qwen2VLConfig] = MappingProxyType(
    {
        "2B": _official_config(1536, 8960, 28, 12, 2, 151936, tied=True),
        "7B": _official_config(3584, 18944, 28, 28, 4, 152064, tied=False),
        "72B": _official_config(8192, 29568, 80, 64, 8, 152064, tied=False),
    }
)
