"""An opaque product is the plain function to the eye of Python, and one operator to a tracer."""

from __future__ import annotations

from uuid import uuid4

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qwen2vl.linear.custom_ops import opaque


def shape(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


def test_a_tracer_sees_one_operator_and_others_the_function() -> None:
    calls: list[torch.Size] = []

    def multiply(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        calls.append(x_TI.shape)
        return x_TI @ weight_OI.T if bias_O is None else x_TI @ weight_OI.T + bias_O

    multiply.__name__ = f"multiply_{uuid4().hex}"  # an operator is defined once a process
    hidden = opaque(shape)(multiply)
    x_TI, weight_OI, bias_O = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for biases in ((), (bias_O,)):
        want_TO = hidden(x_TI, weight_OI, *(biases or (None,)))

        def twice(x_TI: Tensor, weight_OI: Tensor, *biases: Tensor) -> Tensor:
            return hidden(x_TI * 2, weight_OI, *(biases or (None,)))

        traced = make_fx(twice, tracing_mode="symbolic")(x_TI, weight_OI, *biases)
        targets = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
        assert sum(multiply.__name__ in target for target in targets) == 1
        assert not any("mm" in target for target in targets)
        assert torch.equal(traced(x_TI / 2, weight_OI, *biases), want_TO)
    assert calls == [torch.Size((3, 4))] * 4  # never of the tensors that a tracer sends
