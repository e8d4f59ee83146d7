"""JSON config files of a model folder: config, preprocessor, generation defaults, chat template.

Folders differ in file names and key spellings; the return values do not. Code that comes with a
folder (auto_map, chat templates) is never run: chats are rendered by processor/chat_template.py,
and saved folders get the CHAT_TEMPLATE below. (HF: Qwen2VLConfig, Qwen2VLImageProcessor,
GenerationConfig.)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError, ConfigError, abbreviate, suggest
from qwen2vl.weights.packing.quantization_config import QuantizationConfig

__all__ = [
    "CHAT_TEMPLATE",
    "PICKLE_SUFFIXES",
    "GenerationDefaults",
    "log_foreign_chat_template",
    "pickle_remedy",
    "read_config",
    "read_generation_defaults",
    "read_json",
    "read_preprocessor_config",
]

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Of generation_config.json.
_NUMBER_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
# Of config.json: two names of one mapping.
_ROPE_NAMES = ("rope_scaling", "rope_parameters")
_ROPE_FIELDS = ("type", "rope_type", "mrope_section", "rope_theta")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults in a folder's generation_config.json; None where a field is absent."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] | None = None  # any of them ends the output


def read_config(folder: Path, hf_overrides: Mapping[str, Any] | None = None) -> Qwen2VLConfig:
    """Read the config of a folder, with image mean and std from its preprocessor config.

    `hf_overrides` replace values of config.json, in whichever of its forms; nested mappings, such
    as vision_config, are merged. (vLLM: hf_overrides.)

    Raises:
        CheckpointError: no config.json, or an unsupported quantization of the weights.
        ConfigError: config.json describes another or an impossible model, or does so with
            `hf_overrides`, or these have a name that no field of config.json has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(_missing_config_message(folder))
    raw = read_json(path)
    if quantization := raw.get("quantization_config"):
        QuantizationConfig.from_dict(quantization, str(folder))  # raises first
    if "auto_map" in raw:
        logger.debug("%s: auto_map ignored, code of a model folder is never run", path)
    preprocessor = _find_preprocessor_config(folder)
    overridden = _override(raw, hf_overrides) if hf_overrides else raw
    try:
        return Qwen2VLConfig.from_dict(overridden, preprocessor)
    except ConfigError as error:
        if hf_overrides and _is_valid(raw, preprocessor):
            text = str(error).removeprefix("config.json: ")
            raise ConfigError(f"hf_overrides: {text}") from None
        raise ConfigError(f"{folder}: {error}") from None


def _is_valid(raw: Mapping[str, Any], preprocessor: Mapping[str, Any] | None) -> bool:
    try:
        Qwen2VLConfig.from_dict(raw, preprocessor)
    except ConfigError:
        return False
    return True


