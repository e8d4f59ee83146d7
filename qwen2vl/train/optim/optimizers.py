"""Optimizers of a training stage: parameter groups by freeze and LR rules, Muon, AdamW, SGD.

Rules are (regular expression, LR factor): the first full match wins, every parameter must match a
rule and every rule a parameter, so that a typo cannot silently freeze or train a tower. Muon
updates the two-dimensional weights inside blocks and merger; embeddings, head, patch embedding,
norms and biases are updated by AdamW. Of a sharded model (FSDP2) each rank steps its own shards:
elementwise updates need nothing else, and Muon exchanges shards for full matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2vl.errors import ConfigError
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.train.config import FROZEN, OptimConfig, Rules, Stage
from qwen2vl.train.optim.muon import Muon

__all__ = [
    "Optimizers",
    "always_frozen",
    "apply_lr_rules",
    "check_trainable",
    "match_lr_rules",
    "num_trainable",
    "optimizer_state_bytes",
]


def match_lr_rules(names: Iterable[str], rules: Rules) -> dict[str, float]:
    """Return the LR factor of every parameter, or FROZEN.

    Raises:
        ConfigError: a parameter matches no rule, or a rule matches no parameter.
    """
    used: set[str] = set()
    scales: dict[str, float] = {}
    for name in names:
        rule = next((candidate for candidate in rules if re.fullmatch(candidate[0], name)), None)
        if rule is None:
            raise ConfigError(f"no rule matches parameter {name}; end the rules with ('.*', ...)")
        used.add(rule[0])
        scales[name] = rule[1]
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if unused:
        raise ConfigError(f"rules that match no parameter: {', '.join(unused)}")
    return scales


def apply_lr_rules(model: nn.Module, rules: Rules) -> dict[str, float]:
    """Freeze parameters by the rules; return name -> LR factor of the trainable ones.

    Raises:
        ConfigError: as `match_lr_rules`.
    """
    scales = match_lr_rules((name for name, _ in model.named_parameters()), rules)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scales[name] != FROZEN)
        parameter.grad = None
    return {name: scale for name, scale in scales.items() if scale != FROZEN}


def check_trainable(model: nn.Module, stage: Stage) -> None:
    """Check that a stage's rules match the model and leave something trainable.

    Raises:
        ConfigError: as `match_lr_rules`, or every parameter is frozen.
    """
    scales = match_lr_rules((name for name, _ in model.named_parameters()), stage.rules)
    if all(scale == FROZEN for scale in scales.values()):
        raise ConfigError(f"stage {stage.name}: its rules freeze every parameter")


def num_trainable(model: nn.Module, stage: Stage) -> int:
    """Return the number of parameters that a stage trains; raises as `match_lr_rules`."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    scales = match_lr_rules(sizes, stage.rules)
    return sum(size for name, size in sizes.items() if scales[name] != FROZEN)


def always_frozen(model: nn.Module, stages: Iterable[Stage]) -> set[str]:
    """Return the names of the parameters that every stage freezes.

    Raises:
        ConfigError: as `match_lr_rules`.
    """
    names = [name for name, _ in model.named_parameters()]
    all_scales = [match_lr_rules(names, stage.rules) for stage in stages]
    return {
        name
        for name in names
        if all(scales_of_stage[name] == FROZEN for scales_of_stage in all_scales)
    }


def optimizer_state_bytes(config: OptimConfig, name: str, parameter: Tensor, numel: int) -> int:
    """Return the bytes of optimizer state for `numel` elements of a parameter."""
    if config.name == "sgd" or (config.name == "muon" and _is_matrix(name, parameter)):
        return 4 * numel
    return 8 * numel + 4  # two moments, and the step count


