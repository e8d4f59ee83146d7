"""Who moves, and how: ordered freeze-and-rate rules, Muon for matrices, AdamW for the rest.

Rules are (pattern, multiple of the rate); the first full match wins, every parameter must match
and every rule must match something, so a typo cannot silently freeze or free a tower. Muon takes
the two-dimensional weights inside blocks; embeddings, head, patch embedding, norms and biases stay
with AdamW. (arXiv 2502.16982 for the scale that lets both share one rate.) Next room: loop.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from qwen2vl.errors import ConfigError
from qwen2vl.train.config import FROZEN, OptimConfig, Rules

__all__ = ["Optimisers", "apply_rules"]


def apply_rules(model: nn.Module, rules: Rules) -> dict[str, float]:
    """Freeze what the rules freeze; return name -> multiple of the rate for what moves.

    Raises:
        ConfigError: a parameter no rule matches, or a rule that matches no parameter.
    """
    used: set[str] = set()
    scales: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        rule = next((r for r in rules if re.fullmatch(r[0], name)), None)
        if rule is None:
            raise ConfigError(f"no rule matches parameter {name}; end the rules with ('.*', ...)")
        used.add(rule[0])
        parameter.requires_grad_(rule[1] != FROZEN)
        parameter.grad = None
        if rule[1] != FROZEN:
            scales[name] = rule[1]
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if idle:
        raise ConfigError(f"rules that match no parameter: {', '.join(idle)}")
    return scales


class Optimisers:
    """Muon and AdamW stepped as one, with a state that can be saved by parameter name."""

    def __init__(self, model: nn.Module, scales: dict[str, float], config: OptimConfig) -> None:
        self.config = config
        self.named = {n: p for n, p in model.named_parameters() if n in scales}
        matrices = [n for n, p in self.named.items() if _is_matrix(n, p)]
        others = [n for n in self.named if n not in set(matrices)]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    self._groups(matrices, scales),
                    lr=config.lr,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self.parts.append(
                torch.optim.AdamW(
                    self._groups(others, scales),
                    lr=config.lr,
                    betas=(config.beta1, config.beta2),
                    eps=config.eps,
                    weight_decay=0.0,
                    fused=True,
                )
            )

    def _groups(self, names: Iterable[str], scales: dict[str, float]) -> list[dict[str, object]]:
        by_scale: dict[float, list[Tensor]] = {}
        for name in names:
            by_scale.setdefault(scales[name], []).append(self.named[name])
        return [{"params": group, "scale": scale} for scale, group in by_scale.items()]

    def clip(self) -> Tensor:
        """Bound the norm of all gradients together; return what it was."""
        return nn.utils.clip_grad_norm_(self.named.values(), self.config.clip)

    def step(self, rate: float) -> None:
        """Step at `rate` times the peak, and forget the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.config.lr * group["scale"] * rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Name every moment `parameter|key`; the tensors themselves, not copies."""
        return {f"{name}|{key}": value for name, key, value in self._entries()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state` gave, into a fresh Optimisers over the same parameters."""
        names = {p: n for n, p in self.named.items()}
        keys_of: dict[str, list[str]] = {}
        for full in tensors:
            name, _, key = full.rpartition("|")
            keys_of.setdefault(name, []).append(key)
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = names[parameter]
                    part.state[parameter] = {
                        key: tensors[f"{name}|{key}"].to(parameter.device, copy=True)
                        for key in keys_of.get(name, [])
                    }

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        names: dict[Tensor, str] = {p: n for n, p in self.named.items()}
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    yield names[parameter], key, value


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Weights of linear layers inside blocks and merger; not tables of words, not pixels."""
    return parameter.ndim == 2 and "embed" not in name and not name.startswith("lm_head")
