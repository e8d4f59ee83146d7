"""AOT compilation without guards: dynamic sizes stay dynamic, every failure is CompilationError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.linear import aot
from qwen2vl.linear.aot import CompilationError, compile_ahead_of_time


def scale_and_accumulate(x_TI: Tensor, out_TI: Tensor) -> tuple[Tensor]:
    """Accumulate into the last row of an argument, and use its dynamic size."""
    out_TI[-1:] += x_TI.sum(0, keepdim=True)
    return (x_TI * out_TI.shape[0],)


def check(compiled: Callable[..., Any], rows: int, capacity: int) -> None:
    x_TI, out_TI = (torch.randn(capacity, 6)[:rows] for _ in range(2))
    expected_TI = out_TI.clone()
    want = scale_and_accumulate(x_TI, expected_TI)
    got = compiled(x_TI, out_TI)
    assert torch.allclose(got[0], want[0])
    assert torch.allclose(out_TI, expected_TI)


def example_inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 6), torch.zeros(5, 6)


def test_traced_function_accepts_any_dynamic_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    traced = compile_ahead_of_time(scale_and_accumulate, example_inputs(), {0: 0, 1: 0})
    for rows in (2, 5, 40):
        check(traced, rows, rows + 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_threads", [None, 1])
def test_compiled_function_accepts_any_dynamic_size(num_threads: int | None) -> None:
    compiled = compile_ahead_of_time(
        scale_and_accumulate, example_inputs(), {0: 0, 1: 0}, num_threads=num_threads
    )
    with torch.inference_mode():
        for rows in (2, 5, 40):
            check(compiled, rows, rows + 3)


def specializes_size(x_TI: Tensor) -> tuple[Tensor]:
    return (x_TI.sum(0) + int(x_TI.shape[0]),)


def reads_value(x_TI: Tensor) -> tuple[Tensor]:
    return (x_TI * float(x_TI.sum()),)


@pytest.mark.parametrize(
    ("function", "text"),
    [(specializes_size, "dynamic dimensions were specialized to 5"), (reads_value, "")],
)
def test_specialized_or_failing_functions_raise_compilation_error(
    function: Callable[[Tensor], tuple[Tensor]], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    with pytest.raises(CompilationError, match=text) as caught:
        compile_ahead_of_time(function, example_inputs()[:1], {0: 0})
    assert "\n" not in str(caught.value)


def test_compiler_failure_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ImportError("no such module\nand more")

    monkeypatch.setattr(aot, "_compile", broken)
    with pytest.raises(CompilationError, match=r"^no such module$"):
        compile_ahead_of_time(scale_and_accumulate, example_inputs(), {0: 0, 1: 0})
