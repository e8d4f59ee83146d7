"""Grammar matcher: random outputs are in the language, with nano's and the official tokenizer."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.engine.sampling.grammar import Grammar
from qwen2vl.engine.sampling.grammar_matcher import GrammarCompiler, GrammarMatcher
from qwen2vl.engine.sampling.sampler import ResolvedSamplingParams, Sampler
from qwen2vl.errors import InputError
from qwen2vl.grounding import Box, parse
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import END_OF_TEXT, IM_END
from qwen2vl.weights import resolve_model

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
    return Tokenizer.from_folder(resolve_model("nano"))


@cache
def compiler_of(folder: Path | None) -> GrammarCompiler:
    """Return the compiler of a folder's tokenizer, with a vocabulary padded by 40."""
    tokenizer = nano() if folder is None else Tokenizer.from_folder(folder)
    return GrammarCompiler(
        tokenizer,
        end_ids=[tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)],
        vocab_size=len(tokenizer) + 40,
    )


def matcher_of(grammar: Grammar) -> GrammarMatcher:
    return compiler_of(None).create_matcher(grammar)


def allowed_tokens(matcher: GrammarMatcher) -> list[int]:
    return matcher.token_mask().nonzero()[:, 0].tolist()


def random_output(
    tokenizer: Tokenizer, matcher: GrammarMatcher, seed: int, max_tokens: int = 400
) -> str | None:
    """Sample at random among the allowed tokens; return the text if complete, else None."""
    rng = random.Random(seed)
    ends = {tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)}
    ids: list[int] = []
    while not matcher.is_finished and len(ids) < max_tokens:
        choices = allowed_tokens(matcher)
        assert choices
        token = rng.choice(choices)
        matcher.accept_token(token)
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids) if matcher.is_finished else None


def is_accepted(grammar: Grammar, text: str) -> bool:
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
def test_every_random_output_is_accepted(grammar: Grammar) -> None:
    texts = [random_output(nano(), matcher_of(grammar), seed) for seed in range(40)]
    complete = [text for text in texts if text is not None]
    assert len(complete) >= 10
    assert all(is_accepted(grammar, text) for text in complete)
    assert len(set(complete)) > 1


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.kind)
def test_every_random_output_is_accepted_with_the_official_tokenizer(
    grammar: Grammar, official_tokenizer_dir: Path
) -> None:
    compiler = compiler_of(official_tokenizer_dir)
    texts = [
        random_output(compiler._tokenizer, compiler.create_matcher(grammar), seed)
        for seed in range(12)
    ]
    complete = [text for text in texts if text is not None]
    assert len(complete) >= 3
    assert all(is_accepted(grammar, text) for text in complete)


def test_padding_of_the_vocabulary_is_never_allowed() -> None:
    mask_V = matcher_of(Grammar.regex("(?s:.)*")).token_mask()
    assert len(mask_V) == len(nano()) + 40
    assert not mask_V[len(nano()) :].any()
    assert mask_V[:256].sum() > 128


def test_end_tokens_are_allowed_only_when_the_output_may_end() -> None:
    matcher = matcher_of(Grammar.regex("ab?"))
    (a,), (b,) = nano().encode_text("a"), nano().encode_text("b")
    ends = sorted((nano().token_to_id(IM_END), nano().token_to_id(END_OF_TEXT)))
    assert allowed_tokens(matcher) == [a]
    matcher.accept_token(a)
    assert not matcher.is_finished
    assert allowed_tokens(matcher) == sorted([b, *ends])
    matcher.accept_token(b)
    assert matcher.is_finished
    assert allowed_tokens(matcher) == ends
    matcher.accept_token(ends[0])
    assert matcher.is_finished
    assert allowed_tokens(matcher) == ends


def test_special_tokens_match_only_where_a_grammar_names_them() -> None:
    any_text = matcher_of(Grammar.regex("(?s:.)*"))
    special_tokens = set(nano().special_ids.values()) - {
        nano().token_to_id(IM_END),
        nano().token_to_id(END_OF_TEXT),
    }
    assert not special_tokens & set(allowed_tokens(any_text))
    start_tokens = {nano().token_to_id(t) for t in ("<|box_start|>", "<|object_ref_start|>")}
    assert set(allowed_tokens(matcher_of(Grammar.boxes()))) == start_tokens


def test_a_grammar_may_name_the_added_tokens_of_a_fine_tune(tmp_path: Path) -> None:
    shutil.copytree(resolve_model("nano"), tmp_path / "model")
    extra = json.dumps({"additional_special_tokens": ["<|point|>"]})
    (tmp_path / "model" / "special_tokens_map.json").write_text(extra)
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    compiler = GrammarCompiler(
        tokenizer, end_ids=[tokenizer.token_to_id(IM_END)], vocab_size=len(tokenizer)
    )
    matcher = compiler.create_matcher(Grammar.lark("start: <|point|> /[0-9]/"))
    assert matcher.jump_forward_tokens() == [tokenizer.token_to_id("<|point|>")]
    any_text = compiler.create_matcher(Grammar.regex("(?s:.)*"))
    assert not any_text.token_mask()[tokenizer.token_to_id("<|point|>")]


