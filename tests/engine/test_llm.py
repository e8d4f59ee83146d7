"""The walk: equal to recomputing everything, and tidy at its edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.engine import LLM, Delta, SamplingParams
from qwen2vl.errors import CapacityError, EngineError, InputError
from qwen2vl.geometry import AttnMeta, text_positions
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tools import parse_calls
from qwen2vl.weights import GenerationDefaults
from tests.folders import write_tiny
from tests.parity.oracle import random_model
from tests.tiny import tiny_config, tiny_processor

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def picture(height: int = 56, width: int = 84, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames: int = 5, height: int = 56, width: int = 56) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(frames)])


def user(text: str, *media: np.ndarray) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"type": "video", "video": m} if m.ndim == 4 else {"type": "image", "image": m}
        for m in media
    ]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@torch.inference_mode()
def recompute(llm: LLM, prompt: ModelInput, count: int) -> list[int]:
    """The oracle: greedy, with no cache, positions and pictures all made again at each step."""
    ids = list(prompt.input_ids)
    for _ in range(count):
        position_ids_3T, _ = text_positions(ids, prompt.grids, llm.config)
        hidden_TD = llm.model(
            torch.tensor(ids),
            position_ids_3T,
            AttnMeta.build([len(ids)]),
            patches_NP=prompt.patches_NP,
            vision_meta=prompt.vision_meta,
            pad_index_M=prompt.pad_index_M if prompt.items else None,
        )
        ids.append(int(llm.model.logits(hidden_TD[-1:]).argmax()))
        if ids[-1] == llm.config.eos_token_id:
            break
    return ids[len(prompt.input_ids) :]


@given(
    words=st.text("abc ?\n", min_size=1, max_size=12),
    sides=st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), max_size=2),
    frames=st.integers(0, 7),
    seed=st.integers(0, 2),
)
@settings(max_examples=25)
def test_greedy_equals_recomputing_everything(
    words: str, sides: list[tuple[int, int]], frames: int, seed: int
) -> None:
    llm = LLM.of(random_model(tiny_config(), seed), tiny_processor())
    media = [picture(28 * h, 28 * w, i) for i, (h, w) in enumerate(sides)]
    media += [clip(frames)] if frames else []
    messages = [user(words, *media)]
    (completion,) = llm.chat(messages, GREEDY)
    want = recompute(llm, llm.processor(messages), GREEDY.max_tokens)
    assert list(completion.token_ids) == want


def test_answers_wander(llm: LLM) -> None:
    """Else equality of greedy answers would prove little."""
    (completion,) = llm.chat([user("Hello", picture())], GREEDY)
    assert len(set(completion.token_ids)) > 6


def test_the_picture_matters(llm: LLM) -> None:
    one, two = llm.chat([[user("Hi", picture(seed=1))], [user("Hi", picture(seed=2))]], GREEDY)
    assert one.token_ids != two.token_ids


def test_the_bill(llm: LLM) -> None:
    (completion,) = llm.chat([user("Hi", picture(100, 150), clip(3))], GREEDY)
    image, video = completion.items
    assert (image.kind, image.size_given, image.size_seen) == ("image", (100, 150), (112, 140))
    assert (completion.image_tokens, image.tokens) == (20, 20)
    assert video.kind == "video"
    assert completion.video_tokens == video.tokens
    assert completion.prompt_tokens > completion.image_tokens + completion.video_tokens
    assert completion.seconds.process > 0
    assert completion.seconds.vision > 0
    assert completion.seconds.prefill > 0
    assert completion.seconds.decode > 0
    assert completion.finish_reason == "length"
    assert completion.logprobs is None


def test_several_conversations_come_back_in_order(llm: LLM) -> None:
    conversations = [[user(text)] for text in ("one", "two", "three")]
    together = llm.chat(conversations, GREEDY)
    alone = [llm.chat(conversation, GREEDY)[0] for conversation in conversations]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_params_one_each(llm: LLM) -> None:
    short = SamplingParams(temperature=0, max_tokens=2)
    one, two = llm.chat([[user("a")], [user("a")]], [GREEDY, short])
    assert two.token_ids == one.token_ids[:2]
    with pytest.raises(InputError, match="got 2 for 1 prompts; give one, or one each"):
        llm.chat([user("a")], [GREEDY, short])


@pytest.mark.parametrize("wrong", [[{"temperature": 0}], {"temperature": 0}, ["greedy"]])
def test_params_of_another_type_are_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"params: got (dict|str), must be SamplingParams"):
        llm.chat([user("a")], wrong)


@pytest.mark.parametrize("wrong", [[1, 2, 3], [user("a")], [None]])
def test_prompts_of_another_type_are_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"prompts: got (int|dict|NoneType).*LLM\.chat"):
        llm.generate(wrong)


def test_no_conversation_no_answer(llm: LLM) -> None:
    assert llm.chat([[]][:0], GREEDY) == []


def test_deltas_join_to_the_text(llm: LLM) -> None:
    heard: list[Delta] = []
    params = SamplingParams(temperature=1.5, top_k=0, seed=4, max_tokens=60, ignore_eos=True)
    completions = llm.chat([[user("a")], [user("b", picture())]], params, on_delta=heard.append)
    for index, completion in enumerate(completions):
        own = [delta for delta in heard if delta.index == index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [delta.finish_reason for delta in own][-1] == completion.finish_reason
        assert all(delta.finish_reason is None for delta in own[:-1])


def test_the_same_seed_gives_the_same_answer_wherever_it_stands(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_k=0, seed=7, max_tokens=20)
    alone = llm.chat([user("a")], params)[0]
    _, beside = llm.chat([[user("other")], [user("a")]], params)
    assert beside.token_ids == alone.token_ids


def test_an_unfinished_assistant_turn_is_continued(llm: LLM) -> None:
    """Cutting an answer anywhere and continuing it gives the rest of it."""
    (whole,) = llm.chat([user("Hi")], SamplingParams(temperature=0, max_tokens=16))
    prompt = llm.processor([user("Hi")])
    begun = llm.processor(
        [user("Hi"), {"role": "assistant", "content": "abc"}], continue_final=True
    )
    assert begun.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    (rest,) = llm.chat([user("Hi"), {"role": "assistant", "content": "abc"}], GREEDY)
    assert list(rest.token_ids) == recompute(llm, begun, GREEDY.max_tokens)
    assert rest.prompt_tokens == whole.prompt_tokens + len(
        llm.processor.tokenizer.encode_text("abc")
    )


def test_generate_takes_raw_text_and_ready_prompts(llm: LLM) -> None:
    ready = llm.processor([user("Hi", picture())])
    raw = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    one, two = llm.generate([raw, ready], GREEDY)
    assert list(one.token_ids) == recompute(llm, llm.processor.from_text(raw), 12)
    assert list(two.token_ids) == recompute(llm, ready, 12)
    assert llm.generate(raw, GREEDY)[0].token_ids == one.token_ids


def test_the_checkpoints_end_tokens_stop_unless_ignored() -> None:
    model, processor = random_model(tiny_config()), tiny_processor()
    free = LLM.of(model, processor).chat([user("Hi")], GREEDY)[0].token_ids
    llm = LLM.of(model, processor, generation=GenerationDefaults(eos_token_ids=(free[3],)))
    first = free.index(free[3])
    (stopped,) = llm.chat([user("Hi")], GREEDY)
    assert stopped.token_ids == free[: first + 1]
    assert stopped.finish_reason == "stop"
    ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert llm.chat([user("Hi")], ignoring)[0].token_ids == free


def test_stop_token_ids_stop(llm: LLM) -> None:
    free = llm.chat([user("Hi")], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[free[4]])
    (stopped,) = llm.chat([user("Hi")], params)
    assert stopped.token_ids == free[: free.index(free[4]) + 1]
    assert stopped.finish_reason == "stop"


def test_stop_tokens_outside_the_vocabulary_are_refused(llm: LLM) -> None:
    size = llm.config.text.vocab_size
    with pytest.raises(InputError, match=f"{size} is not a token of this model.*{size - 1}"):
        llm.chat([user("Hi")], SamplingParams(stop_token_ids=[size]))


def test_a_greedy_checkpoint_is_greedy_and_a_sampling_one_samples() -> None:
    model, processor = random_model(tiny_config()), tiny_processor()
    greedy = LLM.of(model, processor).chat([user("Hi")], GREEDY)[0].token_ids
    open_params = SamplingParams(max_tokens=12, seed=1)
    assert LLM.of(model, processor).chat([user("Hi")], open_params)[0].token_ids == greedy
    habits = GenerationDefaults(do_sample=True, temperature=5.0, top_k=0)
    sampled = LLM.of(model, processor, generation=habits).chat([user("Hi")], open_params)[0]
    assert sampled.token_ids != greedy


def test_logprobs_of_a_greedy_answer_name_the_chosen_first(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    (completion,) = llm.chat([user("Hi")], params)
    assert completion.logprobs is not None
    assert tuple(entry.token_id for entry in completion.logprobs) == completion.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs)


def small(max_model_len: int) -> LLM:
    llm = LLM.of(random_model(tiny_config()), tiny_processor())
    llm.max_model_len = max_model_len
    return llm


def test_an_overflow_is_refused_before_anything_is_computed() -> None:
    llm = small(64)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed before the check")

    llm.model.encode = never  # type: ignore[assignment, method-assign]
    llm.model.forward = never  # type: ignore[assignment, method-assign]
    fits, not_fits = [user("Hi")], [user("Hi", picture(300, 300))]
    with pytest.raises(CapacityError, match=r"text \+ 49 image tokens > 64.*max_model_len"):
        llm.chat([fits, not_fits], GREEDY)


def test_the_context_ends_an_answer_with_length() -> None:
    length = len(tiny_processor()([user("Hi")]).input_ids)
    (completion,) = small(length + 3).chat([user("Hi")], SamplingParams(ignore_eos=True))
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


def test_the_context_is_the_models_unless_it_is_asked_to_be_shorter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    assert LLM(tmp_path / "tiny").max_model_len == tiny_config().text.max_position_embeddings
    assert LLM(tmp_path / "tiny", max_model_len=100).max_model_len == 100
    with pytest.raises(InputError, match="max_model_len: got 1, must be from 2 to"):
        LLM(tmp_path / "tiny", max_model_len=1)


@pytest.mark.parametrize("wrong", ["Hello", 3, {"role": "user", "content": "Hello"}])
def test_what_is_no_conversation_is_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match="expected a list of messages"):
        llm.chat(wrong)


@pytest.mark.parametrize("wrong", [["Hello"], [["Hello"]], [[]], [[None]], [None]])
def test_what_is_no_message_is_named(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match="messages"):
        llm.chat(wrong)


def test_damaged_weights_fail_their_request_and_no_other(llm: LLM) -> None:
    (want,) = llm.chat([user("Hi")], GREEDY)
    damaged = llm.model.visual.merger.ln_q.bias
    kept = damaged.detach().clone()
    with torch.no_grad():
        damaged[0] = float("nan")
    try:
        with pytest.raises(EngineError, match="not finite"):
            llm.chat([user("Hi", picture(seed=77))], GREEDY)
        bad, good = llm.chat([[user("Hi", picture(seed=77))], [user("Hi")]], GREEDY)
        assert bad.finish_reason == "error" and "not finite" in (bad.error or "")
        assert (good.finish_reason, good.token_ids) == (want.finish_reason, want.token_ids)
    finally:
        with torch.no_grad():
            damaged.copy_(kept)


def test_one_bad_conversation_is_found_before_the_others_are_answered(llm: LLM) -> None:
    heard: list[Delta] = []
    bad = [{"role": "user", "content": [{"type": "image", "image": "no-such-file.png"}]}]
    with pytest.raises(InputError, match=r"no-such-file\.png"):
        llm.chat([[user("Hi")], bad], GREEDY, on_delta=heard.append)
    assert heard == []


def test_an_interrupt_leaves_the_llm_ready(llm: LLM) -> None:
    (want,) = llm.chat([user("Hi", picture())], GREEDY)
    heard: list[str] = []

    def interrupt(delta: Delta) -> None:
        heard.append(delta.text)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.chat([user("Hi", picture())], GREEDY, on_delta=interrupt)
    (again,) = llm.chat([user("Hi", picture())], GREEDY)
    assert again.token_ids == want.token_ids


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_ran_out_is_named_and_the_llm_stays_ready(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (want,) = llm.chat([user("Hi")], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "_forward", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(CapacityError, match=r"out of memory.*a prompt of \d+ tokens; lower"):
            llm.chat([user("Hi")], GREEDY)
    assert llm.chat([user("Hi")], GREEDY)[0].token_ids == want.token_ids


def test_other_errors_keep_their_names(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        llm.runner, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shape"))
    )
    with pytest.raises(RuntimeError, match="shape"):
        llm.chat([user("Hi")], GREEDY)


def test_no_gradients_are_kept(llm: LLM) -> None:
    made: Sequence[torch.Tensor] = list(llm.model.parameters())
    llm.chat([user("Hi")], GREEDY)
    assert all(parameter.grad is None for parameter in made)


def test_with_tools_an_answer_ends_where_a_result_belongs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "\u273fFUNCTION\u273f: tap\n\u273fARGS\u273f: {}\n\u273fRESULT\u273f: made up"
    script = iter(llm.processor.tokenizer.encode_text(written))
    monkeypatch.setattr(
        "qwen2vl.engine.sampling.sampler.Sampler.sample", lambda *_: (next(script), None)
    )
    tool = {"name": "tap", "description": "Taps.", "parameters": {"type": "object"}}
    (completion,) = llm.chat([user("tap")], tools=[tool])
    assert completion.finish_reason == "stop"
    (call,) = parse_calls(completion.text).calls
    assert call.name == "tap"
    assert "made up" not in completion.text
