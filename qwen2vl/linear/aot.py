"""Ahead-of-time compilation of tensor functions by Inductor, called without guards.

torch.compile evaluates guards at every call: whether the arguments still have the properties that
it compiled for. Where a call takes microseconds the guards cost more than the computation. Here a
function is traced with example inputs (`make_fx`), compiled by Inductor (`standalone_compile`) and
then called directly: the caller guarantees that tensors have the dtypes and sizes of the examples,
except for the dimensions declared dynamic. torch caches the compiled code on disk.

Experimental: private APIs of torch are used, and any failure raises CompilationError. Whoever
requests a compilation does so within `eager_fallback`. Used by compile/decode_block.py and
quantization/int4.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode
    from torch.fx import GraphModule

__all__ = ["CompilationError", "CompiledFunction", "compile_ahead_of_time", "eager_fallback"]

logger = logging.getLogger(__name__)

CompiledFunction = Callable[..., Sequence[Tensor]]


class CompilationError(Exception):
    """A function could not be compiled on this machine; the message is one line."""


@contextmanager
def eager_fallback(what: str) -> Iterator[None]:
    """Leave the block at a CompilationError and log one warning; the caller computes eagerly.

    Args:
        what: the computation that is compiled, for the warning.
    """
    try:
        yield
    except CompilationError as error:
        logger.warning("compile: %s could not be compiled (%s); computing eagerly", what, error)


def compile_ahead_of_time(
    function: Callable[..., tuple[Tensor, ...]],
    example_inputs: Sequence[Tensor],
    dynamic_dims: Mapping[int, int],
    *,
    num_threads: int | None = None,
) -> CompiledFunction:
    """Compile a function of tensors; in-place changes of its arguments are kept.

    Args:
        function: returns a tuple of tensors.
        example_inputs: its arguments; their values are not read.
        dynamic_dims: by the index of an argument, the dimension whose size may differ from the
            example's; sizes must be at least 2. The dimensions before it may have any stride. Sizes
            and strides that are equal in the examples must be equal in every call.
        num_threads: of the code that Inductor generates; None uses all.

    Raises:
        CompilationError: no compiler, a compiler error, or a dynamic dimension was specialized.
    """
    options: dict[str, Any] = {"size_asserts": False}
    if num_threads is not None:
        options["cpp.threads"] = num_threads
    try:
        with torch.inference_mode():
            graph, inputs, mode = _trace(function, example_inputs, dynamic_dims)
            compiled = _compile(graph, inputs, mode, options)
            specialized = _specialized_sizes(mode)
    except Exception as error:  # private torch APIs may change, and callers can run eagerly
        reason = str(error).strip() or type(error).__name__
        raise CompilationError(reason.splitlines()[0]) from error
    if specialized:
        raise CompilationError(f"dynamic dimensions were specialized to {', '.join(specialized)}")
    return compiled


def _trace(
    function: Callable[..., tuple[Tensor, ...]],
    example_inputs: Sequence[Tensor],
    dynamic_dims: Mapping[int, int],
) -> tuple[GraphModule, list[Any], FakeTensorMode]:
    """Trace a function with fake tensors; return its graph, the fake inputs and their mode."""
    # These imports take seconds.
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
    for index, example in enumerate(example_inputs):
        if index in dynamic_dims:
            sizes = [DimDynamic.STATIC] * example.ndim
            # DUCK: sizes that are equal in the examples share one symbol.
            sizes[dynamic_dims[index]] = DimDynamic.DUCK
            context = StatelessSymbolicContext(dynamic_sizes=sizes)
            inputs.append(mode.from_tensor(example, symbolic_context=context))
        else:
            inputs.append(mode.from_tensor(example, static_shapes=True))
    # The Python dispatcher has shape rules for more operators with symbolic sizes. The lambda drops
    # the annotations: as strings they would change the key of torch's cache.
    with mode, enable_python_dispatcher():
        graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="fake")(*inputs)
    return graph, inputs, mode


def _compile(
    graph: GraphModule, inputs: list[Any], mode: FakeTensorMode, options: dict[str, Any]
) -> CompiledFunction:
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile

    with tracing(TracingContext(mode)):
        return standalone_compile(
            graph,
            inputs,
            dynamic_shapes="from_tracing_context",
            options={"config_patches": options},
        )


def _specialized_sizes(mode: FakeTensorMode) -> list[str]:
    """List the constants that replaced dynamic dimensions; torch itself does not raise."""
    assert mode.shape_env is not None
    return [str(size) for size in mode.shape_env.replacements.values() if size.is_number]
