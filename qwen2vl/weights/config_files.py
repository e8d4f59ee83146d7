"""The small JSON files of a model folder: config, preprocessing, generation defaults.

Files in the wild differ in name and spelling; what leaves this room does not. Code shipped with a
folder (auto_map, a chat template) is never run: the arithmetic and the template are ours.
(HF: Qwen2VLConfig, Qwen2VLImageProcessor, GenerationConfig.) Next room: header.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.weights.quantization_config import Packing

__all__ = [
    "CHAT_TEMPLATE",
    "PICKLE_SUFFIXES",
    "GenerationDefaults",
    "note_chat_template",
    "pickle_remedy",
    "read_config",
    "read_generation_defaults",
    "read_json",
    "read_preprocessor",
]

# Content parts are recognized by type or by key, as the official template does; pictures and
# videos are counted only for add_vision_id.
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


logger = logging.getLogger(__name__)

# What the official repositories' template hashes to; ours says the same in other words.
_OFFICIAL_TEMPLATE = "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a folder's generation_config.json proposes; None where it says nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] | None = None  # any of them ends an answer


def read_config(folder: Path) -> Qwen2VLConfig:
    """Build the config of a folder, with mean and std from its preprocessing settings.

    Raises:
        CheckpointError: no config.json, or weights of a kind that this library does not run.
        ConfigError: config.json is there, and describes another or an impossible model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(_why_no_config(folder))
    raw = read_json(path)
    if quantization := raw.get("quantization_config"):
        Packing.from_dict(quantization, str(folder))  # refused before anything else is
    if "auto_map" in raw:
        logger.debug("%s: auto_map ignored, code of a model folder is never run", path)
    preprocessor = _find_preprocessor(folder)
    try:
        return Qwen2VLConfig.from_dict(raw, preprocessor)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Read the settings of pictures; `PixelLimits.from_dict` understands their spellings.

    Looked for as the reference does: `image_processor` inside processor_config.json, then
    preprocessor_config.json; last video_preprocessor_config.json, which repeats them.

    Raises:
        CheckpointError: none of the three is there. The limits are never guessed: the reference's
            class default is a thirteenth of what the models were released with.
    """
    settings = _find_preprocessor(folder)
    if settings is None:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json is missing (nor is there an image_processor in "
            "processor_config.json); copy it from the repository this model comes from"
        )
    return settings


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read generation_config.json; a folder without one proposes nothing."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    raw = read_json(path)
    sample = raw.get("do_sample")
    if not isinstance(sample, (bool, type(None))):
        raise CheckpointError(f"{path}: do_sample is {sample!r}, expected true or false")
    numbers = {name: _number(raw, name, path) for name in _NUMBERS}
    return GenerationDefaults(
        do_sample=sample,
        eos_token_ids=_ids(raw.get("eos_token_id"), path),
        **numbers,
    )


def note_chat_template(folder: Path) -> None:
    """Leave a debug note where a folder's own chat template is not the official one.

    Templates are programs of strangers and are never run: chats are rendered by our own code.
    """
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, str) and not _is_ours(template):
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


def pickle_remedy(name: str) -> str:
    """Say how to turn a pickle into safetensors on a machine one trusts."""
    return (
        'convert it offline: python -c "import torch; from safetensors.torch import save_file; '
        f"save_file({{k: v.clone() for k, v in torch.load('{name}', weights_only=True).items()}}, "
        "'model.safetensors', {'format': 'pt'})\""
    )


_NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


def _is_ours(template: str) -> bool:
    digest = hashlib.sha256(template.encode()).hexdigest()
    return template == CHAT_TEMPLATE or digest == _OFFICIAL_TEMPLATE


def _number(raw: Mapping[str, Any], name: str, path: Path) -> Any:
    value = raw.get(name)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise CheckpointError(f"{path}: {name} is {value!r}, expected a number")


def _ids(value: Any, path: Path) -> tuple[int, ...] | None:
    """One id, or a list of them."""
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected an id or a list of ids")
    return tuple(ids)


def _find_preprocessor(folder: Path) -> dict[str, Any] | None:
    """The settings of whichever file speaks first, or None."""
    nested = folder / "processor_config.json"
    if nested.is_file():
        settings = read_json(nested).get("image_processor")
        if isinstance(settings, dict):
            return settings
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return None


def _why_no_config(folder: Path) -> str:
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
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{folder}: config.json is missing (found {shown}); give the folder of a whole model"
