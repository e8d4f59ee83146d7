"""Parameters out of range, of the wrong type or in excess; each refusal names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.media import encoded, smooth
from tests.server.bad_inputs.suite import CHAT, Sent, Suite, check_refusal, covers, image_item

HUGE = 10**12


@covers("temperature -1, NaN, Infinity, string, 1e9")
@pytest.mark.parametrize("value", [-1, "0.5", 1e9, True, [], {}, 10**400])
def test_temperature(suite: Suite, value: Any) -> None:
    sent = suite.ask("hi", temperature=value)
    check_refusal(sent, 400, "temperature|number", sent.error["param"])


@covers("temperature -1, NaN, Infinity, string, 1e9")
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_json(suite: Suite, value: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]})[:-1]
    response = suite.client.post(
        CHAT,
        content=f'{body}, "temperature": {value}}}'.encode(),
        headers={"content-type": "application/json"},
    )
    check_refusal(Sent(response.status_code, response.json()), 400, "the request body holds", None)


@covers("top_p 0/1.1, top_k -5/0.01/1e9, min_p 2, repetition_penalty 0")
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_k": -5},
        {"top_k": 0.01},
        {"top_k": 10**10},
        {"min_p": 2},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1},
        {"repetition_penalty": 5e-324},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
    ],
    ids=str,
)
def test_sampling(suite: Suite, fields: dict[str, Any]) -> None:
    suite.refused_fields(next(iter(fields)), **fields)


@covers("top_p 0/1.1, top_k -5/0.01/1e9, min_p 2, repetition_penalty 0")
def test_top_k_above_the_vocabulary(suite: Suite) -> None:
    assert suite.accepted("hi", top_k=10**9).answer == suite.accepted("hi", top_k=0).answer


@covers("top_p 0/1.1, top_k -5/0.01/1e9, min_p 2, repetition_penalty 0")
def test_top_p_of_zero_is_greedy(suite: Suite) -> None:
    sampled = suite.accepted("hi", top_p=0, temperature=2, seed=7).answer
    assert sampled == suite.accepted("hi", temperature=0).answer


@covers("logit_bias with out-of-vocab or non-int id, >1024 entries")
@pytest.mark.parametrize(
    "bias",
    [
        {"191222": -100},
        {"-1": 1},
        {"x": 1},
        {"1.5": 1},
        {" 1": 1},
        {"\u0661": 1},
        {"1": 101},
        {"1": "5"},
        {str(i): 1 for i in range(1025)},
        [1],
    ],
    ids=range(10),
)
def test_logit_bias(suite: Suite, bias: Any) -> None:
    sent = suite.ask("hi", logit_bias=bias)
    check_refusal(sent, 400, "logit_bias", sent.error["param"])
    assert sent.error["param"].startswith("logit_bias")


@covers("stop_token_ids out of vocab, 1000 stop strings, empty stop string")
@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [151645000]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": list(range(2000))},
        {"stop_token_ids": ["1"]},
        {"stop": ["a"] * 1000},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": "a" * 257},
        {"stop": [1]},
        {"stop": {"a": 1}},
    ],
    ids=range(10),
)
def test_stop(suite: Suite, fields: dict[str, Any]) -> None:
    sent = suite.ask("hi", **fields)
    (name,) = fields
    check_refusal(sent, 400, name, sent.error["param"])
    assert sent.error["param"].startswith(name)


@covers("n too large (1e6)")
@pytest.mark.parametrize("n", [10**6, 9, 0, -1, 1.5, "2"])
def test_number_of_samples(suite: Suite, n: Any) -> None:
    suite.refused_fields("n:", n=n, temperature=1)


@covers("max_tokens 0, -1, null, 1e12; logprobs 25; seed 2^64")
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": HUGE},
        {"max_tokens": 1.5},
        {"max_completion_tokens": 0},
        {"max_completion_tokens": HUGE},
        {"logprobs": 25},
        {"top_logprobs": 25},
        {"top_logprobs": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"seed": -(2**63) - 1},
    ],
    ids=str,
)
def test_numbers(suite: Suite, fields: dict[str, Any]) -> None:
    suite.refused_fields(next(iter(fields)), **fields)


@covers("max_tokens 0, -1, null, 1e12; logprobs 25; seed 2^64")
def test_null_is_the_default(suite: Suite) -> None:
    names = ("temperature", "top_p", "top_k", "seed", "stop", "n", "logit_bias", "tools", "stream")
    sent = suite.accepted("hi", **dict.fromkeys(names))
    assert sent.body["usage"]["completion_tokens"] == 4
    sent = suite.accepted("Answer in one word.", max_tokens=None, ignore_eos=False)
    assert sent.body["usage"]["completion_tokens"] >= 1


@covers("context overflow by text, by image tokens, by max_tokens")
def test_context_overflow(suite: Suite) -> None:
    error = suite.refused("word " * 5000, text="4,096", param="messages")
    assert error["code"] == "context_length_exceeded"
    large = encoded(smooth(900, 900), "JPEG")
    error = suite.refused([image_item(large)] * 5, text="max_pixels", param="messages")
    assert "image" in error["message"] and "4,096" in error["message"]
    suite.refused_fields("4,096", max_tokens=5000)


@covers("generation reaches context end in stream")
def test_end_of_the_context_in_a_stream(suite: Suite) -> None:
    text = "word " * 20
    messages = [{"role": "user", "content": text * 40}]
    used = suite.chat(messages, max_tokens=1).body["usage"]["prompt_tokens"]
    letters = "a" * (4096 - used - 10)
    messages[0]["content"] += letters
    body = {"messages": messages, "temperature": 0, "ignore_eos": True, "stream": True}
    with suite.client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    reasons = [json.loads(line)["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}


@covers("prompt_embeds / serialized tensor upload")
def test_tensors_of_clients(suite: Suite) -> None:
    suite.refused_fields(prompt_embeds="gASVAAAA")
    for path in ("/v1/prompt_embeds", "/load_model", "/reset", "/invocations", "/v1/files"):
        assert suite.client.post(path, json={}).status_code == 404
    sent = suite.post({"model": "nano", "prompt": "x", "prompt_embeds": "gASV"}, "/v1/completions")
    check_refusal(sent, 400, "prompt_embeds", "prompt_embeds")


@covers("unknown model name")
def test_unknown_model(suite: Suite) -> None:
    for name in ("gpt-4o", "nana", "", "../nano", "nano\n", "n" * 5000):
        sent = suite.ask("hi", model=name)
        assert check_refusal(sent, 404, "", "model")["code"] == "model_not_found"


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
    {"type": "object", "properties": {"a": {"type": "strnig"}}},
    {"type": "object", "properties": {"a": {"type": 5}}},
    {"type": "object", "properties": []},
    {"$ref": "#/nowhere"},
    {"$ref": "http://example.com/schema.json"},
    "object",
    {"type": "array"},
]


@covers("invalid tool schema (pattern/type), deep recursion, huge enum")
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_tool_schemas(suite: Suite, schema: Any) -> None:
    function = {"name": "look", "parameters": schema}
    fields = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    sent = suite.ask("hi", **fields)
    check_refusal(sent, 400, "", sent.error["param"])
    assert sent.error["param"].startswith("tools[0]")


@covers("invalid tool schema (pattern/type), deep recursion, huge enum")
def test_excessive_schemas(suite: Suite) -> None:
    deep: Any = {"type": "string"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    nested = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    enum = {"type": "object", "properties": {"a": {"enum": [f"v{i}" for i in range(100_000)]}}}
    repeat = {"type": "string", "pattern": "(a{1,1000}){1,1000}"}
    for schema in (deep, nested, enum, {"type": "object", "properties": {"a": repeat}}):
        function = {"name": "look", "parameters": schema}
        tools = [{"type": "function", "function": function}]
        for fields in (
            {"tools": tools, "tool_choice": "required"},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        ):
            sent = suite.ask("hi", **fields)
            assert sent.status in (200, 400), sent.body
            if sent.status == 400:
                check_refusal(sent, 400, "", sent.error["param"])
    sent = suite.ask("hi", tools=[{"type": "function", "function": {"name": "f"}}] * 129)
    check_refusal(sent, 400, "tools", "tools")


@covers("response_format json_schema without schema / bad regex")
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
        {"response_format": {"type": "xml"}},
        {"response_format": {}},
        {"response_format": "json"},
        {"guided_regex": "("},
        {"structured_outputs": {"regex": "[a-"}},
        {"structured_outputs": {"regex": "(?=a)"}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"regx": "a"}},
    ],
    ids=range(13),
)
def test_structured_output(suite: Suite, fields: dict[str, Any]) -> None:
    sent = suite.ask("hi", ignore_eos=False, **fields)
    check_refusal(sent, 400, "", sent.error["param"])
    assert sent.error["param"].partition(".")[0] in fields