def _override(raw: Mapping[str, Any], hf_overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge values into the root, and of the nested form into `text_config`, too."""
    nested = raw.get("text_config")
    text = {**raw, **nested} if isinstance(nested, Mapping) else raw
    _check_override_names(raw, text, hf_overrides)
    values = dict(hf_overrides)
    values = _merge(values, values.pop("text_config", {}))
    rope: dict[str, Any] = {}
    for name in _ROPE_NAMES:
        rope |= values.pop(name, {})
    if rope:
        values["rope_scaling" if text.get("rope_scaling") else "rope_parameters"] = rope
    if "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])  # precedes that of the mapping
    replaced = _merge(raw, values)
    if nested:
        replaced["text_config"] = _merge(text, values)
    return replaced


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with other values; mappings that both have are merged as well."""
    merged = dict(base)
    for name, value in values.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[name] = value
    return merged


def _check_override_names(
    raw: Mapping[str, Any], text: Mapping[str, Any], hf_overrides: Mapping[str, Any]
) -> None:
    """Refuse names that neither the file nor the official config.json has, at both levels."""
    official = PRESETS["2B"].to_dict()
    vision = raw.get("vision_config")
    root = {*official, *text, *_ROPE_NAMES, "text_config"}
    nested: dict[str, Collection[str]] = {
        "text_config": root - {"text_config", "vision_config"},
        "vision_config": {*official["vision_config"], *(vision or ())},
        **dict.fromkeys(_ROPE_NAMES, _ROPE_FIELDS),
    }

    def check(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
        for name, value in values.items():
            if name not in known:
                raise ConfigError(
                    f"hf_overrides: {where} has no field {abbreviate(name)}; "
                    f"{suggest(str(name), known)}"
                )
            if name not in nested:
                continue
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"hf_overrides: {name} is {abbreviate(value)}, must be a mapping of the values "
                    "to replace"
                )
            check(value, nested[name], name)

    check(hf_overrides, root, "config.json")


def read_preprocessor_config(folder: Path) -> dict[str, Any]:
    """Read the image preprocessor settings, which `PixelLimits.from_dict` parses.

    Searched in the order of transformers: `image_processor` inside processor_config.json, then
    preprocessor_config.json; last video_preprocessor_config.json, which repeats them.

    Raises:
        CheckpointError: none of the three exists. There is no default for the pixel limits:
            transformers' class default is a thirteenth of what the models were released with.
    """
    settings = _find_preprocessor_config(folder)
    if settings is None:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json is missing (nor is there an image_processor in "
            "processor_config.json); copy it from the repository this model comes from"
        )
    return settings


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read generation_config.json; without that file all defaults are None."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    raw = read_json(path)
    sample = raw.get("do_sample")
    if not isinstance(sample, (bool, type(None))):
        raise CheckpointError(f"{path}: do_sample is {sample!r}, expected true or false")
    numbers = {name: _read_number(raw, name, path) for name in _NUMBER_FIELDS}
    return GenerationDefaults(
        do_sample=sample,
        eos_token_ids=_token_ids(raw.get("eos_token_id"), path),
        **numbers,
    )


# Written into every saved folder. It renders what the official template renders: content parts are
# recognized by type or by key; images and videos are counted only for add_vision_id.
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id -%}{{ 'Picture ' ~ seen.images ~ ': ' }}{%- endif -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif content['type'] == 'video' or 'video' in content -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id -%}{{ 'Video ' ~ seen.videos ~ ': ' }}{%- endif -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# SHA-256 of the template in the official repositories.
_OFFICIAL_TEMPLATE_SHA256 = "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb"


def log_foreign_chat_template(folder: Path) -> None:
    """Log at debug level if the chat template of a model or adapter is not the official one.

    Templates are untrusted code and are never run: chats are rendered by
    processor/chat_template.py.
    """
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        is_json = path.suffix == ".json"
        template = read_json(path).get("chat_template") if is_json else _read_text(path)
        if isinstance(template, str) and not _is_known_template(template):
            logger.debug("%s: its chat template is not the official one; not used", path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointError(f"{path}: not valid JSON{where}; fetch this file again") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected a JSON object; fetch it again"
        )
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def pickle_remedy(name: str) -> str:
    """Return a command that converts a pickle to safetensors, for use on a trusted machine."""
    return (
        'convert it offline: python -c "import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone() for k, v in torch.load('{name}', weights_only=True).items()}}, "
        "'model.safetensors', {'format': 'pt'})\""
    )


def _is_known_template(template: str) -> bool:
    digest = hashlib.sha256(template.encode()).hexdigest()
    return template == CHAT_TEMPLATE or digest == _OFFICIAL_TEMPLATE_SHA256


def _read_number(raw: Mapping[str, Any], name: str, path: Path) -> Any:
    value = raw.get(name)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise CheckpointError(f"{path}: {name} is {value!r}, expected a number")


def _token_ids(value: Any, path: Path) -> tuple[int, ...] | None:
    """Return one id or a list of ids as a tuple."""
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected an id or a list of ids")
    return tuple(ids)


def _find_preprocessor_config(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the first file that has them, or None."""
    nested = folder / "processor_config.json"
    if nested.is_file():
        settings = read_json(nested).get("image_processor")
        if isinstance(settings, dict):
            return settings
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return None


def _missing_config_message(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if not names:
        return (
            f"{folder}: the folder is empty; fill it with "
            f"`hf download Qwen/Qwen2-VL-2B-Instruct --local-dir {folder}`"
        )
    if "adapter_config.json" in names:
        return (
            f"{folder}: holds a LoRA adapter, not a model; open its base model, with this folder "
            "as the adapter"
        )
    if models := sorted(path.parent for path in folder.glob("*/config.json")):
        several = f", the last of {len(models)}" if len(models) > 1 else ""
        return f"{folder}: is no model, but has one inside; give {models[-1]}{several}"
    if "state.json" in names or any(folder.glob("step-*/state.json")):
        return (
            f"{folder}: holds checkpoints of a training run, not a model; "
            f"`qwen2vl export {folder} -o DIR` makes a model folder of the last one"
        )
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{folder}: config.json is missing (found {shown}); give the folder of a whole model"
