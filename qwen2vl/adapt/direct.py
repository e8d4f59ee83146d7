"""Functions of tensors, compiled once and called without a look at what they are given.

torch.compile asks at every call whether the arguments are still of the kind that it compiled for.
Where a call takes microseconds the asking costs more than the work. Here a function is traced with
examples, compiled by Inductor, and from then on called directly: who calls vouches that tensors
have the dtypes and sizes of the examples, but for the sizes that were set free. What was compiled
is kept by torch for the next start. Next room: one_token.py, which needs it most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

__all__ = ["Direct", "NotCompiledError", "compile_direct"]

Direct = Callable[..., Sequence[Tensor]]


class NotCompiledError(Exception):
    """A function could not be compiled here; says why in one line."""


@torch.inference_mode()
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
            or more, and equal where the examples' are; the axes before it may have any stride.
        threads: for what Inductor writes; None takes all.

    Raises:
        NotCompiledError: no compiler, or one that failed.
    """
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
    with mode, enable_python_dispatcher():  # which knows results of every operator by free sizes
        # Without annotations: written as strings they would spoil the key of torch's cache.
        graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="fake")(*inputs)
    options: dict[str, Any] = {"size_asserts": False}
    if threads is not None:
        options["cpp.threads"] = threads
    try:
        return _compile(graph, inputs, mode, options)
    except Exception as error:  # it may raise anything, and nobody needs it to answer
        reason = str(error).strip() or type(error).__name__
        raise NotCompiledError(reason.splitlines()[0]) from error


def _compile(
    graph: GraphModule, inputs: list[Any], mode: FakeTensorMode, options: dict[str, Any]
) -> Direct:
    with tracing(TracingContext(mode)):
        return standalone_compile(
            graph,
            inputs,
            dynamic_shapes="from_tracing_context",
            options={"config_patches": options},
        )
