"""Products that a compiler is to leave as they are, as operators of our own.

Inductor fuses what lies around a matrix product; of the product itself it makes something slower,
or nothing: it knows no packed weights but its own. So where a tracer looks on, the product is one
operator without an inside, and everywhere else the plain function. The operators are as light as
torch has them: decode calls over a hundred in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

__all__ = ["opaque"]

C = TypeVar("C", bound=Callable[..., Tensor])


def opaque(shape: Callable[..., Tensor]) -> Callable[[C], C]:
    """Hide what a function computes from tracers; `shape` makes an empty result of its arguments.

    The first argument is a Tensor, and nothing is changed in place.
    """

    def hide(compute: C) -> C:
        name = f"qwen2vl::{compute.__name__.strip('_')}"
        torch.library.define(name, torch.library.infer_schema(compute, mutates_args=()))
        torch.library.impl(name, "default")(compute)
        torch.library.register_fake(name)(shape)
        operator = getattr(torch.ops.qwen2vl, name.partition("::")[2]).default

        @wraps(compute)
        def choose(x: Tensor, *rest: object) -> Tensor:
            is_traced = torch.compiler.is_compiling() or isinstance(x, FakeTensor)
            return (operator if is_traced else compute)(x, *rest)

        return cast("C", choose)

    return hide
