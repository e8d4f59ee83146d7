"""Embeddings: packed and chunked forwards equal single ones; pooling; use of the encoder cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine import LLM
from qwen2vl.engine.embed import Pooling, pool
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta
from tests.adapters import write_adapter
from tests.engine.test_llm import random_image, user
from tests.engine.test_runner import CONVERSATIONS, MODEL, new_llm
from tests.folders import write_tiny
from tests.tiny import tiny_processor

POOLINGS = get_args(Pooling)


# Chunks end inside images and videos.
@pytest.mark.parametrize("max_num_batched_tokens", [32, 100])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.inference_mode()
def test_packed_and_chunked_equal_each_prompt_alone(
    pooling: Literal["last", "mean"], max_num_batched_tokens: int
) -> None:
    llm = new_llm(max_num_batched_tokens=max_num_batched_tokens, max_num_encoder_patches=20)
    vectors_SD = llm.embed(CONVERSATIONS, pooling=pooling)
    assert vectors_SD.shape == (len(CONVERSATIONS), MODEL.config.text.hidden_size)
    assert vectors_SD.dtype == torch.float32
    for vector_D, conversation in zip(vectors_SD, CONVERSATIONS, strict=True):
        prompt = llm.processor(conversation)
        hidden_TD = MODEL(
            torch.tensor(prompt.input_ids),
            prompt.position_ids_3T,
            AttnMeta.build([len(prompt.input_ids)]),
            patches_NP=prompt.patches_NP,
            vision_meta=prompt.vision_meta,
            placeholder_index_M=prompt.placeholder_index_M if prompt.items else None,
        )
        want_SD = pool(hidden_TD, [len(hidden_TD)], pooling)
        torch.testing.assert_close(vector_D[None], want_SD, rtol=0, atol=1e-5)


def test_embeddings_are_normalized_and_depend_on_the_image() -> None:
    one, same, other = new_llm().embed([[user("What?", random_image(seed=s))] for s in (1, 1, 2)])
    assert torch.linalg.vector_norm(one).item() == pytest.approx(1)
    assert torch.equal(one, same)
    assert (one @ other).item() < 0.9999


def test_a_cached_image_is_not_encoded_again() -> None:
    llm = new_llm()
    llm.chat([user("What?", random_image())])
    llm.model.encode = None  # type: ignore[assignment]
    try:
        assert llm.embed([user("And this?", random_image())]).shape[0] == 1
    finally:
        del llm.model.encode
    assert not llm.engine_core.runner.encoder_cache._num_references


def test_a_quantized_model_embeds(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    plain, quantized = (LLM(tmp_path / "tiny", quantize=q) for q in (None, "int8"))
    (want,), (got,) = (llm.embed([user("What?", random_image())]) for llm in (plain, quantized))
    assert (want @ got).item() > 0.99


def test_no_forward_exceeds_the_step_limit() -> None:
    llm = new_llm(max_num_batched_tokens=40)
    forward, sizes = llm.model.model.forward, []

    def watched(embeds_TD: torch.Tensor, *given: Any) -> torch.Tensor:
        sizes.append(len(embeds_TD))
        return forward(embeds_TD, *given)

    llm.model.model.forward = watched  # type: ignore[method-assign]
    try:
        llm.embed([user("A long story. " * 9), user("Hi")])
    finally:
        del llm.model.model.forward
    assert max(sizes) == 40 and len(sizes) > 4


def test_an_adapter_embeds_like_its_merged_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", model=MODEL)
    write_adapter(tmp_path / "a", MODEL)
    merged = LLM(tmp_path / "model", dtype="float32", adapter=tmp_path / "a")
    llm = LLM(MODEL, tiny_processor(), adapters={"a": tmp_path / "a"})
    plain, adapted = llm.embed(CONVERSATIONS[:6]), llm.embed(CONVERSATIONS[:6], adapter="a")
    torch.testing.assert_close(adapted, merged.embed(CONVERSATIONS[:6]), rtol=0, atol=1e-5)
    assert (plain * adapted).sum(1).max() < 0.99
    with pytest.raises(InputError, match="adapter 'b'"):
        llm.embed(CONVERSATIONS[0], adapter="b")


def test_no_conversations_return_no_embeddings() -> None:
    assert new_llm().embed([]).shape == (0, MODEL.config.text.hidden_size)


def test_last_token_pooling() -> None:
    hidden_TD = torch.tensor([[9.0, 9.0], [3.0, 4.0], [0.0, -2.0]])
    assert torch.allclose(pool(hidden_TD, [2, 1]), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


def test_mean_pooling() -> None:
    hidden_TD = torch.tensor([[6.0, 0.0], [0.0, 8.0], [0.0, -2.0]])
    pooled_SD = pool(hidden_TD, [2, 1], "mean")
    assert torch.allclose(pooled_SD, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_sequence_is_pooled_independently(
    pooling: Pooling, lengths: list[int], seed: int
) -> None:
    hidden_TD = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(seed))
    pooled_SD = pool(hidden_TD, lengths, pooling)
    assert torch.allclose(pooled_SD.norm(dim=-1), torch.ones(len(lengths)))
    for part_TD, vector_D in zip(hidden_TD.split(lengths), pooled_SD, strict=True):
        assert torch.equal(pool(part_TD, [len(part_TD)], pooling)[0], vector_D)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_half_precision_is_pooled_in_float32(pooling: Pooling) -> None:
    hidden_TD = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pooled_SD = pool(hidden_TD, [5000], pooling)
    assert pooled_SD.dtype == torch.float32
    torch.testing.assert_close(pooled_SD, pool(hidden_TD.float(), [5000], pooling))


@pytest.mark.parametrize("lengths", [[2, 2], [0, 3], [4]])
def test_lengths_must_cover_the_states(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="lengths do not cover"):
        pool(torch.randn(3, 4), lengths)