def test_boxes_can_be_parsed_by_grounding() -> None:
    box = Box(0, 20, 1, 999)
    matcher = matcher_of(Grammar.boxes())
    text = f"<|object_ref_start|>the < cat<|object_ref_end|>{box.to_text()}\n{box.to_text()}"
    for token in nano().encode_text(text):
        assert matcher.token_mask()[token]
        matcher.accept_token(token)
    assert [(g.shape, g.phrase) for g in parse(text)] == [(box, "the < cat")] * 2
    assert nano().token_to_id(IM_END) in allowed_tokens(matcher)


@pytest.mark.parametrize("number", ["1000", "01", "-1", "1.5", ""])
def test_box_coordinates_are_integers_below_1000(number: str) -> None:
    matcher = matcher_of(Grammar.boxes())
    ids = nano().encode_text(f"<|box_start|>({number},5)")
    for token in ids:
        if not matcher.token_mask()[token]:
            return
        matcher.accept_token(token)
    pytest.fail(f"({number},5) was allowed")


def test_jump_forward_tokens_are_allowed_in_sequence() -> None:
    matcher = matcher_of(Grammar.json_schema({"const": {"answer": "yes", "sure": True}}))
    forced_tokens = matcher.jump_forward_tokens()
    assert nano().decode(forced_tokens) == '{"answer": "yes", "sure": true}'
    for token in forced_tokens:
        assert matcher.token_mask()[token]
        matcher.accept_token(token)
    assert matcher.is_finished


def test_no_jump_forward_tokens_at_a_choice() -> None:
    assert matcher_of(Grammar.choice(["yes", "no"])).jump_forward_tokens() == []


def test_matchers_of_one_grammar_are_independent() -> None:
    first, second = (
        matcher_of(Grammar.choice(["yes", "no"])),
        matcher_of(Grammar.choice(["yes", "no"])),
    )
    for token in nano().encode_text("yes"):
        first.accept_token(token)
    assert first.is_finished
    assert not second.is_finished
    assert {nano().decode([t]) for t in allowed_tokens(second)} == {"y", "n"}


def test_compiled_grammars_are_cached_lru() -> None:
    compiler = compiler_of(None)
    for i in range(40):
        compiler.create_matcher(Grammar.regex(f"a{{{i + 1}}}"))
    assert len(compiler._compiled) == 32
    assert Grammar.regex("a{40}") in compiler._compiled
    assert Grammar.regex("a{1}") not in compiler._compiled


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (
            Grammar.json_schema({"minimum": 5, "maximum": 3, "type": "integer"}),
            "JSON schema: no value is valid: minimum (5) is greater than maximum (3); loosen",
        ),
        (
            Grammar.json_schema({"items": {"type": "string", "pattern": "^a["}}),
            "JSON schema: #/items/pattern: unclosed character class at character 3 of the regex",
        ),
        (
            Grammar.json_schema({"patternProperties": {"(?=a)b": {}}}),
            "JSON schema: #/patternProperties: look-around, including look-ahead and look-behind",
        ),
        (
            Grammar.json_schema({"patternProperties": {"^a": {}, "b$": {}}}),
            "JSON schema: patternProperties '^a' and 'b$' may match the same name; write them as",
        ),
        (
            Grammar.json_schema({"type": "string", "pattern": "^a", "format": "date"}),
            "JSON schema: no string fits pattern, format, length and const or enum together",
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
            "JSON schema: it forces more than 16,384 bytes before anything can be chosen",
        ),
        (Grammar.regex("["), "regex: unclosed character class at character 1, '['"),
        (Grammar.regex("a/\n("), "regex: unclosed group at character 4, '('"),
        (Grammar.regex("(?=a)b"), "regex: look-around, including look-ahead and look-behind, is"),
        (Grammar.regex(r"(a)\1"), r"regex: backreferences are not supported at character 4, '\\1'"),
        (Grammar.regex(r"a\bc"), r"regex: \b is not supported here: word boundaries are nowhere"),
        (
            Grammar.json_schema({"type": "string", "pattern": "a$b"}),
            "JSON schema: #/pattern: $ is not supported here",
        ),
        (Grammar.regex(r"[^\x00-\U0010FFFF]"), "regex: no text at all would be allowed"),
        (Grammar.regex("(a{9999}){9999}"), "regex: it forces more than 16,384 bytes"),
        (Grammar.lark("start: x"), 'grammar: line 1, column 8: "x" is not defined; add a rule'),
        (Grammar.lark("start: a\na: /[/"), "grammar: line 2, column 4: unclosed character class"),
        (Grammar.lark('start: "a'), "grammar: line 1, column 10: not a token of Lark's syntax"),
        (
            Grammar.lark('# GBNF\nroot ::= item+ | \'x\'\n  | [a-z] "::="\nitem ::= "a"'),
            "grammar: the grammar is read in Lark syntax, and EBNF with ::= is not; write "
            'start: item+ | "x" | /[a-z]/ "::=" and the other rules alike',
        ),
        (
            Grammar.lark("<select-statement> ::= " + "<column> " * 50),
            "grammar: the grammar is read in Lark syntax, and EBNF with ::= is not; write "
            "select_statement: column column",
        ),
        (Grammar.lark('start: "a ::= b" b'), 'grammar: line 1, column 8: "b" is not defined'),
        (Grammar.lark("start"), "grammar: line 1, column 6: expected ':', found"),
        (Grammar.lark('foo: "a"'), "grammar: no rule is named start; rename the rule"),
        (
            Grammar.lark("start: <|nope|>"),
            'grammar: line 1, column 8: "<|nope|>" is not a special token of this model',
        ),
        (Grammar.lark('start: start "a"'), "grammar: no text at all would be allowed"),
    ],
)
def test_invalid_and_unsatisfiable_grammars_are_rejected(grammar: Grammar, message: str) -> None:
    with pytest.raises(InputError) as caught:
        matcher_of(grammar)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_rejected_grammar_is_rejected_again_and_others_still_compile() -> None:
    for _ in range(2):
        with pytest.raises(InputError):
            matcher_of(Grammar.regex("("))
    assert not matcher_of(Grammar.regex("a")).is_finished


