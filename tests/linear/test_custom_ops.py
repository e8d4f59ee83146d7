"""A custom op is the plain function in eager mode, and one opaque operator under tracing."""

from __future__ import annotations

from uuid import uuid4

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qwen2vl.linear.custom_ops import custom_op


def fake(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


def test_traced_as_one_operator_and_called_directly_in_eager_mode() -> None:
    calls: list[torch.Size] = []

    def multiply(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        calls.append(x_TI.shape)
        return x_TI @ weight_OI.T if bias_O is None else x_TI @ weight_OI.T + bias_O

    multiply.__name__ = f"multiply_{uuid4().hex}"  # an operator can be defined only once a process
    op = custom_op(fake)(multiply)
    x_TI, weight_OI, bias_O = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for biases in ((), (bias_O,)):
        want_TO = op(x_TI, weight_OI, *(biases or (None,)))

        def twice(x_TI: Tensor, weight_OI: Tensor, *biases: Tensor) -> Tensor:
            return op(x_TI * 2, weight_OI, *(biases or (None,)))

        traced = make_fx(twice, tracing_mode="symbolic")(x_TI, weight_OI, *biases)
        targets = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
        assert sum(multiply.__name__ in target for target in targets) == 1
        assert not any("mm" in target for target in targets)
        assert torch.equal(traced(x_TI / 2, weight_OI, *biases), want_TO)
    assert calls == [torch.Size((3, 4))] * 4  # never for the tracer's fake tensors
