"""What PEFT's adapter files say, understood and written; the files themselves are not read here.

Strict where PEFT warns: an option or a tensor that would change the answer and is not understood
here is refused by name, so that what runs is what was trained. What is written names modules as
transformers does since 4.52, and lists as targets the shortest endings that mean the adapted layers
and no others. (PEFT: LoraConfig, LoraLayer.) Next rooms: weights/adapter.py for the files, load.py
and train/, which use both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qwen2vl.errors import CheckpointError
from qwen2vl.lora.layers import LoraConfig, LoraFactors
from qwen2vl.model import Qwen2VL

__all__ = ["peft_settings", "peft_tensors", "read_lora"]

# Options that only say how the adapter was trained, found or shipped.
_INERT = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
# Options that `_scale` obeys, and the kind itself.
_OBEYED = frozenset("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern".split())
# What else is allowed, besides "off". The starts of training that are not listed here (pissa,
# olora, corda, loftq, ...) take a part out of the base weights, which a merge would have to undo.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_OFF = (None, False, {}, [])

# A name in a file is PEFT's prefix, then the module in one of the layouts of transformers.
_LAYOUTS = (("model.visual.", "visual."), ("model.language_model.", "model."))
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


def read_lora(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Qwen2VL, *, where: str
) -> dict[str, LoraFactors]:
    """Understand an adapter: official name of each changed linear layer -> its factors.

    Args:
        settings: the content of adapter_config.json.
        tensors: the content of adapter_model.safetensors, names as in the file.
        model: what it is to be merged into; the meta device will do.
        where: the adapter's folder, for errors.

    Raises:
        CheckpointError: an option or a tensor is not understood, does not fit, or is missing.
    """
    _check_options(settings, where)
    pairs = _pair(tensors, where)
    _check_targets(settings.get("target_modules"), list(pairs), where)
    factors: dict[str, LoraFactors] = {}
    for path, pair in pairs.items():
        name = _official(path)
        if name in factors:
            raise CheckpointError(f"{where}: {name} is there twice, in both key layouts")
        _check_layer(model, name, pair, where)
        scale = _scale(settings, path, len(pair["A"]), where)
        factors[name] = LoraFactors(a_RX=pair["A"], b_YR=pair["B"], scale=scale)
    return factors


def peft_settings(
    config: LoraConfig, adapted: Iterable[str], model: Qwen2VL, *, base: str
) -> dict[str, Any]:
    """Spell adapter_config.json for factors of the rank and scale that `config` says.

    Args:
        config: what was trained.
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
        "use_rslora": config.rank_stabilized,
        "target_modules": _endings(set(adapted), [name for name, _ in model.named_modules()]),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def peft_tensors(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Name the factors as adapter_model.safetensors does."""
    tensors: dict[str, Tensor] = {}
    for name, found in factors.items():
        key = f"base_model.model.{_nested(name)}"
        tensors[f"{key}.lora_A.weight"] = found.a_RX.detach()
        tensors[f"{key}.lora_B.weight"] = found.b_YR.detach()
    return tensors


def _check_options(settings: Mapping[str, Any], where: str) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {kind!r}; only LORA adapters can be merged here"
        )
    refused = [
        f"{option} {value!r}"
        for option, value in sorted(settings.items())
        if option not in _INERT | _OBEYED and not _is_harmless(option, value)
    ]
    if refused:
        raise CheckpointError(
            f"{where}: this adapter uses {', '.join(refused)}, which is not supported; merge it "
            "into its base model with PEFT and load the result"
        )


def _is_harmless(option: str, value: Any) -> bool:
    allowed = (*_OFF, *_HARMLESS.get(option, ()))
    # 0 == False: an option set to the number 0 is not off.
    return any(value == one and type(value) is type(one) for one in allowed)


def _pair(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors by module, named as in the file: path -> {"A": ..., "B": ...}."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{where}: {key} is no LoRA factor of a linear layer "
                "(base_model.model.MODULE.lora_A.weight or lora_B); only those can be merged"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise CheckpointError(f"{where}: the adapter holds no tensors")
    if halves := sorted(path for path, pair in pairs.items() if len(pair) < 2):
        (there,) = pairs[halves[0]]
        raise CheckpointError(
            f"{where}: {halves[0]} has lora_{there} alone ({len(halves)} such modules); fetch the "
            "adapter again"
        )
    return pairs


def _check_targets(targets: Any, paths: list[str], where: str) -> None:
    """Modules that were to be adapted must be, and no others: PEFT ignores tensors of others.

    Only a list says which they are. A regular expression is a program of a stranger and is not
    run, and "all-linear" says nothing that the tensors do not.
    """
    if isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: target_modules is {targets!r}, expected names of modules")
    if idle := [t for t in targets if not any(_is_named(path, t) for path in paths)]:
        raise CheckpointError(
            f"{where}: target_modules names {', '.join(idle)}, of which the file holds no tensors; "
            "fetch the adapter again"
        )
    if strange := [path for path in paths if not any(_is_named(path, t) for t in targets)]:
        raise CheckpointError(
            f"{where}: the file adapts {strange[0]}, which target_modules does not name"
        )


def _is_named(path: str, name: str) -> bool:
    """Match as PEFT does: the whole path, or the end of it from some dot on."""
    return path == name or path.endswith("." + name)


def _official(path: str) -> str:
    for nested, flat in _LAYOUTS:
        if path.startswith(nested):
            return flat + path.removeprefix(nested)
    return path


def _nested(name: str) -> str:
    for nested, flat in _LAYOUTS:
        if name.startswith(flat):
            return nested + name.removeprefix(flat)
    return name


def _endings(adapted: set[str], modules: Iterable[str]) -> list[str]:
    """Find the shortest ending of each adapted name that no other module shares.

    Names count from behind some dot on, as PEFT matches them, so layers that are adapted in every
    block are one ending together.
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
    wanted = {"A": (*rank, layer.in_features), "B": (layer.out_features, *rank)}
    for letter, want in wanted.items():
        factor = pair[letter]
        if tuple(factor.shape) != want:
            raise CheckpointError(
                f"{where}: lora_{letter} of {name} is {list(factor.shape)}, this model asks for "
                f"{list(want)}; the adapter belongs to another base model"
            )
        if not factor.is_floating_point() or not bool(factor.float().isfinite().all()):
            raise CheckpointError(
                f"{where}: lora_{letter} of {name} holds no finite numbers; fetch it again"
            )


def _scale(settings: Mapping[str, Any], path: str, rank: int, where: str) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns set single modules apart."""
    told = _number(settings, "r", "rank_pattern", path, where)
    alpha = _number(settings, "lora_alpha", "alpha_pattern", path, where)
    if rank != told or rank < 1:
        raise CheckpointError(
            f"{where}: {path} has factors of rank {rank}, adapter_config.json says {told}"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _number(settings: Mapping[str, Any], option: str, table: str, path: str, where: str) -> float:
    """Look up an option that a table may set apart for modules; its first match counts."""
    found, patterns = settings.get(option), settings.get(table) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {table} is {patterns!r}, expected names and numbers")
    for pattern, value in patterns.items():
        if not _PLAIN_NAME.fullmatch(pattern):
            raise CheckpointError(
                f"{where}: {table} holds the regular expression {pattern!r}; only names of "
                "modules are supported"
            )
        if _is_named(path, pattern):
            option, found = f"{table} of {pattern}", value
            break
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise CheckpointError(f"{where}: {option} is {found!r}, expected a number")
    return found
