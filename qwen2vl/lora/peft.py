"""PEFT's adapter format: adapter_config.json and tensor names, parsed and written.

Strict where PEFT warns: an option or a tensor that would change the output and is not supported is
refused by name, so that the adapter computes what was trained. Weights that the folder holds in
full are parsed by full_weights.py. Written files name modules as transformers does since 4.52, and
list as target_modules the shortest name suffixes that match the adapted layers and no others. The
files themselves are read and written by weights/adapter.py. (PEFT: LoraConfig, LoraLayer.)
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl.config import MERGED_ADAPTERS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.lora.full_weights import (
    describe_parameters,
    parse_full_weights,
    to_nested_name,
    to_official_name,
)
from qwen2vl.lora.layers import LoraConfig, LoraFactors
from qwen2vl.model import Qwen2VL

__all__ = [
    "PeftAdapter",
    "adapter_digest",
    "merged_adapters",
    "parse_mergeable_adapter",
    "parse_peft_adapter",
    "to_peft_config",
    "to_peft_state_dict",
]

logger = logging.getLogger(__name__)

# Options that only record how the adapter was trained, found or shipped.
_INERT = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config "
    "ensure_weight_tying modules_to_save".split()  # the last two are for full_weights.py
)
# Options that `_scale` applies, and the type of the adapter.
_SUPPORTED = frozenset("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern".split())
# Values that are allowed besides "off". The initializations that are not listed (pissa, olora,
# corda, loftq, ...) subtract a part from the base weights, which a merge would have to undo.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", "lora_only", "all"),  # trained biases are weights in full
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_OFF = (None, False, {}, [])
_EXCLUSIONS = ("exclude_modules", "layers_to_transform")  # take modules out of target_modules

# A name in a file is PEFT's prefix, then the module in one of the layouts of transformers. PEFT's
# names in memory end with that of the adapter, usually "default", which other savers leave there.
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftAdapter:
    """A parsed adapter: LoRA factors by layer, and the parameters that it replaces in full."""

    factors: Mapping[str, LoraFactors]
    full_weights: Mapping[str, str]  # official name of a parameter -> its key in the files


def parse_peft_adapter(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Qwen2VL, *, where: str
) -> dict[str, LoraFactors]:
    """Parse an adapter that is applied without merging: linear layer -> its factors.

    Args:
        settings: the content of adapter_config.json.
        tensors: the content of the adapter's files, names as in the files.
        model: the base model; may be on the meta device.
        where: the adapter's folder, for errors.

    Raises:
        CheckpointError: an option or a tensor is not supported, does not fit, or is missing, the
            folder holds weights in full, or the model contains this adapter already.
    """
    adapter = parse_mergeable_adapter(settings, tensors, model, where=where)
    if adapter.full_weights:
        raise CheckpointError(
            f"{where}: holds weights in full ({describe_parameters(adapter.full_weights)}), which "
            "replace those of the model, so it can only be merged: give it as --adapter DIR "
            "without a name or LLM(adapter=DIR), not per request and not as adapter.init"
        )
    return dict(adapter.factors)


def parse_mergeable_adapter(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Qwen2VL, *, where: str
) -> PeftAdapter:
    """Parse an adapter to merge, with the weights that its folder holds in full.

    Arguments and errors are those of `parse_peft_adapter`.
    """
    _check_options(settings, where)
    others = {key: tensors[key] for key in tensors if _FACTOR.fullmatch(key) is None}
    full_weights = parse_full_weights(others, settings, model, where=where)
    pairs = _group_by_module(tensors, where)
    _check_targets(settings, list(pairs), model, where)
    factors: dict[str, LoraFactors] = {}
    for path, pair in pairs.items():
        name = to_official_name(path)
        if name in factors:
            raise CheckpointError(f"{where}: {name} is there twice, in both key layouts")
        _check_layer(model, name, pair, where)
        scale = _scale(settings, path, len(pair["A"]), where)
        factors[name] = LoraFactors(a_RX=pair["A"], b_YR=pair["B"], scale=scale)
    in_full = {name: others[key] for name, key in full_weights.items()}
    _check_not_merged(factors, in_full, settings, model, where)
    _log_missing_factors(settings, {*factors, *full_weights}, model, where)
    return PeftAdapter(factors=factors, full_weights=full_weights)


def adapter_digest(
    factors: Mapping[str, LoraFactors], full_weights: Mapping[str, Tensor] | None = None
) -> str:
    """Return a hash of an adapter's factors and full weights; a model records those merged into it.

    Args:
        factors: by the official name of the layer.
        full_weights: by the official name of the parameter that they replace.
    """
    hasher = sha256()
    contents = [(n, f) for n in sorted(factors) for f in (factors[n].a_RX, factors[n].b_YR)]
    contents += sorted((full_weights or {}).items(), key=lambda item: item[0])
    for name, tensor in contents:
        content = tensor.detach().to("cpu", torch.float32).contiguous()
        hasher.update(f"{name} {tuple(content.shape)}\n".encode())
        hasher.update(content.numpy().data)
    return hasher.hexdigest()


def to_peft_config(
    config: LoraConfig, adapted: Iterable[str], model: Qwen2VL, *, base: str
) -> dict[str, Any]:
    """Return the content of adapter_config.json for factors that were trained with `config`.

    Args:
        config: the LoRA config of the training run.
        adapted: official names of the layers that have factors.
        model: the model they belong to, adapted or not.
        base: where its weights came from, for base_model_name_or_path.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _shortest_suffixes(
            set(adapted), [name for name, _ in model.named_modules()]
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def to_peft_state_dict(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Return the factors under the names of adapter_model.safetensors."""
    tensors: dict[str, Tensor] = {}
    for name, layer_factors in factors.items():
        key = f"base_model.model.{to_nested_name(name)}"
        tensors[f"{key}.lora_A.weight"] = layer_factors.a_RX.detach()
        tensors[f"{key}.lora_B.weight"] = layer_factors.b_YR.detach()
    return tensors


def merged_adapters(config: Qwen2VLConfig) -> tuple[str, ...]:
    """Return the digests of the adapters that a model folder contains, by its config.json."""
    digests = config.extra.get(MERGED_ADAPTERS)
    return tuple(map(str, digests)) if isinstance(digests, list) else ()


def _check_not_merged(
    factors: Mapping[str, LoraFactors],
    full_weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    model: Qwen2VL,
    where: str,
) -> None:
    """Refuse what is merged into the model; the factors alone would be applied twice, too."""
    merged = merged_adapters(model.config)
    if merged and {adapter_digest(factors), adapter_digest(factors, full_weights)} & set(merged):
        base = settings.get("base_model_name_or_path") or "its name is not recorded"
        raise CheckpointError(
            f"{where}: is merged into this model already, and would be applied twice; leave the "
            f"adapter out, or give the model it was trained on ({base})"
        )


def _check_options(settings: Mapping[str, Any], where: str) -> None:
    peft_type = settings.get("peft_type")
    if peft_type != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {peft_type!r}; only LORA adapters can be merged here"
        )
    refused = [
        f"{option} {value!r}"
        for option, value in sorted(settings.items())
        if option not in _INERT | _SUPPORTED and not _is_harmless(option, value)
    ]
    if refused:
        raise CheckpointError(
            f"{where}: this adapter uses {', '.join(refused)}, which is not supported; merge it "
            "into its base model with PEFT and load the result"
        )


def _is_harmless(option: str, value: Any) -> bool:
    allowed = (*_OFF, *_HARMLESS.get(option, ()))
    # The types are compared because 0 == False: an option set to the number 0 is not off.
    return any(value == other and type(value) is type(other) for other in allowed)


def _group_by_module(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """Group the tensors by module, named as in the file: path -> {"A": ..., "B": ...}."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            pair = pairs.setdefault(match[1], {})
            if match[2] in pair:
                raise CheckpointError(f"{where}: {match[1]} is there twice, once as 'default'")
            pair[match[2]] = tensor
    if not pairs:
        what = "LoRA factors" if tensors else "tensors"
        raise CheckpointError(f"{where}: the adapter holds no {what}; fetch it again")
    if halves := sorted(path for path, pair in pairs.items() if len(pair) < 2):
        (letter,) = pairs[halves[0]]
        raise CheckpointError(
            f"{where}: {halves[0]} has lora_{letter} alone ({len(halves)} such modules); fetch the "
            "adapter again"
        )
    return pairs


def _check_targets(
    settings: Mapping[str, Any], paths: list[str], model: Qwen2VL, where: str
) -> None:
    """Check that exactly the modules of target_modules have tensors: PEFT ignores other tensors.

    A name that no module of the model has is ignored, as by PEFT, and so is one without tensors
    where an option excludes modules. Only a list can be checked. A regular expression from an
    untrusted file is not evaluated, and "all-linear" adds nothing to the names of the tensors.
    """
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: target_modules is {targets!r}, expected names of modules")
    if unused := [t for t in targets if not any(_matches(path, t) for path in paths)]:
        _check_unused_targets(unused, settings, model, where)
    if unexpected := [path for path in paths if not any(_matches(path, t) for t in targets)]:
        raise CheckpointError(
            f"{where}: the file adapts {unexpected[0]}, which target_modules does not name"
        )


def _check_unused_targets(
    unused: list[str], settings: Mapping[str, Any], model: Qwen2VL, where: str
) -> None:
    modules = [name for name, _ in model.named_modules()]
    names = [*modules, *map(to_nested_name, modules)]
    missing = [t for t in unused if any(_matches(name, t) for name in names)]
    if missing and not _has_exclusions(settings):
        raise CheckpointError(
            f"{where}: target_modules names {', '.join(missing)}, of which the file holds no "
            "tensors; fetch the adapter again"
        )
    level = logging.DEBUG if _has_exclusions(settings) else logging.INFO
    logger.log(level, "%s: no module is adapted as %s of target_modules", where, ", ".join(unused))


def _has_exclusions(settings: Mapping[str, Any]) -> bool:
    return not all(_is_harmless(option, settings.get(option)) for option in _EXCLUSIONS)


def _log_missing_factors(
    settings: Mapping[str, Any], found: set[str], model: Qwen2VL, where: str
) -> None:
    """Log which layers of target_modules are neither adapted nor replaced, as PEFT does."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or _has_exclusions(settings):
        return
    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(_matches(name, t) or _matches(to_nested_name(name), t) for t in targets)
    ]
    if missing := [name for name in wanted if found.isdisjoint((name, f"{name}.weight"))]:
        text = "%s: %d of %d modules of target_modules have no factors in the file, such as %s"
        logger.warning(text, where, len(missing), len(wanted), missing[0])


def _matches(path: str, name: str) -> bool:
    """Match as PEFT does: the whole path, or a suffix of it that begins after a dot."""
    return path == name or path.endswith("." + name)


def _shortest_suffixes(adapted: set[str], modules: Iterable[str]) -> list[str]:
    """Return the shortest suffix of each adapted name that matches no other module.

    Suffixes begin after a dot, as PEFT matches them, so a layer that is adapted in every block
    needs one suffix.
    """
    uses: Counter[str] = Counter()
    for name in set(modules) - adapted:
        uses.update(_suffixes(name))
    return sorted({next(end for end in _suffixes(name) if not uses[end]) for name in adapted})


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _check_layer(model: Qwen2VL, name: str, pair: Mapping[str, Tensor], where: str) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        what = "not in this model" if layer is None else f"a {type(layer).__name__}"
        raise CheckpointError(
            f"{where}: {name} is {what}; only linear layers of the base model can be adapted"
        )
    rank = pair["A"].shape[:1]
    expected = {"A": (*rank, layer.in_features), "B": (layer.out_features, *rank)}
    for letter, shape in expected.items():
        factor = pair[letter]
        if tuple(factor.shape) != shape:
            raise CheckpointError(
                f"{where}: lora_{letter} of {name} is {list(factor.shape)}, this model asks for "
                f"{list(shape)}; the adapter belongs to another base model"
            )
        if not factor.is_floating_point() or not bool(factor.float().isfinite().all()):
            raise CheckpointError(
                f"{where}: lora_{letter} of {name} holds no finite numbers; fetch it again"
            )


def _scale(settings: Mapping[str, Any], path: str, rank: int, where: str) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns override single modules."""
    configured_rank = _option_for_module(settings, "r", "rank_pattern", path, where)
    alpha = _option_for_module(settings, "lora_alpha", "alpha_pattern", path, where)
    if rank != configured_rank or rank < 1:
        raise CheckpointError(
            f"{where}: {path} has factors of rank {rank}, adapter_config.json says "
            f"{configured_rank}"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _option_for_module(
    settings: Mapping[str, Any], option: str, table: str, path: str, where: str
) -> float:
    """Return an option's value for a module; the first match in the pattern table overrides it."""
    number, patterns = settings.get(option), settings.get(table) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {table} is {patterns!r}, expected names and numbers")
    for pattern, value in patterns.items():
        if not _PLAIN_NAME.fullmatch(pattern):
            raise CheckpointError(
                f"{where}: {table} holds the regular expression {pattern!r}; only names of "
                "modules are supported"
            )
        if _matches(path, pattern):
            option, number = f"{table} of {pattern}", value
            break
    if (
        isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ):
        raise CheckpointError(f"{where}: {option} is {number!r}, expected a number")
    return number
