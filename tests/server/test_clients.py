"""Programs that others wrote, against a live server: agents, tools, many clients, our own chat.

pydantic-ai asks for structured answers, langchain for tool calls; OpenAI's asynchronous client
sends several requests at once. Grammars make nano answer in the formats that it was not trained
for. Nothing here uses a network but loopback.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from click.testing import CliRunner
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from qwen2vl.cli.main import main
from qwen2vl.engine import AsyncLLM
from tests.server.conftest import LiveServer, ServerStarter
from tests.server.serving.pictures import data_url, encode, picture, question

COLOR = "What color is the circle?"
COLORS = ("red", "blue", "green", "yellow")


class Shape(BaseModel):
    """What a picture shows."""

    color: Literal["red", "blue", "green"]
    sides: Literal[3, 4, 5]


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Return the weather of a city."""
    return f"It rains in {city}."


# OpenAI's client --------------------------------------------------------------------------------


@asynccontextmanager
async def async_client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.base_url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_eight_requests_at_once_have_their_own_answers(
    live_server: LiveServer, async_llm: AsyncLLM
) -> None:
    async def ask(client: openai.AsyncOpenAI, color: str) -> str | None:
        answer = await client.chat.completions.create(
            model="nano",
            messages=question(COLOR, picture(color)),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=16,
        )
        return answer.choices[0].message.content

    async def stream(client: openai.AsyncOpenAI, color: str) -> str:
        pieces = await client.chat.completions.create(
            model="nano",
            messages=question(COLOR, picture(color)),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        return "".join(
            [piece.choices[0].delta.content or "" async for piece in pieces if piece.choices]
        )

    async def run() -> tuple[list[str | None], list[str | None]]:
        async with async_client(live_server) as client:
            alone = [await ask(client, color) for color in COLORS]
            work = [one(client, color) for color in COLORS for one in (ask, stream)]
            return alone, list(await asyncio.gather(*work))

    alone, together = asyncio.run(run())
    assert len(set(alone)) == len(COLORS) and alone[0] is not None and "red" in alone[0]
    assert together == [answer for answer in alone for _ in range(2)]


# pydantic-ai ------------------------------------------------------------------------------------


def agent(server: LiveServer, output_type: Any, **options: Any) -> Agent[None, Any]:
    provider = OpenAIProvider(base_url=f"{server.base_url}/v1", api_key="none")
    model = OpenAIChatModel("nano", provider=provider)
    settings: Any = {"max_tokens": 128, "temperature": 0}
    return Agent(model, output_type=output_type, model_settings=settings, **options)


@pytest.mark.parametrize("form", [ToolOutput, NativeOutput])
def test_an_agent_gets_a_structured_answer(live_server: LiveServer, form: Any) -> None:
    """pydantic-ai asks for it by tool_choice "required", or by response_format json_schema."""
    image = BinaryContent(encode(picture("red")), media_type="image/png")
    result = agent(live_server, form(Shape)).run_sync(["What does it show?", image])
    assert isinstance(result.output, Shape)
    assert result.usage.input_tokens > 16 and result.usage.output_tokens > 0


def test_an_agent_gets_text(live_server: LiveServer) -> None:
    image = BinaryContent(encode(picture("red")), media_type="image/png")
    result = agent(live_server, str).run_sync([COLOR, image])
    assert "red" in result.output


def test_an_agent_is_told_what_is_wrong(live_server: LiveServer) -> None:
    from pydantic_ai.exceptions import ModelHTTPError

    image = BinaryContent(b"no picture", media_type="image/png")
    with pytest.raises(ModelHTTPError) as caught:
        agent(live_server, str).run_sync(["What?", image])
    assert caught.value.status_code == 400
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == "messages[0].content[1]"


# langchain --------------------------------------------------------------------------------------


def chat_model(server: LiveServer, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="nano",
        base_url=f"{server.base_url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_retries=0,
        **{"max_tokens": 64, **options},
    )


def picture_message(text: str = COLOR) -> HumanMessage:
    return HumanMessage(
        [
            {"type": "image_url", "image_url": {"url": data_url(picture("red"))}},
            {"type": "text", "text": text},
        ]
    )


def test_langchain_answers_and_streams(live_server: LiveServer) -> None:
    model = chat_model(live_server)
    answer = model.invoke([picture_message()])
    assert "red" in answer.text
    assert answer.usage_metadata is not None and answer.usage_metadata["input_tokens"] > 16
    pieces = list(model.stream([picture_message()]))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert len(pieces) > 1


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_langchain_gets_tool_calls(live_server: LiveServer, choice: str) -> None:
    bound = chat_model(live_server).bind_tools([get_weather], tool_choice=choice)
    asked = picture_message("How is the weather there?")
    answer = bound.invoke([asked])
    (call, *_) = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Paris", "Rome")
    assert not answer.invalid_tool_calls
    total: Any = None
    for piece in bound.stream([asked]):
        total = piece if total is None else total + piece
    assert [(one["name"], one["args"]) for one in total.tool_calls] == [
        (one["name"], one["args"]) for one in answer.tool_calls
    ]


def test_langchain_returns_the_result_of_a_tool(live_server: LiveServer) -> None:
    model = chat_model(live_server).bind_tools([get_weather])
    call: Any = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1"}
    messages = [
        HumanMessage("Is it raining in Paris?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("It rains in Paris.", tool_call_id="call_1"),
    ]
    answer = model.invoke(messages)
    assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(live_server: LiveServer, method: Any) -> None:
    model = chat_model(live_server).with_structured_output(Shape, method=method)
    assert isinstance(model.invoke([picture_message()]), Shape)


def test_langchain_embeds(live_server: LiveServer) -> None:
    embeddings = OpenAIEmbeddings(
        model="nano",
        base_url=f"{live_server.base_url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,  # else it counts tokens with a vocabulary it downloads
    )
    vectors = embeddings.embed_documents(["a red square", "a blue circle"])
    assert [len(vector) for vector in vectors] == [192, 192]


# Our own client ---------------------------------------------------------------------------------


def chat(server: LiveServer, *lines: str, options: tuple[object, ...] = ()) -> Any:
    arguments = ["chat", "--server", server.base_url, "--temperature", "0", *map(str, options)]
    result = CliRunner().invoke(main, arguments, input="".join(f"{line}\n" for line in lines))
    assert "Traceback" not in result.output
    return result


def test_qwen2vl_chat(live_server: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    picture("red").save(path)
    result = chat(live_server, f"/image '{path}'", COLOR, "/retry", f"/save {tmp_path}/c.json")
    assert result.exit_code == 0, result.stderr
    first, again = result.stdout.splitlines()
    assert "red" in first and again == first
    assert "image 112 x 112 -> 112 x 112, 16 tokens" in result.stderr
    assert "saved 3 messages" not in result.stderr and "saved 2 messages" in result.stderr


def test_qwen2vl_chat_shows_boxes_in_pixels(live_server: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    picture("red").save(path)
    question = "Where is the red circle? Answer with its box."
    result = chat(live_server, question, options=(path,))
    assert result.exit_code == 0, result.stderr
    assert "<|" not in result.stdout
    assert " to (" in result.stdout, result.stdout


def test_qwen2vl_chat_reports_refusals(
    live_server: LiveServer, start_server: ServerStarter, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = chat(live_server, "x" * 100_000, "Hi", options=("--max-tokens", 2))
    (error,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert "the server refused the request (400)" in error and "context" in error
    assert result.stdout.strip(), "the second message is answered"
    guarded = start_server(api_keys=("secret",))
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    result = chat(guarded, "Hi")
    assert result.exit_code == 2 and "by --api-key or QWEN2VL_API_KEY" in result.stderr
    monkeypatch.setenv("QWEN2VL_API_KEY", "secret")
    assert chat(guarded, "Hi", options=("--max-tokens", 2)).exit_code == 0
