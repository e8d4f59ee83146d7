"""What the model is: frozen dataclasses with config.json's own names, and the presets.

`Qwen2VLConfig.from_dict` reads every form of config.json that official and re-saved checkpoints
come in (text fields flat at the root, or nested under `text_config`; `rope_scaling` or
`rope_parameters`), and `to_dict` writes the official flat form. It must not know files, tensors
or torch: standard library only. (Qwen2-VL Table 1; HF: Qwen2VLConfig.) Next room: geometry.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from types import MappingProxyType
from typing import Any, cast

from qwen2vl.errors import ConfigError

__all__ = ["PRESETS", "Qwen2VLConfig", "TextConfig", "VisionConfig"]

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_ROPE_THETA = 10000.0

# Older spellings of the same field, as the official files write them.
_VISION_ALIASES = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}

# What the preprocessing settings repeat, under their names and ours.
_SHARED_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}

# What is always done to pixels, under the names of the preprocessing settings that could ask for
# something else; 3 is Pillow's bicubic.
_PIXEL_STEPS = {
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}

# Fields of config.json that describe training, serving or the writer, never the arithmetic.
_IGNORED = frozenset(
    "architectures attention_dropout auto_map dtype hidden_act initializer_range max_window_layers "
    "model_type rope_parameters rope_scaling sliding_window text_config torch_dtype "
    "transformers_version use_cache use_sliding_window vision_config vision_token_id layer_types "
    "head_dim quantization_config rope_theta pad_token_id".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower. Defaults are HF's class defaults, which re-saved files leave out."""

    depth: int = 32  # blocks
    embed_dim: int = 1280  # E, vision width
    num_heads: int = 16
    mlp_ratio: float = 4  # MLP width over embed_dim
    hidden_size: int = 3584  # D, text width: what the merger writes
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
        """Pixels a side of one vision token, 28: both sides of a picture are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The language model: a Qwen2 decoder with multimodal rotary positions."""

    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    vocab_size: int  # V, rows of the table; the last ones may be unused padding
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
    """The whole model. Build with `from_dict`, or take one of PRESETS; never mutated after."""

    vision: VisionConfig
    text: TextConfig
    bos_token_id: int = 151643  # <|endoftext|>; never prepended
    eos_token_id: int = 151645  # <|im_end|>
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655
    video_token_id: int = 151656
    extra: Mapping[str, Any] = field(  # keys we do not know
        default_factory=dict[str, Any], compare=False
    )

    def __post_init__(self) -> None:
        _check(self)

    @property
    def pad_ids(self) -> tuple[int, int]:
        """The two placeholder tokens that vision tokens overwrite."""
        return self.image_token_id, self.video_token_id

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None
    ) -> Qwen2VLConfig:
        """Build from the content of config.json, and of preprocessor_config.json for mean and std.

        Raises:
            ConfigError: another kind of model, a missing field, or numbers that do not agree.
        """
        kind = raw.get("model_type", "qwen2_vl")
        if kind != "qwen2_vl":
            raise ConfigError(f"config.json: model_type is {kind!r}, this library runs 'qwen2_vl'")
        nested = _object(raw, "text_config")
        text: dict[str, Any] = {**raw, **nested}
        # transformers 5 writes the flag at the root, 4.5x inside; either place ties the head.
        text["tie_word_embeddings"] = (
            raw.get("tie_word_embeddings") or nested.get("tie_word_embeddings") or False
        )
        text |= _rope(text)
        # A file without it means HF's class default, not the 1e-6 of the released models.
        text.setdefault("rms_norm_eps", 1e-5)
        seen = _object(raw, "vision_config")
        # HF reads only the newer spelling; the older counts where that is absent.
        vision = {_VISION_ALIASES[k]: v for k, v in seen.items() if k in _VISION_ALIASES}
        vision |= seen
        vision |= _rope_theta_of_vision(vision)
        for key in ("image_mean", "image_std"):
            if preprocessor and preprocessor.get(key):
                vision[key] = _as_tuple(preprocessor[key])
        _check_arithmetic(text, vision, preprocessor or {})
        found = {k: _first_id(text.get(k)) for k in _own_names(cls)}
        ids = {k: v for k, v in found.items() if v is not None}
        known = _IGNORED | _own_names(cls) | _own_names(TextConfig)
        extra = {k: v for k, v in raw.items() if k not in known}
        if extra:
            logger.debug("config.json: unknown keys kept aside: %s", ", ".join(sorted(extra)))
        return cls(
            vision=_build(VisionConfig, vision, "vision_config"),
            text=_build(TextConfig, text, "config.json"),
            extra=extra,
            **ids,
        )

    def to_dict(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """Write the official flat form, which every engine that knows Qwen2-VL opens."""
        text = {k: getattr(self.text, k) for k in sorted(_own_names(TextConfig))}
        section = list(text.pop("mrope_section"))
        vision = {k: getattr(self.vision, k) for k in sorted(_own_names(VisionConfig))}
        for key in ("image_mean", "image_std"):
            del vision[key]  # they live in preprocessor_config.json
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
        }


