"""Answers of a given form, through the whole engine: alone, together, drafted and streamed."""

from __future__ import annotations

import json
import re

import pytest

from qwen2vl.engine import LLM, EngineConfig, Grammar, SamplingParams
from qwen2vl.engine.sampling import grammar_matcher
from qwen2vl.errors import InputError
from tests.parity.oracle import random_model
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


def build(**options: int) -> LLM:
    model = random_model(tiny_config(tie_word_embeddings=False))
    return LLM.of(model, tiny_processor(), engine=EngineConfig(**options))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def obeying(grammar: Grammar, **options: float) -> SamplingParams:
    return SamplingParams(grammar=grammar, temperature=options.get("temperature", 0), seed=3)


def test_an_answer_ends_where_its_grammar_ends(llm: LLM) -> None:
    (answer,) = llm.chat(user("Well?"), obeying(Grammar.regex("[a-z]{3}[0-9]{2}")))
    assert re.fullmatch("[a-z]{3}[0-9]{2}", answer.text)
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) == 6  # the end token, which alone may follow, is one of them


def test_json_by_a_random_model(llm: LLM) -> None:
    params = obeying(Grammar.json_schema(PERSON), temperature=1.0)
    for answer in llm.chat([user(f"Who is {i}?") for i in range(4)], [params] * 4):
        value = json.loads(answer.text)
        assert set(value) == {"name", "age"}
        assert 0 <= value["age"] <= 120


def test_neighbors_with_and_without_a_grammar_do_not_mind_each_other(llm: LLM) -> None:
    free = SamplingParams(temperature=0, max_tokens=12)
    grammars = [Grammar.boxes(), Grammar.choice(["yes", "no"]), Grammar.regex("x{7}|[yz]{3}")]
    wishes = [free, *(obeying(grammar) for grammar in grammars), free]
    asked = [user(f"Number {i}?") for i in range(len(wishes))]
    together = llm.chat(asked, wishes)
    alone = [llm.chat(one, wish)[0] for one, wish in zip(asked, wishes, strict=True)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert together[2].text in ("yes", "no")


def test_drafts_change_nothing_under_a_grammar() -> None:
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 6, "maxItems": 6}
    params = obeying(Grammar.json_schema(schema), temperature=1.0)
    plain, drafted = build(num_drafts=0), build(num_drafts=4)
    want, got = (llm.chat(user("Colors?"), params)[0] for llm in (plain, drafted))
    assert got.token_ids == want.token_ids
    assert len(json.loads(got.text)) == 6


def test_samples_of_one_prompt_each_follow_the_grammar(llm: LLM) -> None:
    params = SamplingParams(grammar=Grammar.regex("[a-z]{4}"), temperature=1.0, seed=1, n=4)
    texts = [answer.text for answer in llm.chat(user("Say"), params)]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{4}", text) for text in texts)


def test_a_grammar_that_cannot_be_obeyed_is_refused_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(InputError, match="JSON schema: Invalid type: strin"):
        llm.chat(user("Hi"), obeying(Grammar.json_schema({"type": "strin"})))
    assert not llm.scheduler.has_work


def test_one_that_becomes_too_costly_fails_alone(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setitem(grammar_matcher._LIMITS, "max_lexer_states", 60)
    free = SamplingParams(temperature=0, max_tokens=12)
    costly = SamplingParams(grammar=Grammar.regex("(.*a.{12})?"), temperature=1.0, seed=1)
    fine, failed = llm.chat([user("A"), user("B")], [free, costly])
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "grammar cannot be followed further" in failed.error
    assert fine.token_ids == llm.chat(user("A"), free)[0].token_ids


def test_nano_answers_in_json() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 20}}}
    schema |= {"required": ["text"], "additionalProperties": False}
    params = SamplingParams(grammar=Grammar.json_schema(schema), max_tokens=60)
    (answer,) = LLM("nano").chat(user("Hello!"), params)
    assert set(json.loads(answer.text)) == {"text"}
