"""Functions of tensors, compiled once and called without a look at what they are given.

torch.compile asks at every call whether the arguments are still of the kind that it compiled for.
Where a call takes microseconds the asking costs more than the work. Here a function is traced with
examples, compiled by Inductor, and from then on called directly: who calls vouches that tensors
have the dtypes and sizes of the examples, but for the sizes that were set free. What was compiled
is kept by torch for the next start. Next room: one_token.py, which needs it most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode
    from torch.fx import GraphModule

__all__ = ["Direct", "NotCompiledError", "compile_direct"]

Direct = Callable[..., Sequence[Tensor]]


class NotCompiledError(Exception):
    """A function could not be compiled here; says why in one line."""


def compile_direct(
    function: Callable[..., tuple[Tensor, ...]],
    examples: Sequence[Tensor],
    free: Mapping[int, int],
    *,
    threads: int | None = None,
) -> Direct:
    """Compile a function of tensors; what it changes in its arguments is changed there, too.

    Args:
        function: returns a tuple of tensors.
        examples: its arguments; of what is in them nothing is read.
        free: by the place of an argument, the axis whose size may differ from the example's: two
            or more. The axes before it may have any stride. What is equal in the examples, of
            sizes and of strides, must stay equal.
        threads: for what Inductor writes; None takes all.

    Raises:
        NotCompiledError: no compiler, one that failed, or one that fixed a size which is free.
    """
    options: dict[str, Any] = {"size_asserts": False}
    if threads is not None:
        options["cpp.threads"] = threads
    try:
        with torch.inference_mode():
            graph, inputs, mode = _trace(function, examples, free)
            compiled = _compile(graph, inputs, mode, options)
            fixed = _fixed_sizes(mode)
    except Exception as error:  # torch's rooms for this may change, and nobody needs it to answer
        reason = str(error).strip() or type(error).__name__
        raise NotCompiledError(reason.splitlines()[0]) from error
    if fixed:
        raise NotCompiledError(f"free sizes were fixed, at {', '.join(fixed)}")
    return compiled


def _trace(
    function: Callable[..., tuple[Tensor, ...]], examples: Sequence[Tensor], free: Mapping[int, int]
) -> tuple[GraphModule, list[Any], FakeTensorMode]:
    """Write down what a function does to tensors without numbers."""
    # These take seconds to import.
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs: list[Any] = []
    for place, example in enumerate(examples):
        if place in free:
            sizes = [DimDynamic.STATIC] * example.ndim
            sizes[free[place]] = DimDynamic.DUCK  # alike in the examples, alike always
            kind = StatelessSymbolicContext(dynamic_sizes=sizes)
            inputs.append(mode.from_tensor(example, symbolic_context=kind))
        else:
            inputs.append(mode.from_tensor(example, static_shapes=True))
    # The dispatcher knows results of more operators where sizes are free. Without annotations:
    # written as strings they would spoil the key of torch's cache.
    with mode, enable_python_dispatcher():
        graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="fake")(*inputs)
    return graph, inputs, mode


def _compile(
    graph: GraphModule, inputs: list[Any], mode: FakeTensorMode, options: dict[str, Any]
) -> Direct:
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile

    with tracing(TracingContext(mode)):
        return standalone_compile(
            graph,
            inputs,
            dynamic_shapes="from_tracing_context",
            options={"config_patches": options},
        )


def _fixed_sizes(mode: FakeTensorMode) -> list[str]:
    """List the numbers that an operator has put in place of free sizes: nobody asks for them."""
    assert mode.shape_env is not None
    return [str(size) for size in mode.shape_env.replacements.values() if size.is_number]
