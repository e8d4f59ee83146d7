"""Functions called without guards: free sizes are free, and whatever goes wrong is one error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.linear import aot
from qwen2vl.linear.aot import NotCompiledError, compile_direct


def scaled(x_TI: Tensor, out_TI: Tensor) -> tuple[Tensor]:
    """Add to the last row of what is given, and say how much there is."""
    out_TI[-1:] += x_TI.sum(0, keepdim=True)
    return (x_TI * out_TI.shape[0],)


def check(compiled: Callable[..., Any], rows: int, room: int) -> None:
    x_TI, out_TI = (torch.randn(room, 6)[:rows] for _ in range(2))
    expected_TI = out_TI.clone()
    want = scaled(x_TI, expected_TI)
    got = compiled(x_TI, out_TI)
    assert torch.allclose(got[0], want[0])
    assert torch.allclose(out_TI, expected_TI)


def examples() -> tuple[Tensor, Tensor]:
    return torch.zeros(5, 6), torch.zeros(5, 6)


def test_a_traced_function_takes_any_free_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    traced = compile_direct(scaled, examples(), {0: 0, 1: 0})
    for rows in (2, 5, 40):
        check(traced, rows, rows + 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("threads", [None, 1])
def test_a_compiled_function_takes_any_free_size(threads: int | None) -> None:
    compiled = compile_direct(scaled, examples(), {0: 0, 1: 0}, threads=threads)
    with torch.inference_mode():
        for rows in (2, 5, 40):
            check(compiled, rows, rows + 3)


def fixes(x_TI: Tensor) -> tuple[Tensor]:
    return (x_TI.sum(0) + int(x_TI.shape[0]),)


def breaks(x_TI: Tensor) -> tuple[Tensor]:
    return (x_TI * float(x_TI.sum()),)


@pytest.mark.parametrize(
    ("function", "words"), [(fixes, "free sizes were fixed, at 5"), (breaks, "")]
)
def test_what_cannot_be_traced_for_any_size_is_refused(
    function: Callable[[Tensor], tuple[Tensor]], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_compile", lambda graph, *_: graph)
    with pytest.raises(NotCompiledError, match=words) as caught:
        compile_direct(function, examples()[:1], {0: 0})
    assert "\n" not in str(caught.value)


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ImportError("no such room\nand more")

    monkeypatch.setattr(aot, "_compile", broken)
    with pytest.raises(NotCompiledError, match=r"^no such room$"):
        compile_direct(scaled, examples(), {0: 0, 1: 0})