class Optimizers:
    """All optimizers of a stage, stepped together; their state is keyed by parameter name."""

    def __init__(
        self,
        model: nn.Module,
        scales: Mapping[str, float],
        config: OptimConfig,
        distributed: DistributedContext | None = None,
    ) -> None:
        self.config = config
        self.distributed = distributed
        self.parameters = {
            name: parameter for name, parameter in model.named_parameters() if name in scales
        }
        if distributed is not None and distributed.mesh is not None:
            is_sharded = all(
                isinstance(parameter, DTensor) for parameter in self.parameters.values()
            )
            assert is_sharded, "a parameter is unsharded; its updates would be discarded"
        # The local shard of a sharded parameter, on the same memory, as an ordinary leaf.
        self.local_shards = {
            name: _local_shard(parameter) for name, parameter in self.parameters.items()
        }
        matrices = [
            name for name, parameter in self.parameters.items() if _is_matrix(name, parameter)
        ]
        others = [name for name in self.parameters if name not in set(matrices)]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(self._matrix_optimizer(self._param_groups(matrices, scales)))
        if others:
            self.optimizers.append(
                self._elementwise_optimizer(self._param_groups(others, scales), 0.0)
            )

    def _matrix_optimizer(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        config = self.config
        if config.name != "muon":
            return self._elementwise_optimizer(groups, config.weight_decay)
        num_rows: dict[Tensor, int] = {
            shard: self.parameters[name].shape[0] for name, shard in self.local_shards.items()
        }
        return Muon(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            group=None if self.distributed is None else self.distributed.shard_group,
            num_rows=num_rows,
        )

    def _elementwise_optimizer(
        self, groups: list[dict[str, object]], weight_decay: float
    ) -> torch.optim.Optimizer:
        config = self.config
        if config.name == "sgd":
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

    def _param_groups(
        self, names: Iterable[str], scales: Mapping[str, float]
    ) -> list[dict[str, object]]:
        by_scale: dict[float, list[Tensor]] = {}
        for name in names:
            by_scale.setdefault(scales[name], []).append(self.local_shards[name])
        return [{"params": group, "scale": scale} for scale, group in by_scale.items()]

    def clip_grad_norm(self) -> Tensor:
        """Clip the norm of all gradients together, over all ranks; return the norm before."""
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            local_grad = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            self.local_shards[name].grad = local_grad
        # A rank may have no rows of a small parameter.
        with_grad = [
            shard
            for shard in self.local_shards.values()
            if shard.grad is not None and shard.numel()
        ]
        norm = nn.utils.get_total_norm(
            [shard.grad for shard in with_grad if shard.grad is not None]
        )
        if self.distributed is not None and self.distributed.mesh is not None:
            squares = norm.to(self.distributed.device).square()
            norm = self.distributed.all_reduce_shards(squares).sqrt()
        nn.utils.clip_grads_with_norm_(with_grad, self.config.max_grad_norm, norm)
        return norm

    def step(self, lr_factor: float, skip: Tensor | None = None) -> None:
        """Step at `lr_factor` times the peak LR and clear the gradients, after `clip_grad_norm`.

        `skip` is 0 or 1 on the parameters' device: at 1 no weight and no moment changes, whatever
        the gradients are, without a host sync.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * group["scale"] * lr_factor
            # As GradScaler does: fused kernels read it on the device.
            optimizer.found_inf = skip  # type: ignore[attr-defined] - torch's convention
            optimizer.step()
        for name, parameter in self.parameters.items():
            parameter.grad = self.local_shards[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return all moments as `parameter|key`, not copied, sharded as the parameters are."""
        return {
            f"{name}|{key}": _as_dtensor(value, self.parameters[name])
            for name, key, value in self._state_entries()
        }

    def allocate_state(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Allocate moments, to be filled in place, for entries of a `state_dict` of these shapes.

        Entries of other parameters are left out: this rank, or this stage, does not step them.
        """
        allocated: dict[str, Tensor] = {}
        optimizer_of_shard = self._optimizer_of_shard()
        for key_name, shape in shapes.items():
            name, separator, key = key_name.rpartition("|")
            if not separator or name not in self.parameters:
                continue
            parameter, shard = self.parameters[name], self.local_shards[name]
            is_moment = shape == parameter.shape
            value = torch.zeros_like(shard) if is_moment else shard.new_zeros(shape)
            optimizer_of_shard[shard].state[shard][key] = value
            allocated[key_name] = _as_dtensor(value, parameter)
        return allocated

    def _optimizer_of_shard(self) -> dict[Tensor, torch.optim.Optimizer]:
        return {
            shard: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for shard in group["params"]
        }

    def _state_entries(self) -> Iterator[tuple[str, str, Tensor]]:
        names: dict[Tensor, str] = {shard: name for name, shard in self.local_shards.items()}
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    yield names[parameter], key, value


def _local_shard(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(cast(DTensor, parameter.detach()).to_local())


def _as_dtensor(value: Tensor, parameter: Tensor) -> Tensor:
    """Wrap a local moment as a DTensor like its parameter; step counts are replicated."""
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
    """Linear layers of blocks and merger: no token embedding, patch embedding or head."""
    return parameter.ndim == 2 and "embed" not in name and not name.startswith("lm_head")
