"""One owner of an engine at a time, synchronous streams, closing, and isolation of requests."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from qwen2vl.engine import LLM, AsyncLLM, Delta, SamplingParams
from qwen2vl.engine.request import Request
from qwen2vl.errors import EngineError, InputError
from tests.engine.test_llm import random_image, user
from tests.engine.test_runner import (
    CONVERSATIONS,
    GREEDY,
    assert_same_completion,
    new_llm,
    reference_completion,
)
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

# Every synchronous method that uses the engine, by its name in messages.
CALLS: dict[str, Callable[[LLM], Any]] = {
    "LLM.chat": lambda llm: llm.chat("Hi", GREEDY),
    "LLM.stream": lambda llm: llm.stream("Hi", GREEDY),
    "LLM.embed": lambda llm: llm.embed("Hi"),
    "LLM.generate": lambda llm: llm.generate("Hi", GREEDY),
    "LLM.generate_prepared": lambda llm: llm.generate_prepared(llm.prepare("Hi", GREEDY)),
    "LLM.step": lambda llm: llm.step(),
    "LLM.reset_caches": lambda llm: llm.reset_caches(),
    "LLM.close": lambda llm: llm.close(),
}


# Ownership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_while_an_async_llm_owns_the_llm(name: str) -> None:
    llm = new_llm()
    engine = AsyncLLM(llm)
    try:
        with pytest.raises(EngineError, match=f"^{name}: .*owned by an AsyncLLM; use its chat"):
            CALLS[name](llm)
        assert llm.prepare("Hi", GREEDY).prompt.input_ids
        assert engine.is_alive
    finally:
        engine.close()
    CALLS[name](llm)


def test_a_second_async_llm_is_refused() -> None:
    llm = new_llm()
    engine = AsyncLLM(llm)
    with pytest.raises(EngineError, match=r"^AsyncLLM: .*owned by an AsyncLLM; share that one"):
        AsyncLLM(llm)
    engine.close()
    AsyncLLM(llm).close()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("callback", ["on_delta", "on_step"])
def test_a_call_inside_a_callback_is_refused(callback: str, name: str) -> None:
    llm = new_llm()
    errors: list[EngineError] = []

    def call_again(*_: Any) -> None:
        with pytest.raises(EngineError) as caught:
            CALLS[name](llm)
        errors.append(caught.value)

    prepared = llm.prepare(CONVERSATIONS[0], GREEDY)
    (completion,) = llm.generate_prepared([prepared], **{callback: call_again})
    assert_same_completion(completion, reference_completion(0))
    text = f"{name}: called inside LLM.generate_prepared, by on_delta or on_step; call it after"
    assert errors and str(errors[0]).startswith(text)


def test_a_call_of_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    llm, errors = new_llm(), []

    def call_in_thread(_: Delta) -> None:
        def call() -> None:
            with pytest.raises(EngineError) as caught:
                llm.embed("Hi")
            errors.append(str(caught.value))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    (completion,) = llm.chat(CONVERSATIONS[0], GREEDY, on_delta=call_in_thread)
    assert_same_completion(completion, reference_completion(0))
    text = r"LLM.embed: this LLM is running LLM.chat in thread MainThread; wait for it"
    assert errors and errors[0].startswith(text)


def test_of_many_threads_each_is_refused_or_gets_its_own_answer() -> None:
    llm, barrier = new_llm(), threading.Barrier(8)
    results: list[Any] = []

    def call(index: int) -> None:
        barrier.wait()
        for _ in range(5):
            try:
                results.append((index, llm.chat(CONVERSATIONS[index], GREEDY)[0]))
            except EngineError as error:
                results.append((index, error))

    threads = [threading.Thread(target=call, args=(index % 3,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [(index, result) for index, result in results if not isinstance(result, EngineError)]
    assert len(results) == 40 and answers
    for index, completion in answers:
        assert_same_completion(completion, reference_completion(index))
    for _, error in results:
        if isinstance(error, EngineError):
            assert "LLM.chat: this LLM is running LLM.chat in thread" in str(error)
    assert not llm.has_unfinished_requests


def test_an_owner_that_was_lost_without_release_is_forgotten_with_its_requests() -> None:
    llm = new_llm()
    session = llm.engine.acquire("LLM.chat")
    (request,) = llm.create_requests(llm.processor(CONVERSATIONS[0]), GREEDY)
    session.add_request(request)
    core = llm.engine_core
    del session
    gc.collect()
    assert llm.engine_core is not core and not llm.has_unfinished_requests
    assert_same_completion(llm.chat(CONVERSATIONS[0], GREEDY)[0], reference_completion(0))


# Streams --------------------------------------------------------------------------------------


def test_a_stream_gives_deltas_and_completions() -> None:
    llm = new_llm()
    stream = llm.stream(CONVERSATIONS[1], GREEDY)
    deltas = list(stream)
    (completion,) = stream.completions()
    assert "".join(delta.text for delta in deltas) == completion.text
    assert deltas[-1].finish_reason == completion.finish_reason
    assert_same_completion(completion, reference_completion(1))
    assert list(stream) == []
    assert completion.seconds.process > 0


def test_a_stream_is_computed_while_it_is_read() -> None:
    llm = new_llm()
    deltas = iter(llm.stream("Hi", GREEDY))
    next(deltas)
    (request,) = llm.engine_core.scheduler.running
    assert len(request.output_token_ids) < GREEDY.max_tokens
    with pytest.raises(EngineError, match=r"LLM.chat: an LLM.stream of this thread is open; exha"):
        llm.chat("Hi", GREEDY)
    list(deltas)
    llm.chat("Hi", GREEDY)


def test_leaving_a_stream_early_aborts_it() -> None:
    llm = new_llm()
    stream = llm.stream("Hi", GREEDY)
    for _ in stream:
        break
    assert not llm.has_unfinished_requests
    with pytest.raises(EngineError, match="was aborted before it finished"):
        stream.completions()
    assert_same_completion(llm.chat(CONVERSATIONS[0], GREEDY)[0], reference_completion(0))


def test_a_stream_is_an_iterator_and_a_loop_continues_it() -> None:
    llm = new_llm()
    stream = llm.stream(CONVERSATIONS[1], GREEDY)
    deltas = [next(stream), next(stream), *stream]
    (completion,) = stream.completions()
    assert "".join(delta.text for delta in deltas) == completion.text
    assert_same_completion(completion, reference_completion(1))
    assert next(stream, None) is None
    stream.close()  # does nothing


def test_a_stream_begun_by_next_is_aborted_by_close_and_by_dropping_it() -> None:
    llm = new_llm()
    stream = llm.stream("Hi", GREEDY)
    next(stream)
    stream.close()
    for read in (next, list):
        with pytest.raises(EngineError, match="was aborted before it finished"):
            read(stream)
    stream = llm.stream("Hi", GREEDY)
    next(stream)
    gc.disable()  # the last reference ends it, without a collection
    try:
        del stream
        assert not llm.has_unfinished_requests
    finally:
        gc.enable()
    assert_same_completion(llm.chat(CONVERSATIONS[0], GREEDY)[0], reference_completion(0))


def test_a_stream_of_several_samples() -> None:
    llm = LLM(random_model(tiny_config()), tiny_processor())
    stream = llm.stream("Hi", temperature=2.0, top_k=0, n=3, seed=1, max_tokens=6)
    deltas = list(stream)
    for index, completion in enumerate(stream.completions()):
        assert "".join(d.text for d in deltas if d.index == index) == completion.text
    assert len(stream.completions()) == 3


# Closing --------------------------------------------------------------------------------------


def test_a_closed_llm_frees_the_weights_and_says_so() -> None:
    with LLM(random_model(tiny_config()), tiny_processor()) as llm:
        llm.chat(user("Hi", random_image()), GREEDY)
        weights = weakref.ref(llm.model.model.embed_tokens.weight)
        assert repr(llm).startswith("LLM('Qwen2VL', device=cpu, dtype=float32, max_model_len=")
    gc.collect()
    assert weights() is None
    assert repr(llm) == "LLM('Qwen2VL', closed)"
    llm.close()
    calls = {name: call for name, call in CALLS.items() if name != "LLM.close"}
    for name, call in calls.items():
        expected = "LLM.prepare" if name == "LLM.generate_prepared" else name
        with pytest.raises(EngineError, match=f"^{expected}: this LLM was closed; create a new"):
            call(llm)
    with pytest.raises(EngineError, match=r"LLM\.model: this LLM was closed"):
        print(llm.model)
    with pytest.raises(EngineError, match="AsyncLLM: this LLM was closed"):
        AsyncLLM(llm)


def test_closing_aborts_an_open_stream_of_the_thread() -> None:
    with new_llm() as llm:
        deltas = iter(llm.stream("Hi", GREEDY))
        next(deltas)
    with pytest.raises(EngineError, match=r"LLM\.stream: this LLM was closed"):
        next(deltas)


# Errors of one request ------------------------------------------------------------------------


def fail_with_a_bug(*_: Any) -> Any:
    raise KeyError("bug")


@pytest.mark.parametrize("part", ["sampler", "_detokenizer"])
def test_a_bug_in_one_request_ends_this_request_only(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = new_llm()
    create = llm.create_requests

    def create_requests(prompt: Any, params: Any, *, index: int = 0) -> list[Request]:
        requests = create(prompt, params, index=index)
        if index == 1:
            method = "sample" if part == "sampler" else "push"
            monkeypatch.setattr(getattr(requests[0], part), method, fail_with_a_bug)
        return requests

    monkeypatch.setattr(llm, "create_requests", create_requests)
    core = llm.engine_core
    one, bad, two = llm.chat([CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[5]], GREEDY)
    assert llm.engine_core is core and core.scheduler.pool.num_used_blocks == 0
    assert_same_completion(one, reference_completion(0))
    assert_same_completion(two, reference_completion(5))
    assert bad.finish_reason == "error" and "in this request only" in (bad.error or "")
    assert "KeyError: 'bug'" in (bad.error or "")


def test_a_bug_of_the_draft_proposer_costs_drafts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = new_llm(num_speculative_tokens=4)
    drafter = llm.engine_core.scheduler.drafter
    monkeypatch.setattr(drafter, "propose", fail_with_a_bug)
    assert_same_completion(llm.chat(CONVERSATIONS[1], GREEDY)[0], reference_completion(1))


def test_errors_of_a_list_name_the_index() -> None:
    llm = new_llm()
    bad = {"role": "user", "content": [{"type": "image", "image": "no-such-file.png"}]}
    with pytest.raises(InputError, match=r"^conversations\[1\]: .*no-such-file\.png"):
        llm.chat(["Hi", [bad]], GREEDY)
    with pytest.raises(InputError, match=r"^prompts\[1\]: the text has 1 placeholder"):
        llm.generate(["Hi", "<|image_pad|>"], GREEDY)
    with pytest.raises(InputError, match=r"^prompts: the text has 1 placeholder"):
        llm.generate("<|image_pad|>", GREEDY)
    with pytest.raises(InputError, match=r"^(?!conversations)"):
        llm.chat([bad], GREEDY)


def test_forms_give_the_answers_of_messages() -> None:
    llm, image = new_llm(), random_image()
    (want,) = llm.chat([user("Hi", image)], GREEDY)
    for form in (user("Hi", image), [user("Hi", image)]):
        assert llm.chat(form, GREEDY)[0].token_ids == want.token_ids
    keywords = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    (got,) = llm.chat("Hi", images=image, **keywords)
    assert got.token_ids == want.token_ids
    assert got.cached_tokens > 0
    hi, again = llm.chat(["Hi", "Hi"], SamplingParams(**keywords))
    assert hi.token_ids == again.token_ids == reference_completion(0).token_ids
    assert llm.embed("Hi", images=[image]).equal(llm.embed([user("Hi", image)]))
    assert repr(got) == f"Completion({got.text!r}, 'length', {got.prompt_tokens} + 8 tokens)"
