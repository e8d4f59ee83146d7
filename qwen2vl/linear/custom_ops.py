"""Custom operators (torch.library): matrix products that torch.compile must not decompose.

Inductor fuses the operations around a matrix product; the product itself it compiles into something
slower, or not at all: it supports no prepacked weights but its own. So under tracing the product is
one opaque operator of the `qwen2vl` namespace, and everywhere else the plain function is called.
The low-level API (`define`, `impl`) has the least overhead in torch: a decode step calls over a
hundred of these operators.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["custom_op"]

C = TypeVar("C", bound=Callable[..., Tensor])


def custom_op(fake: Callable[..., Tensor]) -> Callable[[C], C]:
    """Register a function as an operator that is opaque to tracers; eager calls bypass it.

    The first argument must be a Tensor, and no argument may be changed in place.

    Args:
        fake: returns an empty tensor of the result's shape and dtype from the same arguments
            (`torch.library.register_fake`).
    """

    def register(compute: C) -> C:
        name = f"qwen2vl::{compute.__name__.strip('_')}"
        torch.library.define(name, torch.library.infer_schema(compute, mutates_args=()))
        torch.library.impl(name, "default")(compute)
        torch.library.register_fake(name)(fake)
        operator = getattr(torch.ops.qwen2vl, name.partition("::")[2]).default

        @wraps(compute)
        def dispatch(x: Tensor, *args: object) -> Tensor:
            # Tracers outside of torch.compile pass fake tensors, which are a subclass of Tensor.
            is_traced = torch.compiler.is_compiling() or type(x) is not Tensor
            return (operator if is_traced else compute)(x, *args)

        return cast("C", dispatch)

    return register
