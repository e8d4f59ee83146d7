"""LLM.chat and LLM.generate: equal to full recomputation; input validation and error handling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl import threads
from qwen2vl.engine import LLM, Delta, SamplingParams
from qwen2vl.engine.config import EngineConfig
from qwen2vl.errors import CapacityError, EngineError, InputError
from qwen2vl.geometry import AttnMeta, mrope_positions
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.tools import parse_tool_calls
from qwen2vl.weights import GenerationDefaults
from tests.folders import write_tiny
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def random_image(height: int = 56, width: int = 84, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_video(frames: int = 5, height: int = 56, width: int = 56) -> np.ndarray:
    return np.stack([random_image(height, width, seed) for seed in range(frames)])


def user(text: str, *media: np.ndarray) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"type": "video", "video": m} if m.ndim == 4 else {"type": "image", "image": m}
        for m in media
    ]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@torch.inference_mode()
def recompute(llm: LLM, prompt: ModelInput, count: int) -> list[int]:
    """Reference: greedy decoding without any cache, with all inputs recomputed at each step."""
    ids = list(prompt.input_ids)
    for _ in range(count):
        position_ids_3T, _ = mrope_positions(ids, prompt.grids, llm.config)
        hidden_TD = llm.model(
            torch.tensor(ids),
            position_ids_3T,
            AttnMeta.build([len(ids)]),
            patches_NP=prompt.patches_NP,
            vision_meta=prompt.vision_meta,
            placeholder_index_M=prompt.placeholder_index_M if prompt.items else None,
        )
        ids.append(int(llm.model.logits(hidden_TD[-1:]).argmax()))
        if ids[-1] == llm.config.eos_token_id:
            break
    return ids[len(prompt.input_ids) :]


@given(
    text=st.text("abc ?\n", min_size=1, max_size=12),
    sides=st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), max_size=2),
    frames=st.integers(0, 7),
    seed=st.integers(0, 2),
)
@settings(max_examples=25)
def test_greedy_equals_full_recomputation(
    text: str, sides: list[tuple[int, int]], frames: int, seed: int
) -> None:
    llm = LLM(random_model(tiny_config(), seed), tiny_processor())
    media = [random_image(28 * h, 28 * w, i) for i, (h, w) in enumerate(sides)]
    media += [random_video(frames)] if frames else []
    messages = [user(text, *media)]
    (completion,) = llm.chat(messages, GREEDY)
    want = recompute(llm, llm.processor(messages), GREEDY.max_tokens)
    assert list(completion.token_ids) == want


def test_outputs_vary(llm: LLM) -> None:
    """Otherwise the equality of greedy outputs would prove little."""
    (completion,) = llm.chat([user("Hello", random_image())], GREEDY)
    assert len(set(completion.token_ids)) > 6


def test_the_image_affects_the_output(llm: LLM) -> None:
    one, two = llm.chat(
        [[user("Hi", random_image(seed=1))], [user("Hi", random_image(seed=2))]], GREEDY
    )
    assert one.token_ids != two.token_ids


def test_completion_reports_usage_and_timings(llm: LLM) -> None:
    (completion,) = llm.chat([user("Hi", random_image(100, 150), random_video(3))], GREEDY)
    image, video = completion.items
    assert (image.kind, image.original_size, image.resized_size) == (
        "image",
        (100, 150),
        (112, 140),
    )
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


def test_completions_are_in_the_order_of_the_conversations(llm: LLM) -> None:
    conversations = [[user(text)] for text in ("one", "two", "three")]
    together = llm.chat(conversations, GREEDY)
    alone = [llm.chat(conversation, GREEDY)[0] for conversation in conversations]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_params_for_each_conversation(llm: LLM) -> None:
    short = SamplingParams(temperature=0, max_tokens=2)
    one, two = llm.chat([[user("a")], [user("a")]], [GREEDY, short])
    assert two.token_ids == one.token_ids[:2]
    with pytest.raises(InputError, match="got 2 for 1 prompts; give one, or one each"):
        llm.chat([user("a")], [GREEDY, short])


@pytest.mark.parametrize("wrong", [[{"temperature": 0}], {"temperature": 0}, ["greedy"]])
def test_params_of_another_type_are_rejected(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"params.*: got .*must be SamplingParams; pass Sampling"):
        llm.chat([user("a")], wrong)


@pytest.mark.parametrize("wrong", [[1, 2, 3], [user("a")], [None]])
def test_prompts_of_another_type_are_rejected(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"prompts\[0\]: got .*must be text or.*LLM\.chat"):
        llm.generate(wrong)


def test_no_conversations_return_no_completions(llm: LLM) -> None:
    assert llm.chat([[]][:0], GREEDY) == []


def test_deltas_concatenate_to_the_text(llm: LLM) -> None:
    deltas: list[Delta] = []
    params = SamplingParams(temperature=1.5, top_k=0, seed=4, max_tokens=60, ignore_eos=True)
    completions = llm.chat(
        [[user("a")], [user("b", random_image())]], params, on_delta=deltas.append
    )
    for index, completion in enumerate(completions):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == completion.text
        assert [delta.finish_reason for delta in own][-1] == completion.finish_reason
        assert all(delta.finish_reason is None for delta in own[:-1])


def test_the_same_seed_gives_the_same_output_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_k=0, seed=7, max_tokens=20)
    alone = llm.chat([user("a")], params)[0]
    _, beside = llm.chat([[user("other")], [user("a")]], params)
    assert beside.token_ids == alone.token_ids


def test_a_final_assistant_message_is_continued(llm: LLM) -> None:
    """Truncating an output anywhere and continuing it gives the rest of it."""
    (whole,) = llm.chat([user("Hi")], SamplingParams(temperature=0, max_tokens=16))
    prompt = llm.processor([user("Hi")])
    continued_prompt = llm.processor(
        [user("Hi"), {"role": "assistant", "content": "abc"}], continue_final_message=True
    )
    assert continued_prompt.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    (rest,) = llm.chat([user("Hi"), {"role": "assistant", "content": "abc"}], GREEDY)
    assert list(rest.token_ids) == recompute(llm, continued_prompt, GREEDY.max_tokens)
    assert rest.prompt_tokens == whole.prompt_tokens + len(
        llm.processor.tokenizer.encode_text("abc")
    )


def test_generate_takes_raw_text_and_processed_prompts(llm: LLM) -> None:
    processed = llm.processor([user("Hi", random_image())])
    raw = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    one, two = llm.generate([raw, processed], GREEDY)
    assert list(one.token_ids) == recompute(llm, llm.processor.from_text(raw), 12)
    assert list(two.token_ids) == recompute(llm, processed, 12)
    assert llm.generate(raw, GREEDY)[0].token_ids == one.token_ids


def test_end_tokens_of_the_checkpoint_stop_unless_ignored() -> None:
    model, processor = random_model(tiny_config()), tiny_processor()
    unstopped = LLM(model, processor).chat([user("Hi")], GREEDY)[0].token_ids
    llm = LLM(
        model, processor, generation_defaults=GenerationDefaults(eos_token_ids=(unstopped[3],))
    )
    first = unstopped.index(unstopped[3])
    (stopped,) = llm.chat([user("Hi")], GREEDY)
    assert stopped.token_ids == unstopped[: first + 1]
    assert stopped.finish_reason == "stop"
    ignoring = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert llm.chat([user("Hi")], ignoring)[0].token_ids == unstopped


def test_stop_token_ids_stop(llm: LLM) -> None:
    unstopped = llm.chat([user("Hi")], GREEDY)[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[unstopped[4]])
    (stopped,) = llm.chat([user("Hi")], params)
    assert stopped.token_ids == unstopped[: unstopped.index(unstopped[4]) + 1]
    assert stopped.finish_reason == "stop"


def test_stop_tokens_outside_the_vocabulary_are_rejected(llm: LLM) -> None:
    size = llm.config.text.vocab_size
    with pytest.raises(InputError, match=f"{size} is not a token of this model.*{size - 1}"):
        llm.chat([user("Hi")], SamplingParams(stop_token_ids=[size]))


def test_generation_defaults_decide_between_greedy_and_sampling() -> None:
    model, processor = random_model(tiny_config()), tiny_processor()
    greedy = LLM(model, processor).chat([user("Hi")], GREEDY)[0].token_ids
    open_params = SamplingParams(max_tokens=12, seed=1)
    assert LLM(model, processor).chat([user("Hi")], open_params)[0].token_ids == greedy
    generation_defaults = GenerationDefaults(do_sample=True, temperature=5.0, top_k=0)
    sampled = LLM(model, processor, generation_defaults=generation_defaults).chat(
        [user("Hi")], open_params
    )[0]
    assert sampled.token_ids != greedy


def test_logprobs_of_a_greedy_output_list_the_selected_token_first(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    (completion,) = llm.chat([user("Hi")], params)
    assert completion.logprobs is not None
    assert tuple(entry.token_id for entry in completion.logprobs) == completion.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in completion.logprobs)


@torch.inference_mode()
def test_cumulative_logprob_is_that_of_one_forward_over_the_output(llm: LLM) -> None:
    messages, params = [user("Hi")], SamplingParams(temperature=0, max_tokens=5, logprobs=0)
    (completion,) = llm.chat(messages, params)
    prompt_ids = llm.prepare(messages, params).prompt.input_ids
    ids = torch.tensor([*prompt_ids, *completion.token_ids])
    positions_3T, _ = mrope_positions(ids.tolist(), [], llm.config)
    hidden_TD = llm.model(ids, positions_3T, AttnMeta.build([len(ids)]))
    logprobs_TV = llm.model.logits(hidden_TD[len(prompt_ids) - 1 : -1]).float().log_softmax(-1)
    expected = logprobs_TV.gather(1, ids[len(prompt_ids) :, None]).sum().item()
    assert completion.cumulative_logprob == pytest.approx(expected, abs=1e-4)
    assert llm.chat(messages, temperature=0, max_tokens=5)[0].cumulative_logprob is None


def llm_with_context(max_model_len: int) -> LLM:
    llm = LLM(random_model(tiny_config()), tiny_processor())
    llm.max_model_len = max_model_len
    return llm


def test_an_overlong_prompt_is_rejected_before_anything_is_computed() -> None:
    llm = llm_with_context(64)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed before the check")

    llm.model.encode = never  # type: ignore[assignment, method-assign]
    llm.model.forward = never  # type: ignore[assignment, method-assign]
    fits, not_fits = [user("Hi")], [user("Hi", random_image(300, 300))]
    with pytest.raises(CapacityError, match=r"text \+ 49 image tokens, more than 64"):
        llm.chat([fits, not_fits], GREEDY)


def test_the_context_limit_finishes_with_length() -> None:
    length = len(tiny_processor()([user("Hi")]).input_ids)
    (completion,) = llm_with_context(length + 3).chat([user("Hi")], SamplingParams(ignore_eos=True))
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


def test_max_model_len_defaults_to_the_models_context(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    assert LLM(tmp_path / "tiny").max_model_len == tiny_config().text.max_position_embeddings
    assert LLM(tmp_path / "tiny", max_model_len=100).max_model_len == 100
    with pytest.raises(InputError, match="max_model_len: got 1, must be from 2 to"):
        LLM(tmp_path / "tiny", max_model_len=1)


@pytest.mark.parametrize("wrong", [["Hello", []], [["Hello"]], [[]], [[None]], [None], [{}]])
def test_malformed_messages_are_reported(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InputError, match="messages"):
        llm.chat(wrong)


def test_damaged_weights_fail_only_the_affected_request(llm: LLM) -> None:
    (want,) = llm.chat([user("Hi")], GREEDY)
    damaged = llm.model.visual.merger.ln_q.bias
    original = damaged.detach().clone()
    with torch.no_grad():
        damaged[0] = float("nan")
    try:
        with pytest.raises(EngineError, match="not finite"):
            llm.chat([user("Hi", random_image(seed=77))], GREEDY)
        bad, good = llm.chat([[user("Hi", random_image(seed=77))], [user("Hi")]], GREEDY)
        assert bad.finish_reason == "error" and "not finite" in (bad.error or "")
        assert (good.finish_reason, good.token_ids) == (want.finish_reason, want.token_ids)
    finally:
        with torch.no_grad():
            damaged.copy_(original)


def test_all_conversations_are_validated_before_the_first_runs(llm: LLM) -> None:
    deltas: list[Delta] = []
    bad = [{"role": "user", "content": [{"type": "image", "image": "no-such-file.png"}]}]
    with pytest.raises(InputError, match=r"no-such-file\.png"):
        llm.chat([[user("Hi")], bad], GREEDY, on_delta=deltas.append)
    assert deltas == []


def test_the_llm_is_usable_after_an_interrupt(llm: LLM) -> None:
    (want,) = llm.chat([user("Hi", random_image())], GREEDY)
    deltas: list[str] = []

    def interrupt(delta: Delta) -> None:
        deltas.append(delta.text)
        if len(deltas) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.chat([user("Hi", random_image())], GREEDY, on_delta=interrupt)
    (again,) = llm.chat([user("Hi", random_image())], GREEDY)
    assert again.token_ids == want.token_ids


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_raises_capacity_error_and_the_llm_stays_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (want,) = llm.chat([user("Hi")], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine_core.runner, "_forward", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(CapacityError, match=r"out of memory.*a prompt of \d+ tokens; lower"):
            llm.chat([user("Hi")], GREEDY)
    assert llm.chat([user("Hi")], GREEDY)[0].token_ids == want.token_ids


def test_other_errors_are_not_converted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        llm.engine_core.runner, "_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("shape"))
    )
    with pytest.raises(RuntimeError, match="shape"):
        llm.chat([user("Hi")], GREEDY)


def test_no_gradients_are_stored(llm: LLM) -> None:
    parameters: Sequence[torch.Tensor] = list(llm.model.parameters())
    llm.chat([user("Hi")], GREEDY)
    assert all(parameter.grad is None for parameter in parameters)


def test_with_tools_generation_stops_where_a_result_belongs(
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
    (call,) = parse_tool_calls(completion.text).tool_calls
    assert call.name == "tap"
    assert "made up" not in completion.text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"quantize": "int8"}, "quantize: got 'int8', but the model is in memory already"),
        ({"device": "cuda"}, "device: got 'cuda', but the model is in memory already"),
        ({"adapter": "/nope"}, "adapter: got '/nope', but the model is in memory already"),
        ({"max_model_len": 10**9}, "max_model_len: got 1000000000, must be from 2 to"),
        ({"max_model_len": -5}, "max_model_len: got -5, must be from 2 to"),
    ],
)
def test_arguments_that_do_not_apply_to_a_model_in_memory_are_refused(
    arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        LLM(random_model(tiny_config()), tiny_processor(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"quantize": "4bit"}, "quantize: got '4bit', must be int8, int4, or on an NVIDIA GPU fp8"),
        ({"dtype": "float16"}, "dtype: got 'float16', must be auto, float32 or bfloat16"),
        ({"device": 0}, "device: got 0, must be a name such as 'cpu' or 'cuda:1'"),
        ({"max_pixels": 1e6}, "max_pixels: got 1000000.0, must be a whole number of pixels"),
        ({"min_pixels": True}, "min_pixels: got True"),
        ({"adapter": 3}, "adapter: got 3, must be the folder of a PEFT adapter"),
        ({"video_preset": None}, "video_preset: got None, must be the name of a preset"),
        ({"limits": {}}, "limits: got {}, must be MediaLimits"),
        ({"max_model_len": "long"}, "max_model_len: got 'long', must be from 2 to"),
        (
            {"engine": {"max_num_seqs": 1}},
            "engine: got {'max_num_seqs': 1}, must be of class Engin",
        ),
        ({"dtype": torch.float16}, "dtype: got 'float16', must be auto, float32 or bfloat16; acti"),
        ({"torch_dtype": "auto"}, "torch_dtype: there is no such argument; write dtype"),
        ({"gpu_memory_utilization": 0.9}, "give engine=EngineConfig(kv_cache_tokens=N)"),
        ({"quantise": "int8"}, "quantise: there is no such argument; did you mean quantize?"),
        ({"model": 3}, "model: got 3, must be a folder, a repo id of the hub, or 'nano'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(
    arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError) as caught:
        LLM(**arguments)
    assert text in str(caught.value)


def test_a_model_in_memory_needs_a_processor_and_a_folder_has_its_own() -> None:
    with pytest.raises(InputError, match="a model in memory needs its Processor"):
        LLM(random_model(tiny_config()))
    with pytest.raises(InputError, match="processor: a folder has its own"):
        LLM("nano", tiny_processor())


def test_a_bad_encoder_cache_dir_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = EngineConfig(encoder_cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(InputError, match="vision embeddings"):
        LLM(random_model(tiny_config()), tiny_processor(), engine=config)


def test_a_dtype_of_torch_is_accepted() -> None:
    with LLM("nano", device="cpu", dtype=torch.float32, max_model_len=64) as llm:
        assert llm.model.dtype == torch.float32


def test_names_of_other_libraries_are_answered_by_every_call(llm: LLM) -> None:
    for call in (llm.chat, llm.stream, llm.prepare, llm.generate):
        with pytest.raises(InputError, match=r"messages: .*; give the messages as the first arg"):
            call(messages=[user("Hi")])
    with pytest.raises(InputError, match=r"response_format: .*; give grammar=Grammar"):
        SamplingParams(response_format={})  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"of this schema Grammar\.json_schema\(Shape\)"):
        llm.chat("Hi", grammar=Shape)


class Shape:
    """A class as pydantic's."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {}


def test_generate_takes_prompts_in_the_form_of_vllm(llm: LLM) -> None:
    image, text = random_image(), "<|vision_start|><|image_pad|><|vision_end|>Hi"
    (one,) = llm.generate({"prompt": text, "multi_modal_data": {"image": image}}, GREEDY)
    (same,) = llm.generate(llm.processor.from_text(text, [image]), GREEDY)
    assert one.token_ids == same.token_ids
    with pytest.raises(InputError, match=r"^prompts\[0\]: the text has 1 placeholders"):
        llm.generate([{"prompt": text}], GREEDY)


def test_a_call_that_other_processes_preempt_warns_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads, "_has_warned", False)
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads, "threads_spin", lambda: True)
    monkeypatch.setattr(threads, "_num_torch_threads", lambda: 2)
    monkeypatch.setattr(threads, "MIN_SECONDS", 0.0)
    counts = iter((100, 10**9))
    monkeypatch.setattr(threads, "_num_preemptions", lambda: next(counts))
    llm.chat("Hi", GREEDY)
    llm.chat("Hi", GREEDY)
    assert [r.getMessage()[:40] for r in caplog.records if r.name == "qwen2vl.threads"] == [
        "threads were preempted 999999900 times i"
    ]
