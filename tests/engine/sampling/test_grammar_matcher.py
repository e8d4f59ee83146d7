"""Grammars at work on nano's tokenizer and the official one: every walk stays in the language."""

from __future__ import annotations

import json
import random
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.grammar_matcher import GrammarCompiler, Matcher
from qwen2vl.engine.sampling.sampler import Rule, Sampler
from qwen2vl.errors import InputError
from qwen2vl.grounding import Box, parse
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import END_OF_TEXT, IM_END
from qwen2vl.weights import find

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "b\u00e9b\u00e9"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
BOX = re.compile(
    r"(<\|object_ref_start\|>[^\n]{1,200}<\|object_ref_end\|>)?"
    r"<\|box_start\|>\(\d{1,3},\d{1,3}\),\(\d{1,3},\d{1,3}\)<\|box_end\|>"
)


@cache
def nano() -> Tokenizer:
    return Tokenizer.from_folder(find("nano"))


@cache
def compiler_of(folder: Path | None) -> GrammarCompiler:
    """Compile for a folder's tokenizer, with 40 rows of logits more than tokens."""
    tokenizer = nano() if folder is None else Tokenizer.from_folder(folder)
    return GrammarCompiler(
        tokenizer,
        end_ids=[tokenizer.id_of(IM_END), tokenizer.id_of(END_OF_TEXT)],
        vocab_size=len(tokenizer) + 40,
    )


def start(grammar: Grammar) -> Matcher:
    return compiler_of(None).start(grammar)


def allowed(matcher: Matcher) -> list[int]:
    return matcher.mask().nonzero()[:, 0].tolist()


def walk(tokenizer: Tokenizer, matcher: Matcher, seed: int, most: int = 400) -> str | None:
    """Choose at random among what is allowed; the text of a finished answer, else None."""
    draw = random.Random(seed)
    ends = {tokenizer.id_of(IM_END), tokenizer.id_of(END_OF_TEXT)}
    ids: list[int] = []
    while not matcher.finished and len(ids) < most:
        choices = allowed(matcher)
        assert choices
        token = draw.choice(choices)
        matcher.accept(token)
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids) if matcher.finished else None


def obeys(grammar: Grammar, text: str) -> bool:
    if grammar.kind == "regex":
        return re.fullmatch(grammar.text, text) is not None
    if grammar == Grammar.boxes():
        return all(BOX.fullmatch(line) for line in re.split(r"(?<=box_end\|>)\n?(?=.)", text))
    if grammar.kind == "lark":
        return text in ("yes", "yes, but", 'a "quoted"\nline', "e\u0301<|im_end|>")
    value = json.loads(text)
    assert json.dumps(value, ensure_ascii=False) == text or "\\" in text
    return (
        set(value) <= set(PERSON["properties"])  # type: ignore[arg-type]
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 120
        and set(value.get("tags", [])) <= {"red", "b\u00e9b\u00e9"}
    )


