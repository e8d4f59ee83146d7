"""config_groups of compressed-tensors: the quantization schemes that are run, and written.

A group names target layers and how their weights and activations are quantized. Two schemes are
run, the ones whose stored weights the CPU kernels read as they are:

    W8A8     int-quantized    int8, symmetric, a scale for each output; activations by token
    W4A16    pack-quantized   4 bits in groups of 32, 64 or 128 inputs

Everything else is refused by name. (compressed-tensors: QuantizationScheme, QuantizationArgs;
llm-compressor writes them.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from qwen2vl.errors import CheckpointError
from qwen2vl.linear.cpu.operators import GROUP_SIZES
from qwen2vl.weights.packing.packed_format import PackedFormat

__all__ = ["MIXED_PRECISION", "ConfigGroup", "parse_config_groups"]

MIXED_PRECISION = "mixed-precision"  # the format of a folder whose groups have several

# QuantizationArgs of activations: what it takes for granted, and what is run.
_ACTIVATION_DEFAULTS = {
    **{"num_bits": 8, "type": "int", "symmetric": True, "group_size": None},
    **{"strategy": "tensor", "dynamic": False},
}
_PER_TOKEN = _ACTIVATION_DEFAULTS | {"strategy": "token", "dynamic": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigGroup:
    """Layers that are quantized alike; the tensors tell which layers they are."""

    format: PackedFormat
    targets: tuple[str, ...] = ("Linear",)  # names, "re:" with a pattern, or classes of modules

    def to_dict(self) -> dict[str, Any]:
        """Return the group as llm-compressor writes it."""
        is_int8 = self.format.packing == "int-quantized"
        weights = {
            "num_bits": self.format.bits,
            "type": "int",
            "symmetric": self.format.is_symmetric,
            "group_size": None if is_int8 else self.format.group_size,
            "strategy": "channel" if is_int8 else "group",
            "dynamic": False,
        }
        return {
            "targets": list(self.targets),
            "weights": weights,
            "input_activations": dict(_PER_TOKEN) if is_int8 else None,
            "output_activations": None,
            "format": self.format.packing,
        }


def parse_config_groups(settings: Mapping[str, Any], where: str) -> tuple[ConfigGroup, ...]:
    """Parse the groups of a quantization_config whose method is compressed-tensors.

    Raises:
        CheckpointError: a scheme is not run, or the config is damaged.
    """
    for key, unsupported in _unsupported_settings(settings).items():
        raise _refusal(where, f"{key} {unsupported}")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"{where}: config_groups of quantization_config is missing or empty; fetch config.json "
            "again"
        )
    return tuple(
        _parse_group(name, group, settings.get("format"), where) for name, group in groups.items()
    )


def _unsupported_settings(settings: Mapping[str, Any]) -> dict[str, object]:
    """Return settings of the whole folder that change what its tensors are."""
    found: dict[str, object] = {}
    status = settings.get("quantization_status", "compressed")
    if status != "compressed":
        found["quantization_status"] = repr(status)
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        found["sparsity_config"] = sparsity["format"]
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            found[key] = "is set"
    return found


def _parse_group(name: str, group: object, folder_format: object, where: str) -> ConfigGroup:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(
            f"{where}: {name} of config_groups has no weights that say how they are quantized; "
            "fetch config.json again"
        )
    settings = cast("Mapping[str, Any]", group)
    targets = settings.get("targets")
    packing = settings.get("format") or folder_format
    format_ = _supported_format(settings, packing)
    if format_ is None:
        raise _refusal(where, _describe_group(settings, packing))
    return ConfigGroup(
        format=format_, targets=tuple(map(str, targets)) if isinstance(targets, list) else ()
    )


def _supported_format(group: Mapping[str, Any], packing: object) -> PackedFormat | None:
    """Return the format of a group's weights, None if its scheme is not run."""
    weights, activations = group["weights"], group.get("input_activations")
    is_symmetric, size = weights.get("symmetric", True), weights.get("group_size")
    is_plain = (
        weights.get("type", "int") == "int"
        and isinstance(is_symmetric, bool)
        and not weights.get("dynamic")
        # The order in which calibration went through the inputs leaves no trace in the tensors.
        and weights.get("actorder") in (None, False, "weight", "static")
        and not group.get("output_activations")
    )
    if not is_plain:
        return None
    kind = (packing, weights.get("num_bits", 8), _strategy(weights))
    if kind == ("int-quantized", 8, "channel") and is_symmetric and _is_per_token(activations):
        return PackedFormat(packing="int-quantized", bits=8, group_size=-1, is_symmetric=True)
    if kind == ("pack-quantized", 4, "group") and _is_group_size(size) and not activations:
        return PackedFormat(
            packing="pack-quantized", bits=4, group_size=size, is_symmetric=is_symmetric
        )
    return None


def _is_group_size(size: object) -> bool:
    return type(size) is int and size in GROUP_SIZES


def _strategy(arguments: Mapping[str, Any]) -> object:
    """Return which numbers share a scale; it may be left out where group_size implies it."""
    size = arguments.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    return arguments.get("strategy") or implied


def _is_per_token(activations: object) -> bool:
    if not isinstance(activations, Mapping):
        return False
    given = _ACTIVATION_DEFAULTS | dict(activations)
    return all(given[key] == _PER_TOKEN[key] for key in _PER_TOKEN if key != "group_size")


def _describe_group(group: Mapping[str, Any], packing: object) -> str:
    """Return a scheme in words: float-quantized, weights of 8-bit float by tensor, ..."""
    parts = [str(packing)]
    for name in ("weights", "input_activations", "output_activations"):
        if isinstance(arguments := group.get(name), Mapping):
            parts.append(f"{name.replace('_', ' ')} of {_describe_arguments(arguments)}")
    return ", ".join(parts)


def _describe_arguments(arguments: Mapping[str, Any]) -> str:
    symmetric = "symmetric" if arguments.get("symmetric", True) else "asymmetric"
    size = arguments.get("group_size")
    words = [
        f"{arguments.get('num_bits', 8)}-bit {arguments.get('type', 'int')} by "
        f"{_strategy(arguments)}" + (f" of {size}" if size and size != -1 else ""),
        symmetric,
        *(["dynamic"] if arguments.get("dynamic") else []),
        *([f"actorder {arguments['actorder']}"] if arguments.get("actorder") else []),
    ]
    return " ".join(words)


def _refusal(where: str, found: str) -> CheckpointError:
    sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
    return CheckpointError(
        f"{where}: the weights are quantized (compressed-tensors: {found}); of compressed-tensors "
        f"this library runs W8A8 (int-quantized: int8 weights, symmetric, by channel; dynamic int8 "
        f"activations by token) and W4A16 (pack-quantized: 4-bit weights in groups of {sizes}), "
        "dense and without a kv_cache_scheme or transform_config; take another repository of this "
        "model, or quantize it with `qwen2vl quantize`"
    )
