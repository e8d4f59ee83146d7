"""Usage: tokens, media and times of finished requests."""

from __future__ import annotations

from qwen2vl.engine import Completion
from qwen2vl.engine.outputs import ItemReport, Timings
from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.serving.usage import add_usages, build_usage, media_paths, partial_usage
from qwen2vl.server.state import ServerState
from tests.server.serving.pictures import data_url, picture

IMAGE = ItemReport(
    kind="image", name="image 1", original_size=(30, 40), resized_size=(56, 84), tokens=6
)
VIDEO = ItemReport(
    kind="video",
    name="video 1",
    original_size=(30, 40),
    resized_size=(56, 84),
    tokens=12,
    frame_timestamps=(0.0, 0.33333333),
    notes=("fewer frames",),
)


def completion(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "text": "ab",
        "token_ids": (1, 2),
        "finish_reason": "stop",
        "prompt_tokens": 30,
        "image_tokens": 6,
        "video_tokens": 12,
        "cached_tokens": 16,
        "items": (IMAGE, VIDEO),
        "seconds": Timings(process=0.001, queue=0.002, vision=0.003, prefill=0.004, decode=0.005),
    }
    return Completion(**{**fields, **changes})  # type: ignore[arg-type]


def test_samples_share_the_prompt() -> None:
    slow = Timings(process=0.001, queue=0.001, vision=0.0, prefill=0.004, decode=0.5)
    usage = build_usage(
        [completion(), completion(token_ids=(1, 2, 3), cached_tokens=29, seconds=slow)],
        ["messages[0].content[0]", "messages[0].content[2]"],
    )
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (30, 5, 35)
    details = usage.prompt_tokens_details
    assert details is not None and details.cached_tokens == 16
    assert (details.image_tokens, details.video_tokens, details.audio_tokens) == (6, 12, 0)
    assert usage.timings_ms is not None
    assert usage.timings_ms.model_dump() == {
        "preprocess": 1.0,
        "queue": 2.0,
        "encoder": 3.0,
        "prefill": 4.0,
        "decode": 500.0,
    }


def test_media() -> None:
    usage = build_usage([completion()], ["messages[0].content[0]", "messages[0].content[2]"])
    assert usage.model_dump()["media"] == [
        {
            "param": "messages[0].content[0]",
            "type": "image",
            "original_size": {"width": 40, "height": 30},
            "resized_size": {"width": 84, "height": 56},
            "tokens": 6,
            "notes": [],
        },
        {
            "param": "messages[0].content[2]",
            "type": "video",
            "original_size": {"width": 40, "height": 30},
            "resized_size": {"width": 84, "height": 56},
            "tokens": 12,
            "frames": 2,
            "frame_timestamps": [0.0, 0.333],
            "notes": ["fewer frames"],
        },
    ]


def test_paths_are_in_the_order_of_the_prompt() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    video = {"type": "video_url", "video_url": {"url": "data:,"}}
    text = {"type": "text", "text": "x"}
    messages = parse_messages(
        [{"role": "user", "content": [text, video]}, {"role": "user", "content": [image]}]
    )
    assert media_paths(messages) == ["messages[0].content[1]", "messages[1].content[0]"]


def test_pictures_of_tool_results_keep_their_paths(server_state: ServerState) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        for name in "ab"
    ]
    messages = parse_messages(
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": calls},
            *(
                {
                    "role": "tool",
                    "tool_call_id": name,
                    "content": [{"type": "image_url", "image_url": {"url": data_url(image)}}],
                }
                for name, image in (("b", picture(size=168)), ("a", picture(size=112)))
            ),
        ]
    )
    # The prompt has them in the order of the calls.
    assert media_paths(messages) == ["messages[3].content[0]", "messages[2].content[0]"]
    items = server_state.engine.llm.processor(messages).items
    assert [item.original_size for item in items] == [(112, 112), (168, 168)]


def test_prompts_are_added() -> None:
    one = build_usage([completion(items=(), image_tokens=0, video_tokens=0)])
    both = add_usages([one, one])
    assert (both.prompt_tokens, both.completion_tokens, both.total_tokens) == (60, 4, 64)
    assert both.prompt_tokens_details is not None
    assert both.prompt_tokens_details.cached_tokens == 32
    assert both.timings_ms == one.timings_ms
    assert add_usages([one]) is one
    assert partial_usage(3, 4).model_dump() == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }
