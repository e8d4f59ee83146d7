"""Rotary embeddings equal the published frequencies and naive complex rotation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.geometry import Grid, patch_positions
from qwen2vl.model.rope import apply_rotary_emb, mrope_cos_sin, vision_cos_sin


def mrope_angles(time: int, row: int, col: int) -> list[float]:
    """Return the angles of one token with the official sections, from cosine and sine."""
    positions = torch.tensor([[time], [row], [col]])
    cos, sin = mrope_cos_sin(positions, 128, 1e6, (16, 24, 24))
    return torch.atan2(sin, cos)[0].tolist()


@pytest.mark.parametrize(
    ("axis", "index", "frequency"),
    [
        (0, 0, 1.0),
        (0, 15, 0.03924),
        (1, 16, 0.03162),
        (1, 39, 2.207e-4),
        (2, 40, 1.778e-4),
        (2, 63, 1.241e-6),
    ],
)
def test_mrope_sections_of_the_frequencies(axis: int, index: int, frequency: float) -> None:
    position = [0, 0, 0]
    position[axis] = 1
    angles = mrope_angles(*position)
    assert angles[index] == pytest.approx(frequency, rel=5e-4)
    start, end = [(0, 16), (16, 40), (40, 64)][axis]
    assert all(start <= i < end for i, angle in enumerate(angles) if angle != 0)


def test_mrope_of_text_is_1d_rope() -> None:
    positions = torch.arange(5)
    cos, sin = mrope_cos_sin(positions.expand(3, 5), 128, 1e6, (16, 24, 24))
    for i in range(64):
        angles = positions.double() * 1e6 ** (-2 * i / 128)
        torch.testing.assert_close(cos[:, i].double(), angles.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sin[:, i].double(), angles.sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("index", "frequency"), [(0, 1.0), (1, 0.63096), (19, 1.58489e-4)])
def test_frequencies_of_the_vision_tower(index: int, frequency: float) -> None:
    cos, sin = vision_cos_sin(torch.tensor([[1, 0], [0, 1]]), 80, 1e4)
    angles = torch.atan2(sin, cos)
    assert cos.shape == (2, 40)
    assert angles[0, index].item() == pytest.approx(frequency, rel=1e-5)  # rows first
    assert angles[1, 20 + index].item() == pytest.approx(frequency, rel=1e-5)  # then columns
    assert angles[0, 20:].abs().max() == angles[1, :20].abs().max() == 0


def test_patches_of_all_frames_have_the_same_angles() -> None:
    cos, _ = vision_cos_sin(patch_positions([Grid(2, 4, 6)]), 80, 1e4)
    assert torch.equal(cos[:24], cos[24:])


@pytest.mark.parametrize("position", [30_000, 32_767])
def test_angles_of_large_positions_are_accurate(position: int) -> None:
    # With frequencies or positions rounded to bfloat16 the error would be whole radians.
    cos, sin = mrope_cos_sin(torch.full((3, 1), position), 128, 1e6, (16, 24, 24))
    assert cos.dtype == sin.dtype == torch.float32
    for i in range(64):
        exact = position * 1e6 ** (-2 * i / 128)
        # One unit in the last place of a float32 angle below 2 ** 15 is 2 ** -9 radians.
        assert cos[0, i].item() == pytest.approx(math.cos(exact), abs=4e-3)
        assert sin[0, i].item() == pytest.approx(math.sin(exact), abs=4e-3)


def test_channels_are_paired_half_a_head_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x_THC = torch.randn(3, 2, 8, generator=generator)
    cos_sin = mrope_cos_sin(torch.tensor([[0, 1, 2], [0, 5, 7], [0, 3, 9]]), 8, 100.0, (1, 1, 2))
    rotated = apply_rotary_emb(x_THC, cos_sin)
    cos, sin = cos_sin
    for token in range(3):
        for head in range(2):
            for i in range(4):
                pair = complex(x_THC[token, head, i], x_THC[token, head, i + 4])
                pair *= complex(cos[token, i], sin[token, i])
                assert rotated[token, head, i].item() == pytest.approx(pair.real, abs=1e-6)
                assert rotated[token, head, i + 4].item() == pytest.approx(pair.imag, abs=1e-6)


@given(a=st.integers(0, 1000), b=st.integers(0, 1000), shift=st.integers(0, 500))
def test_attention_scores_depend_on_distance_only(a: int, b: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(a)
    q_THC, k_THC = torch.randn(2, 1, 1, 16, generator=generator)

    def score(at_q: int, at_k: int) -> float:
        cos_sin_q, cos_sin_k = (
            mrope_cos_sin(torch.full((3, 1), at), 16, 1e4, (2, 3, 3)) for at in (at_q, at_k)
        )
        return (
            (apply_rotary_emb(q_THC, cos_sin_q) * apply_rotary_emb(k_THC, cos_sin_k)).sum().item()
        )

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=2e-3)


def test_rotary_embeddings_are_applied_in_the_dtype_of_the_input() -> None:
    cos_sin = mrope_cos_sin(torch.arange(4).expand(3, 4), 8, 1e4, (1, 1, 2))
    x_THC = torch.ones(4, 1, 8, dtype=torch.bfloat16)
    rotated = apply_rotary_emb(x_THC, cos_sin)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(
        rotated.float(), apply_rotary_emb(x_THC.float(), cos_sin), rtol=0, atol=1.6e-2
    )
