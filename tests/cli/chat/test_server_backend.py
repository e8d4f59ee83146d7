"""`chat --server`: conversations with an OpenAI-compatible server that is not ours."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen2vl.cli import terminal
from qwen2vl.cli.chat.server_backend import ServerBackend
from qwen2vl.cli.chat.server_connection import ServerConnection
from qwen2vl.cli.chat.session import ChatSession
from tests.cli.chat.openai_server import Body, OpenAIServer, Reply, refusal, text_reply
from tests.cli.conftest import Run

BOX = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>"


def chat(run: Run, server: OpenAIServer, *lines: str, options: Sequence[object] = ()) -> Any:
    stdin = "".join(f"{line}\n" for line in lines)
    return run("chat", "--server", server.url, *options, stdin=stdin)


def save_animation(path: str) -> None:
    black, white = (Image.new("L", (40, 30), value) for value in (0, 255))
    black.save(path, save_all=True, append_images=[white])


def contents(body: Body) -> list[Any]:
    return [message["content"] for message in body["messages"]]


def test_turns_are_streamed_and_kept(run: Run, server: OpenAIServer) -> None:
    server.answer = lambda body: text_reply("He", "llo.")
    result = chat(run, server, "one", "two", options=("--system", "Be brief."))
    assert result.exit_code == 0
    assert result.stdout == "Hello.\nHello.\n"
    assert f"nano at {server.url}/v1 is ready" in result.stderr
    first, second = server.bodies
    assert contents(first) == ["Be brief.", "one"]
    assert contents(second) == ["Be brief.", "one", "Hello.", "two"]
    assert first["model"] == "nano" and first["stream"] is True and first["max_tokens"] == 512
    assert first["skip_special_tokens"] is False
    assert not {"temperature", "top_k", "top_p", "seed", "mm_processor_kwargs"} & first.keys()


def test_options_become_fields(run: Run, server: OpenAIServer) -> None:
    sampling = ("--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--seed", 7, "--max-tokens", 9)
    pixels = ("--max-pixels", 3136, "--model", "forms")
    chat(run, server, "one", "/retry", options=(*sampling, *pixels))
    first, second = server.bodies
    assert (first["temperature"], first["top_k"], first["top_p"]) == (0.5, 3, 0.9)
    assert (first["model"], first["max_tokens"]) == ("forms", 9)
    assert first["mm_processor_kwargs"] == {"max_pixels": 3136}
    assert (first["seed"], second["seed"]) == (7, 8), "a retry draws another answer"
    assert first["messages"] == second["messages"]


def test_images_are_sent_as_data_urls(
    run: Run, server: OpenAIServer, image_file: Path, tmp_path: Path
) -> None:
    save_animation("a.gif")
    result = chat(run, server, f"/image '{image_file.name}'", "/video a.gif", "what?", "again?")
    assert "a photo.png 150 x 100, " in result.stderr
    assert "a.gif 40 x 30, " in result.stderr
    image, video, text = contents(server.bodies[0])[0]
    url = image["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.partition(",")[2]) == image_file.read_bytes()
    assert video["type"] == "video_url"
    assert video["video_url"]["url"].startswith("data:image/gif;base64,")
    assert text == {"type": "text", "text": "what?"}
    assert contents(server.bodies[1])[0] == [image, video, text], "earlier turns keep their images"
    assert contents(server.bodies[1])[2] == "again?"


def test_frame_rates_are_keys_of_the_video(run: Run, server: OpenAIServer) -> None:
    save_animation("a.gif")
    chat(run, server, "/video a.gif", "what?", options=("--fps", 3))
    assert contents(server.bodies[0])[0][0]["fps"] == 3


def test_boxes_are_in_pixels_of_the_latest_image(
    run: Run, server: OpenAIServer, image_file: Path
) -> None:
    half = len(BOX) // 2
    server.answer = lambda body: text_reply(BOX[:half], BOX[half:])
    Image.new("RGB", (400, 1000)).save("tall.jpg", exif=rotated())
    result = chat(run, server, f"/image {image_file}", "where?", "/image tall.jpg", "where?")
    assert result.stdout.splitlines() == [
        "cat: (0, 0) to (75, 50)",
        "cat: (0, 0) to (500, 200)",  # the orientation that the camera stored is applied
    ]
    assert contents(server.bodies[1])[1] == BOX, "the model sees what it wrote"


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_boxes_are_drawn(run: Run, server: OpenAIServer, image_file: Path) -> None:
    server.answer = lambda body: text_reply(BOX.replace("(0,0)", "(200,200)"))
    Image.new("RGB", (1000, 400)).save("large.png")
    result = chat(run, server, "/image large.png", "where?", options=("-o", "boxes.png"))
    assert "wrote boxes.png" in result.stderr
    drawn = Image.open("boxes.png")
    assert drawn.size == (1000, 400)
    assert drawn.convert("L").point(lambda v: 255 if v else 0).getbbox() is not None


def test_the_server_tells_how_it_saw_an_image(
    run: Run, server: OpenAIServer, image_file: Path
) -> None:
    entry = {
        "type": "image",
        "original_size": {"width": 150, "height": 100},
        "resized_size": {"width": 140, "height": 112},
        "tokens": 20,
        "notes": ["transparency \x1b on white"],
    }
    server.answer = lambda body: text_reply("x", usage={"completion_tokens": 1, "media": [entry]})
    result = chat(run, server, f"/image {image_file}", "what?", "again?")
    lines = [line for line in result.stderr.splitlines() if "20 tokens" in line]
    assert lines == [
        "qwen2vl: image 150 x 100 -> 140 x 112, 20 tokens; transparency \\x1b on white"
    ]


@pytest.mark.parametrize("media", [3, [3], [{"type": "image"}], [{"original_size": "x"}]])
def test_usage_of_other_servers_is_ignored(run: Run, server: OpenAIServer, media: Any) -> None:
    server.answer = lambda body: text_reply("x", usage={"media": media})
    result = chat(run, server, "one", "two")
    assert result.stdout == "x\nx\n" and "Traceback" not in result.output


def test_truncation_is_noted(run: Run, server: OpenAIServer) -> None:
    counts = iter([{"completion_tokens": 9}, {"completion_tokens": 4}, None])
    server.answer = lambda body: text_reply("x", finish="length", usage=next(counts))
    result = chat(run, server, "one", "two", "three", options=("--max-tokens", 9))
    notes = [line.partition("cut")[2] for line in result.stderr.splitlines() if "cut" in line]
    assert notes[0] == " after 9 tokens; --max-tokens allows more"
    assert notes[1].startswith(" after 4 tokens, where the context is full")
    assert notes[2] == "; --max-tokens allows more"


def test_fields_that_a_server_does_not_know_are_left_out(run: Run, server: OpenAIServer) -> None:
    unknown = ["stream_options", "skip_special_tokens", "max_tokens"]

    def answer(body: Body) -> Reply:
        for name in unknown:
            if name in body:
                return refusal(400, f"Unrecognized request argument supplied: {name}")
        return text_reply("x")

    server.answer = answer
    result = chat(run, server, "one", "two", options=("--max-tokens", 9))
    assert result.stdout == "x\nx\n"
    assert "Unrecognized" not in result.stderr
    assert len(server.bodies) == 5, "the second message is sent once"
    assert server.bodies[-1]["max_completion_tokens"] == 9
    assert not set(unknown) & server.bodies[-1].keys()


def test_refusals_are_one_line_and_change_nothing(run: Run, server: OpenAIServer) -> None:
    replies = [
        text_reply("x"),
        refusal(400, "messages[2].content: too\nlong \x1b[2J" + "y" * 900),
        refusal(429, "queue full", Retry_After="3"),
        Reply(status=500, body="<html>down</html>"),
        Reply(status=307, body="", headers={"Location": "http://elsewhere/"}),
        Reply(status=200, body={"choices": []}),
        text_reply("x"),
    ]
    server.answer = lambda body: replies[len(server.bodies) - 1]
    result = chat(run, server, "one", "a", "b", "c", "d", "e", "two")
    assert result.exit_code == 0
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(errors) == 5
    assert "refused the request (400): messages[2].content: too long \\x1b[2Jyyy" in errors[0]
    assert len(errors[0]) < 600
    assert errors[1].endswith("the server is busy (429): queue full; try again in 3 s")
    assert "the server failed (500): <html>down</html>" in errors[2]
    assert "redirects to http://elsewhere/; give that address" in errors[3]
    assert "the server did not stream its answer" in errors[4]
    assert contents(server.bodies[-1]) == ["one", "x", "two"]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([{"error": {"message": "engine stopped"}}], "broke the answer off: engine stopped"),
        (["{"], "sent an event that is no JSON"),
        ([], "ended its stream before the answer was complete"),
    ],
)
def test_a_broken_stream_keeps_the_partial_answer(
    run: Run, server: OpenAIServer, events: list[Any], message: str
) -> None:
    begun = {"choices": [{"index": 0, "delta": {"content": "begun"}}]}
    broken = Reply(events=[begun, *events], is_complete=False)
    server.answer = lambda body: broken if len(server.bodies) == 1 else text_reply("x")
    result = chat(run, server, "one", "two")
    assert result.stdout == "begun\nx\n"
    assert message in result.stderr
    assert contents(server.bodies[1]) == ["one", "begun", "two"]


def test_ctrl_c_closes_the_stream_and_keeps_the_partial_answer(
    run: Run, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("be", "gun")]
    endless = Reply(events=pieces, then_wait=True)
    server.answer = lambda body: endless if len(server.bodies) == 1 else text_reply("x")

    class DeltaWriter(terminal.DeltaWriter):
        def __call__(self, delta: terminal.StreamedText) -> None:
            super().__call__(delta)
            if self.text == "begun":
                raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "DeltaWriter", DeltaWriter)
    result = chat(run, server, "one", "two")
    assert "stopped; Ctrl-C again, Ctrl-D or /quit leaves" in result.stderr
    assert server.client_left.wait(20), "the request is aborted"
    assert contents(server.bodies[1]) == ["one", "begun", "two"]


def test_commands_work_as_with_a_loaded_model(
    run: Run, server: OpenAIServer, image_file: Path
) -> None:
    answers = iter("abcdefgh")
    server.answer = lambda body: text_reply(next(answers))
    result = chat(
        *(run, server, "/system Be kind.", f"/image {image_file}", "one", "/save c.json", "two"),
        *("/undo", "three", "/retry", "/clear", "four", "/load c.json", "five", "/nothing"),
    )
    assert "/nothing is no command" in result.stderr
    kinds = [[c if isinstance(c, str) else "image" for c in contents(b)] for b in server.bodies]
    assert kinds == [
        ["Be kind.", "image"],
        ["Be kind.", "image", "a", "two"],
        ["Be kind.", "image", "a", "three"],
        ["Be kind.", "image", "a", "three"],
        ["Be kind.", "four"],
        ["Be kind.", "image", "a", "five"],
    ]
    assert json.loads(Path("c.json").read_text())[1]["content"][0]["image"] == str(image_file)


def test_models_of_the_server_are_chosen_by_name(run: Run, server: OpenAIServer) -> None:
    result = chat(run, server, "one", "/adapter", "/adapter forms", "two", "/adapter x")
    assert [body["model"] for body in server.bodies] == ["nano", "forms"]
    assert "nano answers; /adapter NAME chooses another of forms" in result.stderr
    assert "/adapter x: no such adapter; known: nano, forms" in result.stderr
    result = chat(run, server, options=("--model", "nan"))
    assert result.exit_code == 2
    assert f"--model nan: {server.url}/v1 has no such model; did you mean nano?" in result.stderr


@pytest.mark.parametrize("models", [{"data": []}, {"data": [3, {"id": 3}]}])
def test_a_server_without_a_list_of_models_needs_a_name(
    run: Run, server: OpenAIServer, models: Any
) -> None:
    server.models = models
    assert "choose one with --model NAME" in chat(run, server).stderr
    assert chat(run, server, "one", options=("--model", "m")).stdout == "Hello.\n"
    assert server.bodies[0]["model"] == "m"


def test_the_key_comes_from_the_option_or_the_environment(
    run: Run, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(run, server, "one")
    assert all("Authorization" not in headers for headers in server.headers)
    monkeypatch.setenv("QWEN2VL_API_KEY", "secret")
    chat(run, server, "one")
    assert [headers.get("Authorization") for headers in server.headers[2:]] == ["Bearer secret"] * 2
    chat(run, server, "one", options=("--api-key", "other"))
    assert server.headers[-1]["Authorization"] == "Bearer other"
    server.models = refusal(401, "wrong key")
    result = chat(run, server, "one", options=("--api-key", "other"))
    assert result.exit_code == 2
    assert (
        "(401): wrong key; give the server's key by --api-key or QWEN2VL_API_KEY" in result.stderr
    )


def test_options_of_a_loaded_model_are_refused(run: Run, server: OpenAIServer) -> None:
    result = chat(run, server, options=("--quantize", "int8"))
    assert result.exit_code == 2 and "--quantize is an option of a model" in result.stderr
    result = chat(run, server, options=("--kv-cache-dtype", "int8"))
    assert result.exit_code == 2 and "--kv-cache-dtype is an option of a model" in result.stderr
    result = chat(run, server, options=("--adapter", "a"))
    assert "/adapter NAME or --model NAME chooses" in result.stderr
    result = run("chat", "--api-key", "k", stdin="")
    assert result.exit_code == 2 and "name it by --server URL" in result.stderr


def test_a_session_reports_what_it_cannot_read(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    session = ChatSession(ServerBackend(ServerConnection(server.url), None, {}))
    (tmp_path / "page.png").write_text("<!doctype html>")
    session.handle_line(f"/image {tmp_path / 'page.png'}")
    session.handle_line("/image none.png")
    session.messages = [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]
    session.handle_line("what?")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("qwen2vl: error: ") for line in errors)
    assert not server.bodies


def test_torch_is_not_imported(server: OpenAIServer, image_file: Path) -> None:
    program = (
        "import sys\n"
        "from qwen2vl.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "chat", "--server", server.url, str(image_file)],
        input="what?\n/save c.json\n/load c.json\n",
        cwd=image_file.parent,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9"},  # loopback needs no proxy
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hello.\n"
    assert "loaded 2 messages" in done.stderr
