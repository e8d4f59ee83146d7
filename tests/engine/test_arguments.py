"""Forms of arguments: conversations, batches, media and sampling parameters, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from qwen2vl.engine.arguments.conversations import (
    TextPrompt,
    as_batch,
    as_conversation,
    as_prompts,
    ends_with_assistant,
    naming,
)
from qwen2vl.engine.arguments.options import (
    as_params,
    as_params_list,
    check_choice,
    check_llm_arguments,
    refuse_load_options,
)
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.errors import CapacityError, EngineError, InputError

MESSAGE: dict[str, Any] = {"role": "user", "content": "Hi"}
CONVERSATION = [MESSAGE]
PLACEHOLDERS: dict[str, Any] = {
    "role": "user",
    "content": [
        {"type": "image", "text": None},  # columnar datasets fill absent keys
        {"type": "image", "image": "own"},
        {"type": "text", "text": "or"},
        {"type": "image"},
    ],
}


class OpenAIMessage:
    """A message as a client's object."""

    role = "assistant"

    def model_dump(self) -> dict[str, Any]:
        return {"role": self.role, "content": "He"}


@pytest.mark.parametrize("form", ["Hi", MESSAGE, CONVERSATION])
def test_a_conversation_is_a_text_a_message_or_a_list_of_messages(form: Any) -> None:
    assert as_conversation(form) == CONVERSATION
    batch = as_batch(form)
    assert batch.conversations == [CONVERSATION] and not batch.is_list


def test_a_list_of_texts_or_conversations_is_a_batch() -> None:
    assert as_batch(["Hi", CONVERSATION]).conversations == [CONVERSATION, CONVERSATION]
    assert as_batch([CONVERSATION]).is_list
    assert as_batch([]).conversations == []


def test_media_come_before_the_text() -> None:
    one = as_conversation("What?", images="a.png", videos=["b.mp4", {"video": "c.mp4", "fps": 1}])
    assert one == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "video", "video": "b.mp4"},
                {"type": "video", "video": "c.mp4", "fps": 1},
                {"type": "text", "text": "What?"},
            ],
        }
    ]


def test_placeholders_are_filled_in_order_in_a_copy() -> None:
    given = deepcopy(PLACEHOLDERS)
    (message,) = as_conversation(given, images=["a", {"image": "b", "max_pixels": 9}])
    assert [item.get("image") for item in message["content"]] == ["a", "own", None, "b"]
    assert message["content"][3]["max_pixels"] == 9
    assert given == PLACEHOLDERS