GRAMMARS = [
    Grammar.json_schema(PERSON),
    Grammar.regex("[0-9]{3}-[a-f]{2,4}(\u4f60\u597d|\u00e9)?"),
    Grammar.choice(["yes", "yes, but", 'a "quoted"\nline', "e\u0301<|im_end|>"]),
    Grammar.boxes(),
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.kind)
def test_every_random_walk_obeys(grammar: Grammar) -> None:
    texts = [walk(nano(), start(grammar), seed) for seed in range(40)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 10
    assert all(obeys(grammar, text) for text in whole)
    assert len(set(whole)) > 1


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.kind)
def test_every_random_walk_obeys_with_the_official_tokenizer(
    grammar: Grammar, official_tokenizer_dir: Path
) -> None:
    compiler = compiler_of(official_tokenizer_dir)
    texts = [walk(compiler._tokenizer, compiler.start(grammar), seed) for seed in range(12)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 3
    assert all(obeys(grammar, text) for text in whole)


def test_rows_of_the_logits_that_are_no_tokens_are_never_allowed() -> None:
    mask_V = start(Grammar.regex("(?s:.)*")).mask()
    assert len(mask_V) == len(nano()) + 40
    assert not mask_V[len(nano()) :].any()
    assert mask_V[:256].sum() > 128


def test_an_end_token_comes_when_the_answer_may_end_and_not_before() -> None:
    matcher = start(Grammar.regex("ab?"))
    (a,), (b,) = nano().encode_text("a"), nano().encode_text("b")
    ends = sorted((nano().id_of(IM_END), nano().id_of(END_OF_TEXT)))
    assert allowed(matcher) == [a]
    matcher.accept(a)
    assert not matcher.finished
    assert allowed(matcher) == sorted([b, *ends])
    matcher.accept(b)
    assert matcher.finished
    assert allowed(matcher) == ends
    matcher.accept(ends[0])
    assert matcher.finished
    assert allowed(matcher) == ends


def test_special_tokens_match_only_where_a_grammar_names_them() -> None:
    anything = start(Grammar.regex("(?s:.)*"))
    specials = set(nano().special_ids.values()) - {nano().id_of(IM_END), nano().id_of(END_OF_TEXT)}
    assert not specials & set(allowed(anything))
    starts = {nano().id_of(t) for t in ("<|box_start|>", "<|object_ref_start|>")}
    assert set(allowed(start(Grammar.boxes()))) == starts


def test_boxes_are_what_grounding_reads() -> None:
    box = Box(0, 20, 1, 999)
    matcher = start(Grammar.boxes())
    text = f"<|object_ref_start|>the < cat<|object_ref_end|>{box.to_text()}\n{box.to_text()}"
    for token in nano().encode_text(text):
        assert matcher.mask()[token]
        matcher.accept(token)
    assert [(g.shape, g.phrase) for g in parse(text)] == [(box, "the < cat")] * 2
    assert nano().id_of(IM_END) in allowed(matcher)


@pytest.mark.parametrize("number", ["1000", "01", "-1", "1.5", ""])
def test_numbers_of_boxes_are_whole_and_below_a_thousand(number: str) -> None:
    matcher = start(Grammar.boxes())
    ids = nano().encode_text(f"<|box_start|>({number},5)")
    for token in ids:
        if not matcher.mask()[token]:
            return
        matcher.accept(token)
    pytest.fail(f"({number},5) was let through")


def test_forced_tokens_are_allowed_one_after_the_other() -> None:
    matcher = start(Grammar.json_schema({"const": {"answer": "yes", "sure": True}}))
    forced = matcher.forced()
    assert nano().decode(forced) == '{"answer": "yes", "sure": true}'
    for token in forced:
        assert matcher.mask()[token]
        matcher.accept(token)
    assert matcher.finished


def test_nothing_is_forced_where_there_is_a_choice() -> None:
    assert start(Grammar.choice(["yes", "no"])).forced() == []


def test_answers_with_the_same_grammar_go_their_own_ways() -> None:
    one, two = start(Grammar.choice(["yes", "no"])), start(Grammar.choice(["yes", "no"]))
    for token in nano().encode_text("yes"):
        one.accept(token)
    assert one.finished
    assert not two.finished
    assert {nano().decode([t]) for t in allowed(two)} == {"y", "n"}


def test_compiled_grammars_are_remembered_and_forgotten() -> None:
    compiler = compiler_of(None)
    for i in range(40):
        compiler.start(Grammar.regex(f"a{{{i + 1}}}"))
    assert len(compiler._compiled) == 32
    assert Grammar.regex("a{40}") in compiler._compiled
    assert Grammar.regex("a{1}") not in compiler._compiled


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "strin"}), "JSON schema: Invalid type: strin"),
        (Grammar.json_schema({"format": "banana"}), "JSON schema: Unknown format: banana"),
        (
            Grammar.json_schema({"minimum": 5, "maximum": 3, "type": "integer"}),
            "JSON schema: Unsatisfiable schema",
        ),
        (Grammar.json_schema({"enum": []}), "JSON schema: Unsatisfiable schema"),
        (Grammar.json_schema({"$ref": "#/$defs/a"}), "JSON schema: Pointer '/$defs/a' does not"),
        (Grammar.json_schema({"$ref": "http://a.example/b"}), "JSON schema: Resource 'http"),
        (
            Grammar.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
            "JSON schema: no text at all would be allowed",
        ),
        (
            Grammar.json_schema(
                {
                    "$ref": "#/$defs/a",
                    "$defs": {
                        "a": {"properties": {"n": {"$ref": "#/$defs/a"}}, "required": ["n"]}
                        | {"additionalProperties": False, "type": "object"}
                    },
                }
            ),
            "JSON schema: it dictates more than 16,384 bytes before anything can be chosen",
        ),
        (Grammar.regex("("), "regex: at 1(8): invalid regex"),
        (Grammar.regex("(?=a)b"), "regex: at 1(8): invalid regex"),
        (Grammar.regex(r"(a)\1"), "regex: at 1(8): invalid regex"),
        (Grammar.regex(r"[^\x00-\U0010FFFF]"), "regex: no text at all would be allowed"),
        (Grammar.regex("(a{9999}){9999}"), "regex: "),
        (Grammar.lark("start: x"), "grammar: at 1(8): unknown name"),
        (Grammar.lark("start: <|nope|>"), "grammar: at 1(8): unknown special token"),
        (Grammar.lark('start: start "a"'), "grammar: no text at all would be allowed"),
    ],
)
def test_grammars_that_cannot_be_obeyed(grammar: Grammar, words: str) -> None:
    with pytest.raises(InputError) as caught:
        start(grammar)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_refused_grammar_is_refused_again_and_others_go_on() -> None:
    for _ in range(2):
        with pytest.raises(InputError):
            start(Grammar.regex("("))
    assert not start(Grammar.regex("a")).finished