def test_exceeding_the_cost_limits_in_a_step_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(nano(), end_ids=[nano().token_to_id(IM_END)], vocab_size=len(nano()))
    monkeypatch.setitem(
        sys.modules["qwen2vl.engine.sampling.grammar_matcher"]._LIMITS, "max_lexer_states", 60
    )
    matcher = compiler.create_matcher(Grammar.regex("(.*a.{12})?"))
    text = "abacabaabacbacabacbbaacabc" * 4
    with pytest.raises(InputError, match=r"grammar cannot be followed further: .*; simplify it"):
        follow(matcher, nano().encode_text(text))


def follow(matcher: GrammarMatcher, ids: list[int]) -> None:
    for token in ids:
        matcher.token_mask()
        matcher.accept_token(token)


def test_without_llguidance_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(nano(), end_ids=[0], vocab_size=len(nano()))
    with pytest.raises(InputError, match=r"needs llguidance.*pip install 'qwen2vl\[grammar\]'"):
        compiler.create_matcher(Grammar.regex("a"))


# In a sampler ----------------------------------------------------------------------------------


def sampler(grammar: Grammar, temperature: float = 0.0, **options: Any) -> Sampler:
    return Sampler(
        ResolvedSamplingParams(temperature=temperature, top_k=50, top_p=1.0),
        [],
        vocab_size=len(nano()) + 40,
        device=torch.device("cpu"),
        matcher=matcher_of(grammar),
        **options,
    )


def sample_output(sampler_under_test: Sampler, seed: int, max_tokens: int = 300) -> str:
    """Sample from random logits until the grammar is complete."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while not sampler_under_test.is_finished and len(ids) < max_tokens:
        logits_V = torch.randn(len(nano()) + 40, generator=generator)
        ids.append(sampler_under_test.sample(logits_V)[0])
    assert sampler_under_test.is_finished
    return nano().decode(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_with_a_grammar_follows_it(temperature: float) -> None:
    grammar = Grammar.regex("[a-z]{4}[0-9]{2}")
    texts = {sample_output(sampler(grammar, temperature, seed=i), seed=i) for i in range(8)}
    assert len(texts) > 4
    assert all(re.fullmatch("[a-z]{4}[0-9]{2}", text) for text in texts)


def test_a_sampler_without_a_grammar_is_never_finished() -> None:
    sampler_under_test = Sampler(
        ResolvedSamplingParams(temperature=0.0, top_k=50, top_p=1.0),
        [],
        vocab_size=9,
        device=torch.device("cpu"),
    )
    sampler_under_test.sample(torch.randn(9))
    assert not sampler_under_test.is_finished
    assert sampler_under_test.jump_forward_tokens() == []


def test_jump_forward_tokens_are_verified_by_sampling() -> None:
    sampler_under_test = sampler(Grammar.regex("[ab]: dictated"))
    sampler_under_test.sample(torch.randn(len(nano()) + 40))
    forced_tokens = sampler_under_test.jump_forward_tokens()
    assert nano().decode(forced_tokens) == ": dictated"
    assert [
        sampler_under_test.sample(torch.randn(len(nano()) + 40))[0] for _ in forced_tokens
    ] == forced_tokens
    assert sampler_under_test.is_finished


def test_logprobs_are_the_models_own_under_a_grammar_too() -> None:
    logits_V = torch.randn(len(nano()) + 40)
    token, report = sampler(Grammar.regex("[0-9]"), num_logprobs=1).sample(logits_V)
    assert report is not None
    assert report.logprob == pytest.approx(logits_V.log_softmax(-1)[token].item())
    assert report.top[0][0] == logits_V.argmax().item()


def test_a_compiled_grammar_does_not_wait_for_another() -> None:
    compiler = GrammarCompiler(nano(), end_ids=[nano().token_to_id(IM_END)], vocab_size=len(nano()))
    known = Grammar.regex("[ab]+")
    compiler.create_matcher(known)
    with compiler._compile_lock:  # as while another thread compiles
        assert compiler.create_matcher(known).token_mask().any()
