"""PEFT's adapter format: adapter_config.json and tensor names, parsed and written.

Strict where PEFT warns: an option or a tensor that would change the output and is not supported is
refused by name, so that the adapter computes what was trained. Written files name modules as
transformers does since 4.52, and list as target_modules the shortest name suffixes that match the
adapted layers and no others. The files themselves are read and written by weights/adapter.py.
(PEFT: LoraConfig, LoraLayer.) Used by loading.py and train/.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl.config import MERGED_ADAPTERS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.lora.layers import LoraConfig, LoraFactors
from qwen2vl.model import Qwen2VL

__all__ = [
    "adapter_digest",
    "merged_adapters",
    "parse_peft_adapter",
    "to_peft_config",
    "to_peft_state_dict",
]

# Options that only record how the adapter was trained, found or shipped.
_INERT = frozenset(
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
# Options that `_scale` applies, and the type of the adapter.
_SUPPORTED = frozenset("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern".split())
# Values that are allowed besides "off". The initializations that are not listed (pissa, olora,
# corda, loftq, ...) subtract a part from the base weights, which a merge would have to undo.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_OFF = (None, False, {}, [])

# A name in a file is PEFT's prefix, then the module in one of the layouts of transformers.
_LAYOUTS = (("model.visual.", "visual."), ("model.language_model.", "model."))
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN_NAME = re.compile(r"\w+(\.\w+)*")


def parse_peft_adapter(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Qwen2VL, *, where: str
) -> dict[str, LoraFactors]:
    """Parse an adapter: official name of each adapted linear layer -> its factors.

    Args:
        settings: the content of adapter_config.json.
        tensors: the content of adapter_model.safetensors, names as in the file.
        model: the base model; may be on the meta device.
        where: the adapter's folder, for errors.

    Raises:
        CheckpointError: an option or a tensor is not supported, does not fit, or is missing, or the
            model contains this adapter already.
    """
    _check_options(settings, where)
    pairs = _group_by_module(tensors, where)
    _check_targets(settings.get("target_modules"), list(pairs), where)
    factors: dict[str, LoraFactors] = {}
    for path, pair in pairs.items():
        name = _to_official_name(path)
        if name in factors:
            raise CheckpointError(f"{where}: {name} is there twice, in both key layouts")
        _check_layer(model, name, pair, where)
        scale = _scale(settings, path, len(pair["A"]), where)
        factors[name] = LoraFactors(a_RX=pair["A"], b_YR=pair["B"], scale=scale)
    _check_not_merged(factors, settings, model, where)
    return factors


def adapter_digest(factors: Mapping[str, LoraFactors]) -> str:
    """Return a hash of an adapter's factors; a model records those that are merged into it."""
    hasher = sha256()
    for name in sorted(factors):
        for factor in (factors[name].a_RX, factors[name].b_YR):
            content = factor.detach().to("cpu", torch.float32).contiguous()
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
        key = f"base_model.model.{_to_nested_name(name)}"
        tensors[f"{key}.lora_A.weight"] = layer_factors.a_RX.detach()
        tensors[f"{key}.lora_B.weight"] = layer_factors.b_YR.detach()
    return tensors


def merged_adapters(config: Qwen2VLConfig) -> tuple[str, ...]:
    """Return the digests of the adapters that a model folder contains, by its config.json."""
    digests = config.extra.get(MERGED_ADAPTERS)
    return tuple(map(str, digests)) if isinstance(digests, list) else ()


def _check_not_merged(
    factors: Mapping[str, LoraFactors], settings: Mapping[str, Any], model: Qwen2VL, where: str
) -> None:
    merged = merged_adapters(model.config)
    if merged and adapter_digest(factors) in merged:
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
        match = _FACTOR.fullmatch(key)
        if match is None and (key.endswith(("embed_tokens.weight", "lm_head.weight"))):
            raise CheckpointError(
                f"{where}: {key} holds embeddings of {list(tensor.shape)}, as PEFT saves them "
                "after tokens were added, which is not supported; merge the adapter into its base "
                "model with PEFT and load the result"
            )
        if match is None:
            raise CheckpointError(
                f"{where}: {key} is no LoRA factor of a linear layer "
                "(base_model.model.MODULE.lora_A.weight or lora_B); only those can be merged"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise CheckpointError(f"{where}: the adapter holds no tensors")
    if halves := sorted(path for path, pair in pairs.items() if len(pair) < 2):
        (letter,) = pairs[halves[0]]
        raise CheckpointError(
            f"{where}: {halves[0]} has lora_{letter} alone ({len(halves)} such modules); fetch the "
            "adapter again"
        )
    return pairs


def _check_targets(targets: Any, paths: list[str], where: str) -> None:
    """Check that exactly the modules of target_modules have tensors: PEFT ignores other tensors.

    Only a list can be checked. A regular expression from an untrusted file is not evaluated, and
    "all-linear" adds nothing to the names of the tensors.
    """
    if isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: target_modules is {targets!r}, expected names of modules")
    if unused := [t for t in targets if not any(_matches(path, t) for path in paths)]:
        raise CheckpointError(
            f"{where}: target_modules names {', '.join(unused)}, of which the file holds no "
            "tensors; fetch the adapter again"
        )
    if unexpected := [path for path in paths if not any(_matches(path, t) for t in targets)]:
        raise CheckpointError(
            f"{where}: the file adapts {unexpected[0]}, which target_modules does not name"
        )


def _matches(path: str, name: str) -> bool:
    """Match as PEFT does: the whole path, or a suffix of it that begins after a dot."""
    return path == name or path.endswith("." + name)


def _to_official_name(path: str) -> str:
    for nested, flat in _LAYOUTS:
        if path.startswith(nested):
            return flat + path.removeprefix(nested)
    return path


def _to_nested_name(name: str) -> str:
    for nested, flat in _LAYOUTS:
        if name.startswith(flat):
            return nested + name.removeprefix(flat)
    return name


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
