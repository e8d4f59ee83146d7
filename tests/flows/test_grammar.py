"""Structured output through the whole engine: alone, batched, with draft tokens, with samples."""

from __future__ import annotations

import json
import re

import pytest

from qwen2vl.engine import LLM, EngineConfig, Grammar, SamplingParams
from qwen2vl.engine.sampling import grammar_matcher
from qwen2vl.errors import InputError
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def new_llm(**options: int) -> LLM:
    model = random_model(tiny_config(tie_word_embeddings=False))
    return LLM(model, tiny_processor(), engine=EngineConfig(**options))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return new_llm()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def constrained_by(grammar: Grammar, **options: float) -> SamplingParams:
    return SamplingParams(grammar=grammar, temperature=options.get("temperature", 0), seed=3)


def test_generation_stops_at_the_end_of_the_grammar(llm: LLM) -> None:
    (completion,) = llm.chat(user("Well?"), constrained_by(Grammar.regex("[a-z]{3}[0-9]{2}")))
    assert re.fullmatch("[a-z]{3}[0-9]{2}", completion.text)
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) == 6  # including the end token, the only one that may follow


def test_json_by_a_random_model(llm: LLM) -> None:
    params = constrained_by(Grammar.json_schema(PERSON), temperature=1.0)
    for completion in llm.chat([user(f"Who is {i}?") for i in range(4)], [params] * 4):
        value = json.loads(completion.text)
        assert set(value) == {"name", "age"}
        assert 0 <= value["age"] <= 120


def test_requests_with_and_without_a_grammar_are_independent(llm: LLM) -> None:
    unconstrained = SamplingParams(temperature=0, max_tokens=12)
    grammars = [Grammar.boxes(), Grammar.choice(["yes", "no"]), Grammar.regex("x{7}|[yz]{3}")]
    params = [unconstrained, *(constrained_by(grammar) for grammar in grammars), unconstrained]
    conversations = [user(f"Number {i}?") for i in range(len(params))]
    together = llm.chat(conversations, params)
    alone = [
        llm.chat(conversation, own)[0]
        for conversation, own in zip(conversations, params, strict=True)
    ]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert together[2].text in ("yes", "no")


def test_draft_tokens_do_not_change_the_output_under_a_grammar() -> None:
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 6, "maxItems": 6}
    params = constrained_by(Grammar.json_schema(schema), temperature=1.0)
    plain, speculative = new_llm(num_speculative_tokens=0), new_llm(num_speculative_tokens=4)
    want, got = (llm.chat(user("Colors?"), params)[0] for llm in (plain, speculative))
    assert got.token_ids == want.token_ids
    assert len(json.loads(got.text)) == 6


def test_all_samples_of_a_prompt_follow_the_grammar(llm: LLM) -> None:
    params = SamplingParams(grammar=Grammar.regex("[a-z]{4}"), temperature=1.0, seed=1, n=4)
    texts = [completion.text for completion in llm.chat(user("Say"), params)]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{4}", text) for text in texts)


def test_an_invalid_grammar_is_rejected_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(InputError, match="regex: unclosed character class at character 3"):
        llm.chat(user("Hi"), constrained_by(Grammar.regex("ab[")))
    assert not llm.engine_core.scheduler.has_unfinished_requests


def test_a_grammar_that_becomes_too_costly_fails_alone(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    monkeypatch.setitem(grammar_matcher._LIMITS, "max_lexer_states", 60)
    unconstrained = SamplingParams(temperature=0, max_tokens=12)
    costly = SamplingParams(grammar=Grammar.regex("(.*a.{12})?"), temperature=1.0, seed=1)
    fine, failed = llm.chat([user("A"), user("B")], [unconstrained, costly])
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "grammar cannot be followed further" in failed.error
    assert fine.token_ids == llm.chat(user("A"), unconstrained)[0].token_ids


def test_nano_generates_json() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 20}}}
    schema |= {"required": ["text"], "additionalProperties": False}
    params = SamplingParams(grammar=Grammar.json_schema(schema), max_tokens=60)
    (completion,) = LLM("nano").chat(user("Hello!"), params)
    assert set(json.loads(completion.text)) == {"text"}
