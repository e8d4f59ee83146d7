"""Every kernel equals its slow reference, on every instruction set that this processor has."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.linear.cpu.library import INSTRUCTION_SETS, VARIABLE, load_kernels
from qwen2vl.linear.cpu.operators import (
    GROUP_SIZES,
    MAX_PRECISE_ROWS,
    dequantize_int4,
    linear_bf16,
    linear_int4,
    linear_int8,
    pack_int4,
    unpack_int4,
)
from tests.linear.cpu import reference
from tests.requirements import needs_kernels

KERNELS = load_kernels()
AVAILABLE = INSTRUCTION_SETS[: KERNELS.level + 1] if KERNELS else ()

pytestmark = needs_kernels

# Rows, inputs, outputs: layers of nano, 2B, 7B and of the vision tower (fewer outputs), and tails
# of tiles, chunks and blocks of every length.
SHAPES = [
    *((1, 256, 96), (2, 704, 64), (40, 256, 512)),
    *((1, 1536, 67), (8, 1536, 35), (9, 8960, 33), (100, 1536, 48), (300, 96, 130)),
    *((1, 3584, 40), (4, 18944, 20), (33, 3584, 31)),
    *((17, 1280, 50), (70, 5120, 18), (64, 1176, 24)),
    *((1, 1, 1), (3, 61, 7), (16, 100, 259), (1, 33, 15), (31, 65, 17)),
]


@pytest.fixture(params=AVAILABLE)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(VARIABLE, request.param)
    kernels = load_kernels()
    assert kernels is not None
    assert kernels.instruction_set == request.param
    return request.param


def seeded(*sizes: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(sizes) % 2**31)


def make_int4(
    outputs: int, inputs: int, group_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    groups = inputs // group_size
    ints_OI = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, generator=generator)
    scale_OG = torch.rand(outputs, groups, generator=generator).mul_(0.01).half()
    zero_OG = torch.randint(0, 16, (outputs, groups), dtype=torch.uint8, generator=generator)
    return pack_int4(ints_OI), scale_OG, zero_OG


def assert_within_rounding(got: Tensor, want: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """Sums in float32 differ by their order: by some units of the sum of magnitudes."""
    magnitude = x_TI.double().abs() @ weight_OI.double().abs().T
    error = (got.double() - want.double()).abs()
    half_unit = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-24
    assert bool((error <= half_unit * want.double().abs() + 2.0**-20 * magnitude + 1e-6).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_bf16(instruction_set: str, shape: tuple[int, int, int], bias: bool) -> None:
    rows, inputs, outputs = shape
    generator = seeded(*shape)
    x_TI = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight_OI = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias_O = torch.randn(outputs, generator=generator) if bias else None
    got_TO = linear_bf16(x_TI, weight_OI, bias_O)
    assert got_TO.dtype == torch.bfloat16
    want_TO = reference.linear_bf16(x_TI, weight_OI, bias_O)
    assert_within_rounding(got_TO, want_TO, x_TI, weight_OI)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_exact(
    instruction_set: str, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    generator = seeded(*shape)
    x_TI = torch.randn(rows, inputs, generator=generator).to(dtype)
    size = (outputs, inputs)
    weight_OI = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)
    scale_O = torch.rand(outputs, generator=generator)
    bias_O = torch.randn(outputs, generator=generator) if bias else None
    got_TO = linear_int8(x_TI, weight_OI, scale_O, bias_O)
    assert torch.equal(got_TO, reference.linear_int8(x_TI, weight_OI, scale_O, bias_O))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 32 == 0])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4(
    instruction_set: str, shape: tuple[int, int, int], group_size: int, dtype: torch.dtype
) -> None:
    rows, inputs, outputs = shape
    if inputs % group_size:
        return
    generator = seeded(*shape, group_size)
    x_TI = torch.randn(rows, inputs, generator=generator).to(dtype)
    weights = make_int4(outputs, inputs, group_size, generator)
    bias_O = torch.randn(outputs, generator=generator)
    got_TO = linear_int4(x_TI, *weights, bias_O)
    want_TO = reference.linear_int4(x_TI, *weights, bias_O)
    assert got_TO.dtype == dtype
    if rows == 1:
        assert_within_rounding(got_TO, want_TO, x_TI, dequantize_int4(*weights))
    else:
        assert torch.equal(got_TO, want_TO)


@given(
    rows=st.integers(0, 70),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 100),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_any_shape_and_number_of_threads(
    instruction_set: str, rows: int, inputs: int, outputs: int, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(rows, inputs, generator=generator)
    size = (outputs, inputs)
    weight_OI = torch.randint(-128, 128, size, dtype=torch.int8, generator=generator)
    scale_O = torch.rand(outputs, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got_TO = linear_int8(x_TI, weight_OI, scale_O, None)
    finally:
        torch.set_num_threads(before)
    assert got_TO.shape == (rows, outputs)
    if rows:
        assert torch.equal(got_TO, reference.linear_int8(x_TI, weight_OI, scale_O, None))


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_results_do_not_depend_on_the_number_of_threads(instruction_set: str, rows: int) -> None:
    generator = seeded(rows)
    x_TI = torch.randn(rows, 1536, generator=generator).bfloat16()
    weight_OI = torch.randn(1000, 1536, generator=generator).bfloat16()
    int4 = make_int4(1000, 1536, 128, generator)
    results: list[list[Tensor]] = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([linear_bf16(x_TI, weight_OI, None), linear_int4(x_TI, *int4, None)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("rows", [MAX_PRECISE_ROWS, 30])
def test_rows_do_not_affect_each_other(instruction_set: str, rows: int) -> None:
    generator = seeded(rows)
    x_TI = torch.randn(rows, 192, generator=generator)
    int4 = make_int4(40, 192, 64, generator)
    want_TO = linear_int4(x_TI, *int4, None)
    x_TI[3] = 1e4
    x_TI[5, 7] = float("nan")
    x_TI[7, 9] = float("inf")
    got_TO = linear_int4(x_TI, *int4, None)
    others = [t for t in range(rows) if t not in (3, 5, 7)]
    assert torch.equal(got_TO[others], want_TO[others])
    assert bool(got_TO[5].isnan().all())
    assert not bool(got_TO[7].isfinite().any())


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_rows_of_zeros_give_the_bias(instruction_set: str, rows: int) -> None:
    generator = seeded(rows)
    bias_O = torch.randn(33, generator=generator)
    got_TO = linear_int4(torch.zeros(rows, 64), *make_int4(33, 64, 32, generator), bias_O)
    assert torch.equal(got_TO, bias_O.expand(rows, -1))


def test_bf16_keeps_not_a_number_and_infinity(instruction_set: str) -> None:
    weight_OI = torch.eye(64).bfloat16()
    for rows in (1, 20):
        x_TI = torch.zeros(rows, 64).bfloat16()
        x_TI[0, 3] = float("inf")
        got_TO = linear_bf16(x_TI, weight_OI, None)
        assert bool(got_TO[0, 3].isinf())
        assert bool(got_TO[0, :3].isnan().all())  # 0 * inf


def test_two_callers_at_once(instruction_set: str) -> None:
    generator = seeded(1)
    rows = [torch.randn(t, 1536, generator=generator).bfloat16() for t in (1, 2, 20, 70)] * 8
    weight_OI = torch.randn(600, 1536, generator=generator).bfloat16()
    want = [linear_bf16(x_TI, weight_OI, None) for x_TI in rows]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x_TI: linear_bf16(x_TI, weight_OI, None), rows))
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    x_TI, weight_OI = torch.ones(1, 1536).bfloat16(), torch.ones(2000, 1536).bfloat16()
    linear_bf16(x_TI, weight_OI, None)  # starts a thread, which the child does not have
    child = os.fork()
    if child == 0:
        is_equal = bool((linear_bf16(x_TI, weight_OI, None) == 1536).all())
        os._exit(0 if is_equal else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


def test_packing_is_lossless() -> None:
    ints_OI = torch.randint(0, 16, (7, 64), dtype=torch.uint8, generator=seeded(7))
    packed = pack_int4(ints_OI)
    assert packed.shape == (7, 32)
    assert packed[0, 0] == ints_OI[0, 0] + 16 * ints_OI[0, 1]
    assert torch.equal(unpack_int4(packed), ints_OI)


def test_without_kernels_torch_multiplies_by_dequantized_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setattr("qwen2vl.linear.cpu.operators.CHUNK_NUMEL", 1000)
    generator = seeded(3)
    x_TI = torch.randn(5, 192, generator=generator)
    bias_O = torch.randn(40, generator=generator)
    int4 = make_int4(40, 192, 64, generator)
    want_TO = x_TI @ dequantize_int4(*int4).T + bias_O
    torch.testing.assert_close(linear_int4(x_TI, *int4, bias_O), want_TO)
    weight_OI, scale_O = torch.arange(-120, 120, dtype=torch.int8)[:, None], torch.rand(240)
    want_TO = x_TI[:, :1] @ (weight_OI.float() * scale_O[:, None]).T
    torch.testing.assert_close(linear_int8(x_TI[:, :1], weight_OI, scale_O, None), want_TO)
    x_TI, weight_OI = x_TI.bfloat16(), torch.randn(40, 192).bfloat16()
    want_TO = (reference.linear_bf16(x_TI, weight_OI, bias_O)).bfloat16()
    got_TO = linear_bf16(x_TI, weight_OI, bias_O)
    torch.testing.assert_close(got_TO, want_TO, rtol=0.02, atol=0.1)


def test_wrong_arguments_are_refused() -> None:
    x_TI, weight_OI = torch.zeros(2, 64), torch.zeros(8, 64, dtype=torch.int8)
    scale_O = torch.ones(8)
    wrong = [
        (x_TI[:, :32], weight_OI, scale_O, None),
        (x_TI.double(), weight_OI, scale_O, None),
        (x_TI[0], weight_OI, scale_O, None),
        (x_TI, weight_OI.float(), scale_O, None),
        (x_TI, torch.zeros(64, 8, dtype=torch.int8).T, scale_O, None),
        (x_TI, weight_OI, scale_O[:7], None),
        (x_TI, weight_OI, scale_O.half(), None),
        (x_TI, weight_OI, scale_O, torch.zeros(9)),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="must be"):
            linear_int8(*arguments)
    packed, scale_OG, zero_OG = make_int4(8, 96, 32, seeded(1))
    linear_int4(torch.zeros(1, 96), packed, scale_OG, zero_OG, None)
    with pytest.raises(ValueError, match="96 inputs in 2 groups"):
        linear_int4(
            torch.zeros(1, 96),
            packed,
            scale_OG[:, :2].contiguous(),
            zero_OG[:, :2].contiguous(),
            None,
        )
    with pytest.raises(ValueError, match="must be"):
        linear_bf16(x_TI, weight_OI.bfloat16(), None)


def test_torch_compile_keeps_the_operators() -> None:
    generator = seeded(9)
    x_TI = torch.randn(3, 64, generator=generator)
    int4 = make_int4(16, 64, 32, generator)

    def function(x_TI: Tensor) -> Tensor:
        return linear_int4(x_TI, *int4, None) + 1

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_TI), function(x_TI))
