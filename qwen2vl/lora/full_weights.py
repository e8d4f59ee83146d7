"""Weights that an adapter folder holds in full: the parameters of the model that they replace.

PEFT writes modules_to_save, trained biases and embeddings into the adapter's own file; trainers
write what they trained beside the factors into another one (a vision tower, the merger). Names are
as any trainer's wrappers leave them, in either key layout of transformers. They replace weights
that all requests share, so they apply only where an adapter is merged. (PEFT: ModulesToSaveWrapper;
LLaVA and others: non_lora_trainables; ms-swift: vit.safetensors.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL

__all__ = ["describe_parameters", "parse_full_weights", "to_nested_name", "to_official_name"]

# Names of transformers 4.52 and later, and the official ones.
_LAYOUTS = (("model.visual.", "visual."), ("model.language_model.", "model."))
_INNER = ("language_model.", "model.")  # where Qwen2VLModel, without the head, was adapted
# What PEFT, DDP, torch.compile, FSDP and activation checkpointing add to the names of parameters.
_PREFIX = re.compile(r"(base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.)")
_WRAPPER = re.compile(
    r"\.(base_layer|modules_to_save(\.default)?|_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)(?=\.)"
)
_UNTRAINED_COPY = ".original_module."  # PEFT's copy of what modules_to_save replaces

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PATCH_EMBED = "visual.patch_embed.proj.weight"


def parse_full_weights(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], model: Qwen2VL, *, where: str
) -> dict[str, str]:
    """Return the official name of each parameter that is replaced -> its key in `tensors`.

    Args:
        tensors: those of the adapter's files that are no LoRA factors.
        settings: the content of adapter_config.json.
        model: the base model; may be on the meta device.
        where: the adapter's folder, for errors.

    Raises:
        CheckpointError: a name is not one of the model's parameters, or is there twice with
            different values; a shape, dtype or value does not fit; a module of modules_to_save is
            incomplete; an embedding and a head that the model ties were trained apart.
    """
    keys: dict[str, str] = {}
    for key in tensors:
        if _UNTRAINED_COPY in key:
            continue
        name = _parameter_name(key)
        if name in keys and not torch.equal(tensors[key], tensors[keys[name]]):
            raise CheckpointError(
                f"{where}: {name} is there twice, as {keys[name]} and as {key}, which differ; "
                "remove one of the files"
            )
        keys[name] = key
    if model.config.text.tie_word_embeddings:
        _check_tied_head(keys, tensors, settings, where)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, key in keys.items():
        _check_parameter(name, key, tensors[key], shapes, where)
    _check_modules_to_save(settings, keys, list(shapes), where)
    if settings.get("bias") == "all" and not any(name.endswith(".bias") for name in keys):
        raise CheckpointError(
            f"{where}: adapter_config.json says bias 'all', but the folder holds no biases; fetch "
            "the adapter again"
        )
    return keys


def describe_parameters(names: Iterable[str]) -> str:
    """Summarize names of parameters: "390 tensors of visual.*"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return ", ".join(
        f"{len(group)} tensors of {_common_module(group)}.*" if len(group) > 1 else group[0]
        for group in groups.values()
    )


def to_official_name(path: str) -> str:
    """Convert the name of a module or parameter in any key layout to the official, flat one."""
    for nested, flat in (*_LAYOUTS, _INNER):
        if path.startswith(nested):
            return flat + path.removeprefix(nested)
    return path


def to_nested_name(name: str) -> str:
    """Convert an official name to the key layout of transformers 4.52 and later."""
    for nested, flat in _LAYOUTS:
        if name.startswith(flat):
            return nested + name.removeprefix(flat)
    return name


def _parameter_name(key: str) -> str:
    while match := _PREFIX.match(key):
        key = key[match.end() :]
    return to_official_name(_WRAPPER.sub("", key))


def _check_parameter(
    name: str, key: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    expected = shapes.get(name)
    if expected is None:
        raise CheckpointError(
            f"{where}: {key} is no LoRA factor of a linear layer "
            "(base_model.model.MODULE.lora_A.weight or lora_B) and no parameter of this model "
            f"({name}); remove its file if it belongs to something else"
        )
    shape = tuple(tensor.shape)
    if shape != expected and not (name == _PATCH_EMBED and _is_flat(shape, expected)):
        resized = "; tokens were added to it, or it" if name in (_EMBEDDING, _HEAD) else "; it"
        raise CheckpointError(
            f"{where}: {key} is {list(shape)}, this model asks for {list(expected)}{resized} "
            "belongs to another base model"
        )
    if not tensor.is_floating_point() or not _is_finite(tensor):
        raise CheckpointError(f"{where}: {key} holds no finite numbers; fetch it again")


def _is_flat(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a patch embedding is stored as a matrix (E, P) in place of a Conv3d."""
    return (
        len(shape) == 2 and shape[0] == expected[0] and shape[1] == torch.Size(expected[1:]).numel()
    )


def _is_finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # not a mask as large as the tensor
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_tied_head(
    keys: dict[str, str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str
) -> None:
    """Remove the head from `keys` if it repeats the embedding; refuse two that differ.

    PEFT copies what modules_to_save names, so that an embedding is trained apart from its head.
    """
    head, embedding = keys.pop(_HEAD, None), keys.get(_EMBEDDING)
    if head is None and embedding is None:
        return
    is_copied = _is_in_modules_to_save(_EMBEDDING, settings)
    if head is None:
        is_tied = not is_copied or bool(settings.get("ensure_weight_tying"))
    else:
        is_tied = embedding is not None and torch.equal(tensors[head], tensors[embedding])
    if not is_tied:
        raise CheckpointError(
            f"{where}: {head or embedding} was trained apart from the other of embed_tokens and "
            "lm_head, which this model ties (tie_word_embeddings); merge the adapter into its base "
            "model with PEFT and save the result with tie_word_embeddings false"
        )


def _check_modules_to_save(
    settings: Mapping[str, Any], keys: Mapping[str, str], parameters: list[str], where: str
) -> None:
    """Check that each module of modules_to_save is there, with all of its parameters."""
    for target in _modules_to_save(settings, where):
        wanted = [name for name in parameters if _is_in(name, target)]
        if target == "lm_head" and not wanted and _EMBEDDING in keys:
            continue  # tied, and equal to the embedding
        if not wanted:
            raise CheckpointError(
                f"{where}: modules_to_save names {target!r}, which is no module of this model"
            )
        if missing := [name for name in wanted if name not in keys]:
            raise CheckpointError(
                f"{where}: modules_to_save names {target!r}, but the folder lacks "
                f"{describe_parameters(missing)}; fetch the adapter again"
            )


def _modules_to_save(settings: Mapping[str, Any], where: str) -> list[str]:
    targets = settings.get("modules_to_save") or []
    if not isinstance(targets, list) or not all(isinstance(t, str) and t for t in targets):
        raise CheckpointError(
            f"{where}: modules_to_save is {targets!r}, expected a list of names of modules"
        )
    return targets


def _is_in_modules_to_save(name: str, settings: Mapping[str, Any]) -> bool:
    targets = settings.get("modules_to_save") or []
    return any(_is_in(name, target) for target in targets if isinstance(target, str) and target)


def _is_in(parameter: str, target: str) -> bool:
    """Return whether a parameter is of a module whose name ends with `target`, as PEFT matches."""
    parts = to_nested_name(parameter).split(".")[:-1]
    return any(".".join(parts[: i + 1]).endswith(target) for i in range(len(parts)))


def _common_module(names: list[str]) -> str:
    """Return the innermost module that all parameters are in."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