def _own_names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)} - {"vision", "text", "extra"}


def _build(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    """Pick the fields of `cls` out of `raw`; a field without a default must be there."""
    picked = {k: raw[k] for k in _own_names(cls) if raw.get(k) is not None}
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in picked]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**picked)


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A JSON object inside another; absent and null are empty."""
    value: Any = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} is {value!r}, expected an object")
    return cast("Mapping[str, Any]", value)


def _as_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _first_id(value: Any) -> Any:
    """Some files list every id that ends an answer; the first is the chat's."""
    values = cast("list[Any]", value if isinstance(value, list) else [value])
    return values[0] if values else None


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and theta from either spelling; "mrope" and "default" mean the same thing."""
    rope = _object(text, "rope_scaling") or _object(text, "rope_parameters")
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


def _rope_theta_of_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    theta = _object(vision, "rope_parameters").get("rope_theta")
    return {"rope_theta": theta} if theta else {}


def _check_arithmetic(
    text: Mapping[str, Any], vision: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> None:
    """Refuse settings that would change what is computed, and that we do not compute."""
    default = VisionConfig()  # what a file leaves out
    of_pixels = _PIXEL_STEPS | {
        theirs: vision.get(ours) or getattr(default, ours) for theirs, ours in _SHARED_SIZES.items()
    }
    rules = [
        ("hidden_act", text.get("hidden_act"), "silu"),
        ("attention_dropout", text.get("attention_dropout"), 0.0),
        ("use_sliding_window", text.get("use_sliding_window"), False),
        *(("layer_types", kind, "full_attention") for kind in text.get("layer_types") or ()),
        ("vision_config.hidden_act", vision.get("hidden_act"), "quick_gelu"),
        *(
            (f"{name} in the preprocessing settings", preprocessor.get(name), want)
            for name, want in of_pixels.items()
        ),
    ]
    for name, got, want in rules:
        if got is not None and got != want:
            raise ConfigError(f"config.json: {name} is {got!r}, must be {want!r}")


def _check_field(name: str, kind: str, value: Any) -> None:
    """Hold one field to its annotation, whatever JSON brought: sizes are whole, from 1."""
    least = 0 if name.endswith("_token_id") else 1
    listed = kind.startswith("tuple")
    numbers = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
    if kind == "bool":
        good, want = isinstance(value, bool), "true or false"
    elif "int" in kind:
        good = all(type(n) is int and n >= least for n in numbers)
        want = f"{'whole numbers' if listed else 'a whole number'} from {least}"
    else:
        real = all(type(n) in (int, float) and isfinite(n) for n in numbers)
        good = real and (min(numbers) > 0 or name == "image_mean")
        want = "numbers above 0" if listed else "a number above 0"
    if not good or listed != isinstance(value, tuple):
        raise ConfigError(f"config.json: {name} is {value!r}, must be {want}")


def _check(config: Qwen2VLConfig) -> None:
    """Refuse numbers that cannot belong to one model, naming the rule that is broken."""
    vision, text = config.vision, config.text
    for part in (vision, text, config):
        for f in fields(part):
            if f.name in _own_names(type(part)):
                _check_field(f.name, str(f.type), getattr(part, f.name))
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
            f"vision hidden_size {vision.hidden_size} (what the merger writes) must equal "
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
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ConfigError("config.json: " + "; ".join(broken))


def _official(
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


# Parameters: 2,208,985,600 / 8,291,375,616 / 73,405,560,320.
PRESETS: Mapping[str, Qwen2VLConfig] = MappingProxyType(
    {
        "2B": _official(1536, 8960, 28, 12, 2, 151936, tied=True),
        "7B": _official(3584, 18944, 28, 28, 4, 152064, tied=False),
        "72B": _official(8192, 29568, 80, 64, 8, 152064, tied=False),
    }
)