def test_media_of_a_prompt_are_ordered_by_its_placeholders() -> None:
    text = "<|video_pad|> and <|image_pad|> or <|image_pad|>"
    (prompt,) = as_prompts(
        {"prompt": text, "multi_modal_data": {"image": ["a", "b"], "video": "c"}}
    )
    assert isinstance(prompt, TextPrompt)
    assert [item.get("image", item.get("video")) for item in prompt.media] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: as_batch(3), "conversations: got 3, must be a text, a message"),
        (lambda: as_batch([MESSAGE, CONVERSATION]), None),  # the processor names messages[1]
        (lambda: as_batch([CONVERSATION, MESSAGE]), "conversations[1]: got a message among"),
        (lambda: as_batch(["Hi", None]), "conversations[1]: got None, must be a text"),
        (lambda: as_batch([["Hi"]]), "conversations[0][0]: got 'Hi' in a list of messages"),
        (lambda: as_conversation(["a", "b"]), "conversation[0]: got 'a' in a list of messages"),
        (lambda: as_batch(["a", "b"], images="x.png"), "images: got 'x.png' for a list of conv"),
        (lambda: as_batch("a", images={"role": "x"}), "images[0] has an unknown key 'role'"),
        (lambda: as_batch("a", videos=["b", {"image": "c"}]), "videos[1]"),
        (lambda: as_batch(CONVERSATION, videos="x.mp4"), "videos: go with a text, got messages"),
        (lambda: as_params({"temperature": 0}, {}), "pass SamplingParams(temperature=0), or as k"),
        (lambda: as_params("greedy", {}), "params: got 'greedy', must be SamplingParams"),
        (lambda: as_params(None, {"temprature": 0}), "temprature: there is no such argument"),
        (lambda: as_params(None, {"temprature": 0}), "did you mean temperature?"),
        (lambda: as_params(None, {"on_dleta": print}), "did you mean on_delta?"),
        (lambda: as_params(None, {"sampling_params": 1}), "did you mean params?"),
        (lambda: as_params(None, {"use_tqdm": False}), "there is no progress bar"),
        (lambda: as_params(None, {"messages": []}), "give the messages as the first argument"),
        (lambda: as_params(None, {"guided_regex": "a"}), "give grammar=Grammar.regex(PATTERN)"),
        (lambda: as_params("x.png", {}), "media are given as images=[...] or videos=[...]"),
        (lambda: as_params_list(["x", "y"], {}, 1), "params[0]: got 'x', must be SamplingParams"),
        (lambda: as_conversation(["a", "b"]), "stream takes one conversation, chat a list"),
        (lambda: as_prompts({"prompt_token_ids": [1]}), "prompt_token_ids cannot be given"),
        (lambda: as_prompts([{"prompt": "a", "cache_salt": 1}]), "prompts[0]: got {'prompt': 'a'"),
        (lambda: as_conversation([PLACEHOLDERS], ["a"]), "images: got 1 for 2 placeholders"),
        (lambda: as_conversation([PLACEHOLDERS], list("abc")), "images: got 3 for 2 placeholders"),
        (lambda: as_conversation([PLACEHOLDERS], None, "v"), "videos: go with a text, got messag"),
        (lambda: as_params(SamplingParams(), {"n": 2}), "and the keyword n; give either"),
        (lambda: as_params_list([SamplingParams()], {}, 2), "got 1 for 2 prompts"),
        (lambda: as_params_list([None], {}, 1), "params[0]: got None, must be SamplingParams"),
        (lambda: as_prompts({"a": 1}), "prompts: got {'a': 1}, must be text or a ModelInput"),
        (lambda: as_prompts(["a", 1]), "prompts[1]: got 1, must be text"),
        (lambda: check_choice("pooling", "max", ("last", "mean")), "'last' or 'mean'"),
        (lambda: refuse_load_options({"dtype": "float16"}, "the LLM", "r"), "dtype: got 'float16'"),
    ],
)
def test_errors_name_argument_value_and_remedy(call: Callable[[], Any], text: str | None) -> None:
    if text is None:
        call()
        return
    with pytest.raises(InputError) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"engine": {"max_num_seqs": 4}},
            "engine: got {'max_num_seqs': 4}, must be of class EngineConf",
        ),
        ({"processor": "nano"}, "processor: got 'nano', must be of class Processor"),
        ({"generation_defaults": {}}, "generation_defaults: got {}, must be of class GenerationD"),
        ({"compile": "yes"}, "compile: got 'yes', must be True or False"),
        ({"adapters": ["a"]}, "adapters: got ['a'], must be a dict from names to folders"),
        ({"adapters": {"a": 1}}, "adapters: got {'a': 1}"),
        ({"compile": True, "adapters": {"a": "b"}}, "compile: layers of adapters"),
    ],
)
def test_arguments_of_llm_are_checked(arguments: dict[str, Any], text: str) -> None:
    unset = {"processor": None, "adapters": None, "engine": None, "generation_defaults": None}
    with pytest.raises(InputError) as caught:
        check_llm_arguments(**{"compile": False, **unset, **arguments})
    assert text in str(caught.value)


def test_parameters_are_broadcast_or_given_for_each_prompt() -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)
    assert as_params_list(None, {}, 2) == [SamplingParams()] * 2
    assert as_params_list(short, {}, 2) == [short, short]
    assert as_params_list([short, long], {}, 2) == [short, long]
    assert as_params_list(None, {"max_tokens": 9}, 2) == [long, long]


def test_default_values_of_load_options_are_not_refused() -> None:
    defaults = {"device": "auto", "dtype": "auto", "video_preset": "paper", "quantize": None}
    defaults |= {"compile": False, "engine": None, "kv_cache_dtype": "auto"}
    refuse_load_options(defaults, "the LLM", "")


def test_a_prefix_keeps_the_class_and_is_for_errors_of_the_input_only() -> None:
    with (
        pytest.raises(CapacityError, match=r"^conversations\[1\]: too long$"),
        naming("conversations[1]"),
    ):
        raise CapacityError("too long")
    with pytest.raises(EngineError, match=r"^died$"), naming("conversations[1]"):
        raise EngineError("died")


def test_ends_with_assistant() -> None:
    assert ends_with_assistant([*CONVERSATION, {"role": "assistant", "content": "He"}])
    assert ends_with_assistant([MESSAGE, OpenAIMessage()])  # type: ignore[list-item]
    assert not ends_with_assistant(CONVERSATION)
    assert not ends_with_assistant([])