def test_what_becomes_too_costly_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(nano(), end_ids=[nano().id_of(IM_END)], vocab_size=len(nano()))
    monkeypatch.setitem(
        sys.modules["qwen2vl.engine.sampling.grammar_matcher"]._LIMITS, "max_lexer_states", 60
    )
    matcher = compiler.start(Grammar.regex("(.*a.{12})?"))
    text = "abacabaabacbacabacbbaacabc" * 4
    with pytest.raises(InputError, match=r"grammar cannot be followed further: .*; simplify it"):
        follow(matcher, nano().encode_text(text))


def follow(matcher: Matcher, ids: list[int]) -> None:
    for token in ids:
        matcher.mask()
        matcher.accept(token)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(nano(), end_ids=[0], vocab_size=len(nano()))
    with pytest.raises(InputError, match=r"needs llguidance.*pip install 'qwen2vl\[grammar\]'"):
        compiler.start(Grammar.regex("a"))


# In a sampler ----------------------------------------------------------------------------------


def sampler(grammar: Grammar, temperature: float = 0.0, **options: Any) -> Sampler:
    return Sampler(
        Rule(temperature=temperature, top_k=50, top_p=1.0),
        [],
        vocab_size=len(nano()) + 40,
        device=torch.device("cpu"),
        matcher=start(grammar),
        **options,
    )


def write(chooser: Sampler, seed: int, most: int = 300) -> str:
    """Sample from random scores until the grammar is through."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not chooser.finished and len(ids) < most:
        logits_V = torch.randn(len(nano()) + 40, generator=generator)
        ids.append(chooser.sample(logits_V)[0])
    assert chooser.finished
    return nano().decode(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_with_a_grammar_obeys_it(temperature: float) -> None:
    grammar = Grammar.regex("[a-z]{4}[0-9]{2}")
    texts = {write(sampler(grammar, temperature, seed=i), seed=i) for i in range(8)}
    assert len(texts) > 4
    assert all(re.fullmatch("[a-z]{4}[0-9]{2}", text) for text in texts)


def test_a_sampler_without_a_grammar_is_never_finished() -> None:
    chooser = Sampler(
        Rule(temperature=0.0, top_k=50, top_p=1.0), [], vocab_size=9, device=torch.device("cpu")
    )
    chooser.sample(torch.randn(9))
    assert not chooser.finished
    assert chooser.forced() == []


def test_what_is_forced_may_be_fed_ahead_and_verified() -> None:
    chooser = sampler(Grammar.regex("[ab]: dictated"))
    chooser.sample(torch.randn(len(nano()) + 40))
    forced = chooser.forced()
    assert nano().decode(forced) == ": dictated"
    assert [chooser.sample(torch.randn(len(nano()) + 40))[0] for _ in forced] == forced
    assert chooser.finished


def test_logprobs_are_the_models_own_under_a_grammar_too() -> None:
    logits_V = torch.randn(len(nano()) + 40)
    token, report = sampler(Grammar.regex("[0-9]"), num_logprobs=1).sample(logits_V)
    assert report is not None
    assert report.logprob == pytest.approx(logits_V.log_softmax(-1)[token].item())
    assert report.top[0][0] == logits_V.argmax().item()
