"""Who moves, and how: ordered freeze-and-rate rules, Muon for matrices, AdamW for the rest.

Rules are (pattern, multiple of the rate); the first full match wins, every parameter must match
and every rule must match something, so a typo cannot silently freeze or free a tower. Muon takes
the two-dimensional weights inside blocks; embeddings, head, patch embedding, norms and biases stay
with AdamW. Of a sharded model each rank steps its own parts: what is elementwise never learns that
there are others, and Muon swaps parts for whole matrices. Next room: muon.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.train.config import FROZEN, OptimConfig, Rules, Stage
from qwen2vl.train.optim.muon import Muon

__all__ = [
    "Optimizers",
    "apply_rules",
    "check_moves",
    "match_rules",
    "moment_bytes",
    "never_moving",
]


def match_rules(names: Iterable[str], rules: Rules) -> dict[str, float]:
    """Find the multiple of the rate of every parameter, or FROZEN.

    Raises:
        ConfigError: a parameter no rule matches, or a rule that matches no parameter.
    """
    used: set[str] = set()
    scales: dict[str, float] = {}
    for name in names:
        rule = next((r for r in rules if re.fullmatch(r[0], name)), None)
        if rule is None:
            raise ConfigError(f"no rule matches parameter {name}; end the rules with ('.*', ...)")
        used.add(rule[0])
        scales[name] = rule[1]
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if idle:
        raise ConfigError(f"rules that match no parameter: {', '.join(idle)}")
    return scales


def apply_rules(model: nn.Module, rules: Rules) -> dict[str, float]:
    """Freeze what the rules freeze; return name -> multiple of the rate for what moves.

    Raises:
        ConfigError: as `match_rules`.
    """
    scales = match_rules((name for name, _ in model.named_parameters()), rules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scales[name] != FROZEN)
        parameter.grad = None
    return {name: scale for name, scale in scales.items() if scale != FROZEN}


def check_moves(model: nn.Module, stage: Stage) -> None:
    """Refuse a stage whose rules do not fit the model, or leave nothing to move.

    Raises:
        ConfigError: as `match_rules`, or every parameter is frozen.
    """
    scales = match_rules((name for name, _ in model.named_parameters()), stage.rules)
    if all(scale == FROZEN for scale in scales.values()):
        raise ConfigError(f"stage {stage.name}: its rules freeze every parameter")


def never_moving(model: nn.Module, stages: Iterable[Stage]) -> set[str]:
    """List the parameters that every stage freezes.

    Raises:
        ConfigError: as `match_rules`.
    """
    names = [name for name, _ in model.named_parameters()]
    scales = [match_rules(names, stage.rules) for stage in stages]
    return {name for name in names if all(own[name] == FROZEN for own in scales)}


def moment_bytes(config: OptimConfig, name: str, parameter: Tensor, count: int) -> int:
    """Tell how much is remembered for `count` numbers of a parameter from step to step."""
    if config.method == "sgd" or (config.method == "muon" and _is_matrix(name, parameter)):
        return 4 * count
    return 8 * count + 4  # two moments, and the number of steps


class Optimizers:
    """All of a stage's optimizers stepped as one, with a state that is kept by parameter name."""

    def __init__(
        self,
        model: nn.Module,
        scales: Mapping[str, float],
        config: OptimConfig,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.named = {n: p for n, p in model.named_parameters() if n in scales}
        if ranks is not None and ranks.mesh is not None:
            is_part = all(isinstance(p, DTensor) for p in self.named.values())
            assert is_part, "a parameter is still gathered; what is stepped would be thrown away"
        # A sharded parameter's own part, on the same memory: an ordinary leaf to step.
        self.parts = {n: _own_part(p) for n, p in self.named.items()}
        matrices = [n for n, p in self.named.items() if _is_matrix(n, p)]
        others = [n for n in self.named if n not in set(matrices)]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(self._of_matrices(self._groups(matrices, scales)))
        if others:
            self.optimizers.append(self._elementwise(self._groups(others, scales), 0.0))

    def _of_matrices(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        config = self.config
        if config.method != "muon":
            return self._elementwise(groups, config.weight_decay)
        rows: dict[Tensor, int] = {part: self.named[n].shape[0] for n, part in self.parts.items()}
        return Muon(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            group=None if self.ranks is None else self.ranks.shard_group,
            rows=rows,
        )

    def _elementwise(
        self, groups: list[dict[str, object]], weight_decay: float
    ) -> torch.optim.Optimizer:
        config = self.config
        if config.method == "sgd":
            return torch.optim.SGD(
                groups,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=weight_decay,
                fused=True,
            )
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=weight_decay,
            fused=True,
        )

    def _groups(self, names: Iterable[str], scales: Mapping[str, float]) -> list[dict[str, object]]:
        by_scale: dict[float, list[Tensor]] = {}
        for name in names:
            by_scale.setdefault(scales[name], []).append(self.parts[name])
        return [{"params": group, "scale": scale} for scale, group in by_scale.items()]

    def clip(self) -> Tensor:
        """Bound the norm of all gradients together, on all ranks; return what it was."""
        for name, parameter in self.named.items():
            gradient = parameter.grad
            own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            self.parts[name].grad = own
        # A rank may have no row of a small parameter.
        moving = [p for p in self.parts.values() if p.grad is not None and p.numel()]
        norm = nn.utils.get_total_norm([p.grad for p in moving if p.grad is not None])
        if self.ranks is not None and self.ranks.mesh is not None:
            squares = norm.to(self.ranks.device).square()
            norm = self.ranks.sum_of_shards(squares).sqrt()
        nn.utils.clip_grads_with_norm_(moving, self.config.clip, norm)
        return norm

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Step at `rate` times the peak, and forget the gradients; call `clip` before.

        `skip` is 0 or 1 where the parameters are: at 1 no weight and no moment changes, whatever
        the gradients hold, and the host does not wait to know.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * group["scale"] * rate
            # What GradScaler hands over for the same purpose: fused kernels read it themselves.
            optimizer.found_inf = skip  # type: ignore[attr-defined] - an attribute by agreement
            optimizer.step()
        for name, parameter in self.named.items():
            parameter.grad = self.parts[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Name every moment `parameter|key`; the tensors themselves, sharded as parameters are."""
        return {
            f"{name}|{key}": _like(value, self.named[name]) for name, key, value in self._entries()
        }

    def room_for(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Make fresh moments, to be filled in place, of what `state` gave elsewhere.

        Names of other parameters are left out: this rank, or this stage, does not step them.
        """
        room: dict[str, Tensor] = {}
        owners = self._owners()
        for full, shape in shapes.items():
            name, bar, key = full.rpartition("|")
            if not bar or name not in self.named:
                continue
            parameter, part = self.named[name], self.parts[name]
            is_moment = shape == parameter.shape
            value = torch.zeros_like(part) if is_moment else part.new_zeros(shape)
            owners[part].state[part][key] = value
            room[full] = _like(value, parameter)
        return room

    def _owners(self) -> dict[Tensor, torch.optim.Optimizer]:
        return {
            part: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for part in group["params"]
        }

    def _entries(self) -> Iterator[tuple[str, str, Tensor]]:
        names: dict[Tensor, str] = {p: n for n, p in self.parts.items()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    yield names[parameter], key, value


def _own_part(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(cast(DTensor, parameter.detach()).to_local())


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Say of a moment of this rank's part which part it is; counters are the same everywhere."""
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Weights of linear layers inside blocks and merger; not tables of words, not pixels."""
    return parameter.ndim == 2 and "embed" not in name and not name.startswith("lm_head")
