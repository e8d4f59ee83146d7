"""The packed kernel's way through `attention`: which segments it is given, and when it is not."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.geometry import AttnMeta
from qwen2vl.model import kernels
from qwen2vl.model.attention import attention, attention_by_segment
from tests.model.test_attention import HEADS, assert_close, qkv
from tests.varlen import varlen_attn, with_varlen


@settings(max_examples=40)
@given(
    segments=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8),
    heads=st.sampled_from(HEADS),
    causal=st.booleans(),
)
def test_packed_equals_one_segment_at_a_time(
    segments: list[tuple[int, int]], heads: tuple[int, int], causal: bool
) -> None:
    lengths_q = [q for q, _ in segments]
    lengths_k = [q + more for q, more in segments]
    meta = AttnMeta.build(lengths_q, lengths_k)
    q_THC, k_TKC, v_TKC = qkv(sum(lengths_q), sum(lengths_k), *heads)
    with with_varlen():
        got = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    assert_close(got, attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal))


def test_one_call_serves_segments_of_all_lengths() -> None:
    q_THC, k_TKC, v_TKC = qkv(9, 9, 4, 2)
    with with_varlen(), patch.object(kernels, "attend_packed", wraps=kernels.attend_packed) as spy:
        attention(q_THC, k_TKC, v_TKC, AttnMeta.build([4, 2, 3]), causal=True)
        assert spy.call_count == 1
        attention(q_THC, k_TKC, v_TKC, AttnMeta.build([3, 3, 3]), causal=True)
        assert spy.call_count == 1  # equal ones are a batch already


@given(
    rows=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5),
    data=st.data(),
)
def test_keys_may_lie_anywhere_with_gaps_between(
    rows: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Segments are given in any order of memory, and what lies behind their ends is not read."""
    order = data.draw(st.permutations(range(len(rows))))
    q_THC, _, _ = qkv(sum(q for q, _ in rows), 1, 4, 2)
    k_TKC, v_TKC = (torch.full((64, 2, 8), torch.nan) for _ in range(2))
    starts, at, parts = [0] * len(rows), 0, [torch.empty(0)] * len(rows)
    for row in order:
        length = sum(rows[row])
        starts[row] = at = at + data.draw(st.integers(0, 3))
        _, k_TKC[at : at + length], v_TKC[at : at + length] = qkv(1, length, 4, 2)
        at += length
    queries = q_THC.split([q for q, _ in rows])
    for row, q in enumerate(queries):
        here = slice(starts[row], starts[row] + sum(rows[row]))
        meta = AttnMeta.build([len(q)], [sum(rows[row])])
        parts[row] = attention_by_segment(q, k_TKC[here], v_TKC[here], meta, causal=True)
    meta = AttnMeta.build([q for q, _ in rows], [sum(row) for row in rows])
    with with_varlen():
        got = kernels.attend_packed(
            q_THC,
            k_TKC,
            v_TKC,
            (meta.cu_seqlens_q, torch.tensor([*starts, starts[-1]], dtype=torch.int32)),
            (meta.max_seqlen_q, meta.max_seqlen_k),
            causal=True,
            used_S=torch.tensor(meta.lengths_k, dtype=torch.int32),
        )
    assert_close(got, torch.cat(parts))


def test_a_single_query_is_not_called_causal() -> None:
    """The kernel divides long keys among processors only where no window is asked for."""
    windows: list[tuple[int, int]] = []

    def noted(*args: object, window_size: tuple[int, int], **options: object) -> Tensor:
        windows.append(window_size)
        return varlen_attn(*args, window_size=window_size, **options)  # type: ignore[arg-type]

    parts = qkv(2, 2, 4, 2)
    with patch("torch.nn.attention.varlen.varlen_attn", noted):
        for lengths in ([1, 1], [2]):
            meta = AttnMeta.build(lengths)
            starts, longest = (meta.cu_seqlens_q, meta.cu_seqlens_k), (lengths[0], lengths[0])
            kernels.attend_packed(*parts, starts, longest, causal=True)
    assert windows == [(-1, -1), (-1, 0)]


class OnGPU:
    """As much of a tensor as `packs` looks at."""

    is_cuda = True

    def __init__(self, heads: int, dtype: torch.dtype = torch.bfloat16, channels: int = 80) -> None:
        self.shape = (5, heads, channels)
        self.dtype = dtype
        self.device = torch.device("cuda:0")


OF_2_11 = frozenset(["query", "return_aux", "scale", "window_size"])
OF_2_12 = OF_2_11 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}


@pytest.mark.parametrize(
    ("q", "kv_heads", "has_gaps", "arguments", "packed"),
    [
        (OnGPU(16), 16, False, OF_2_11, True),
        (OnGPU(12), 2, False, OF_2_11, False),
        (OnGPU(16), 16, True, OF_2_11, False),
        (OnGPU(12), 2, True, OF_2_12, True),
        (OnGPU(12, torch.float16), 2, False, OF_2_12, True),
        (OnGPU(12, torch.float32), 2, False, OF_2_12, False),
        (OnGPU(12, channels=12), 2, False, OF_2_12, False),
        (OnGPU(16), 16, False, frozenset(), False),
    ],
)
def test_what_the_installed_kernel_cannot_do_goes_the_other_way(
    q: OnGPU, kv_heads: int, has_gaps: bool, arguments: frozenset[str], packed: bool
) -> None:
    with patch.object(kernels, "_arguments", lambda device: arguments):
        assert kernels.packs(q, OnGPU(kv_heads), has_gaps=has_gaps) is packed  # type: ignore[arg-type]


def test_nothing_is_packed_on_the_cpu() -> None:
    q_THC, k_TKC, _ = (x.bfloat16() for x in qkv(2, 2, 4, 2))
    assert not kernels.packs(q_THC, k_TKC)


def test_the_kernel_of_the_installed_torch_has_the_arguments_used_here() -> None:
    """So that another release of torch is noticed here, not by a user with a GPU."""
    with (
        patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        patch("torch.backends.cuda.is_flash_attention_available", lambda: True),
    ):
        kernels._arguments.cache_clear()
        found = kernels._arguments(torch.device("cuda:0"))
    kernels._arguments.cache_clear()
    is_first = tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 11)
    assert {"window_size", *([] if is_first else ["enable_gqa", "seqused_k"])} <= found
