"""Varlen attention in `attention`: the arguments passed to the kernel, and when it is used."""

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
from tests.varlen import force_varlen, varlen_attn


@settings(max_examples=40)
@given(
    segments=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8),
    heads=st.sampled_from(HEADS),
    causal=st.booleans(),
)
def test_varlen_attention_equals_one_segment_at_a_time(
    segments: list[tuple[int, int]], heads: tuple[int, int], causal: bool
) -> None:
    lengths_q = [q for q, _ in segments]
    lengths_k = [q + num_cached for q, num_cached in segments]
    meta = AttnMeta.build(lengths_q, lengths_k)
    q_THC, k_TKC, v_TKC = qkv(sum(lengths_q), sum(lengths_k), *heads)
    with force_varlen():
        got = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    assert_close(got, attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal))


def test_one_kernel_call_computes_segments_of_different_lengths() -> None:
    q_THC, k_TKC, v_TKC = qkv(9, 9, 4, 2)
    with (
        force_varlen(),
        patch.object(kernels, "varlen_attention", wraps=kernels.varlen_attention) as spy,
    ):
        attention(q_THC, k_TKC, v_TKC, AttnMeta.build([4, 2, 3]), causal=True)
        assert spy.call_count == 1
        attention(q_THC, k_TKC, v_TKC, AttnMeta.build([3, 3, 3]), causal=True)
        assert spy.call_count == 1  # segments of equal length are one SDPA call


@given(
    segments=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=5),
    data=st.data(),
)
def test_keys_at_arbitrary_offsets_with_gaps(
    segments: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Segments may be in any order in memory, and slots behind their ends are not read."""
    order = data.draw(st.permutations(range(len(segments))))
    q_THC, _, _ = qkv(sum(q for q, _ in segments), 1, 4, 2)
    k_TKC, v_TKC = (torch.full((64, 2, 8), torch.nan) for _ in range(2))
    starts, offset, parts = [0] * len(segments), 0, [torch.empty(0)] * len(segments)
    for segment in order:
        length = sum(segments[segment])
        starts[segment] = offset = offset + data.draw(st.integers(0, 3))
        _, k_TKC[offset : offset + length], v_TKC[offset : offset + length] = qkv(1, length, 4, 2)
        offset += length
    queries = q_THC.split([q for q, _ in segments])
    for segment, q in enumerate(queries):
        keys = slice(starts[segment], starts[segment] + sum(segments[segment]))
        meta = AttnMeta.build([len(q)], [sum(segments[segment])])
        parts[segment] = attention_by_segment(q, k_TKC[keys], v_TKC[keys], meta, causal=True)
    meta = AttnMeta.build([q for q, _ in segments], [sum(segment) for segment in segments])
    with force_varlen():
        got = kernels.varlen_attention(
            q_THC,
            k_TKC,
            v_TKC,
            (meta.cu_seqlens_q, torch.tensor([*starts, starts[-1]], dtype=torch.int32)),
            (meta.max_seqlen_q, meta.max_seqlen_k),
            causal=True,
            seqused_k_S=torch.tensor(meta.lengths_k, dtype=torch.int32),
        )
    assert_close(got, torch.cat(parts))


def test_a_single_query_has_no_causal_window() -> None:
    """The kernel can split long keys (split-KV) only without a window."""
    windows: list[tuple[int, int]] = []

    def recording_varlen_attn(
        *args: object, window_size: tuple[int, int], **options: object
    ) -> Tensor:
        windows.append(window_size)
        return varlen_attn(*args, window_size=window_size, **options)  # type: ignore[arg-type]

    parts = qkv(2, 2, 4, 2)
    with patch("torch.nn.attention.varlen.varlen_attn", recording_varlen_attn):
        for lengths in ([1, 1], [2]):
            meta = AttnMeta.build(lengths)
            starts, max_seqlens = (meta.cu_seqlens_q, meta.cu_seqlens_k), (lengths[0], lengths[0])
            kernels.varlen_attention(*parts, starts, max_seqlens, causal=True)
    assert windows == [(-1, -1), (-1, 0)]


class FakeGPUTensor:
    """The attributes of a tensor that `supports_varlen` reads."""

    is_cuda = True

    def __init__(self, heads: int, dtype: torch.dtype = torch.bfloat16, channels: int = 80) -> None:
        self.shape = (5, heads, channels)
        self.dtype = dtype
        self.device = torch.device("cuda:0")


PARAMETERS_2_11 = frozenset(["query", "return_aux", "scale", "window_size"])
PARAMETERS_2_12 = PARAMETERS_2_11 | {"enable_gqa", "seqused_k", "block_table", "num_splits"}


@pytest.mark.parametrize(
    ("q", "kv_heads", "has_key_gaps", "parameters", "is_supported"),
    [
        (FakeGPUTensor(16), 16, False, PARAMETERS_2_11, True),
        (FakeGPUTensor(12), 2, False, PARAMETERS_2_11, False),
        (FakeGPUTensor(16), 16, True, PARAMETERS_2_11, False),
        (FakeGPUTensor(12), 2, True, PARAMETERS_2_12, True),
        (FakeGPUTensor(12, torch.float16), 2, False, PARAMETERS_2_12, True),
        (FakeGPUTensor(12, torch.float32), 2, False, PARAMETERS_2_12, False),
        (FakeGPUTensor(12, channels=12), 2, False, PARAMETERS_2_12, False),
        (FakeGPUTensor(16), 16, False, frozenset(), False),
    ],
)
def test_supports_varlen_depends_on_the_installed_kernel(
    q: FakeGPUTensor,
    kv_heads: int,
    has_key_gaps: bool,
    parameters: frozenset[str],
    is_supported: bool,
) -> None:
    with patch.object(kernels, "_varlen_attn_parameters", lambda device: parameters):
        k = FakeGPUTensor(kv_heads)
        result = kernels.supports_varlen(q, k, has_key_gaps=has_key_gaps)  # type: ignore[arg-type]
        assert result is is_supported


def test_varlen_is_not_supported_on_the_cpu() -> None:
    q_THC, k_TKC, _ = (x.bfloat16() for x in qkv(2, 2, 4, 2))
    assert not kernels.supports_varlen(q_THC, k_TKC)


def test_the_installed_torch_kernel_has_the_parameters_used_here() -> None:
    """Detects incompatible releases of torch without a GPU."""
    with (
        patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        patch("torch.backends.cuda.is_flash_attention_available", lambda: True),
    ):
        kernels._varlen_attn_parameters.cache_clear()
        parameters_found = kernels._varlen_attn_parameters(torch.device("cuda:0"))
    kernels._varlen_attn_parameters.cache_clear()
    is_2_11_or_older = tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 11)
    assert {
        "window_size",
        *([] if is_2_11_or_older else ["enable_gqa", "seqused_k"]),
    } <= parameters_found
