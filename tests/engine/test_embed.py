"""Vectors: packed equals alone, pictures count, known ones cost no vision work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from qwen2vl.engine import LLM
from qwen2vl.engine.embed import pool
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta
from tests.adapters import write_adapter
from tests.engine.test_llm import picture, user
from tests.engine.test_runner import CONVERSATIONS, MODEL, fresh
from tests.folders import write_tiny
from tests.tiny import tiny_processor


@pytest.mark.parametrize("max_step_tokens", [32, 100])  # chunks end inside pictures and clips
@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.inference_mode()
def test_packed_or_in_chunks_is_each_alone(
    pooling: Literal["last", "mean"], max_step_tokens: int
) -> None:
    llm = fresh(max_step_tokens=max_step_tokens, max_step_patches=20)
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
            pad_index_M=prompt.pad_index_M if prompt.items else None,
        )
        want_SD = pool(hidden_TD, [len(hidden_TD)], pooling)
        torch.testing.assert_close(vector_D[None], want_SD, rtol=0, atol=1e-5)


def test_a_vector_has_length_one_and_knows_its_picture() -> None:
    one, same, other = fresh().embed([[user("What?", picture(seed=s))] for s in (1, 1, 2)])
    assert torch.linalg.vector_norm(one).item() == pytest.approx(1)
    assert torch.equal(one, same)
    assert (one @ other).item() < 0.9999


def test_a_picture_asked_about_before_is_not_encoded_again() -> None:
    llm = fresh()
    llm.chat([user("What?", picture())])
    llm.model.encode = None  # type: ignore[assignment]
    try:
        assert llm.embed([user("And this?", picture())]).shape[0] == 1
    finally:
        del llm.model.encode
    assert not llm.runner.shelf._holds


def test_a_model_of_small_integers_embeds_too(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    plain, small = (LLM(tmp_path / "tiny", quantize=q) for q in (None, "int8"))
    (want,), (got,) = (llm.embed([user("What?", picture())]) for llm in (plain, small))
    assert (want @ got).item() > 0.99


def test_no_forward_is_larger_than_a_step() -> None:
    llm = fresh(max_step_tokens=40)
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


def test_an_adapter_reads_as_its_merged_model_does(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", model=MODEL)
    write_adapter(tmp_path / "a", MODEL)
    merged = LLM(tmp_path / "model", dtype="float32", adapter=tmp_path / "a")
    llm = LLM.of(MODEL, tiny_processor(), adapters={"a": tmp_path / "a"})
    plain, adapted = llm.embed(CONVERSATIONS[:6]), llm.embed(CONVERSATIONS[:6], adapter="a")
    torch.testing.assert_close(adapted, merged.embed(CONVERSATIONS[:6]), rtol=0, atol=1e-5)
    assert (plain * adapted).sum(1).max() < 0.99
    with pytest.raises(InputError, match="adapter 'b'"):
        llm.embed(CONVERSATIONS[0], adapter="b")


def test_nothing_gives_nothing() -> None:
    assert fresh().embed([]).shape == (0, MODEL.config.text.hidden_size)
