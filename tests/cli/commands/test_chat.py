"""`chat`: multi-turn prompts, chat commands, attached media, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qwen2vl
from qwen2vl.cli import options, terminal
from qwen2vl.cli.chat.local_backend import LocalBackend
from qwen2vl.cli.chat.session import ChatSession, read_message
from qwen2vl.cli.media_arguments import MediaFile
from qwen2vl.cli.options import LoadedModel
from qwen2vl.engine import LLM, Delta, SamplingParams
from tests.adapters import TEXT, write_adapter
from tests.cli.commands.test_ask import scripted_llm
from tests.cli.conftest import Run

InputLine = str | None | type[KeyboardInterrupt]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder)


@pytest.fixture
def loaded(llm: LLM) -> LoadedModel:
    return LoadedModel(llm=llm, name="tiny", load_seconds=0.0)


@pytest.fixture
def prompts(llm: LLM, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the prompts of the LLM as text while `chat` runs with it."""
    prompts: list[str] = []
    real = llm.generate_prepared

    def record(prepared: Any, **named: Any) -> Any:
        pads = set(llm.config.placeholder_ids)
        text_ids = [token for token in prepared[0].prompt.input_ids if token not in pads]
        prompts.append(llm.processor.tokenizer.decode(text_ids, keep_special="all"))
        return real(prepared, **named)

    monkeypatch.setattr(llm, "generate_prepared", record)
    monkeypatch.setattr(options, "load_model_from_options", lambda given: loaded)
    return prompts


def chat(run: Run, *lines: str) -> Any:
    return run("chat", "--max-tokens", 3, stdin="".join(f"{line}\n" for line in lines))


def test_prompts_contain_the_earlier_turns(run: Run, prompts: list[str]) -> None:
    result = chat(run, "one", "two")
    assert result.exit_code == 0
    first, second = prompts
    answer = result.stdout.splitlines()[0]
    assert first.count("<|im_start|>user") == 1
    assert second.startswith(first)
    assert f"assistant\n{answer}" in second
    assert second.endswith("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")


def test_attached_images_join_the_next_message_and_stay(
    run: Run, prompts: list[str], image_file: Path
) -> None:
    result = chat(run, f"/image {image_file}", f"/image '{image_file}'", "what?", "and now?")
    assert "a photo.png 150 x 100 -> 20 tokens; now ask about it" in result.stderr
    image = "<|vision_start|><|vision_end|>"
    assert f"user\n{image}{image}what?" in prompts[0]
    assert f"user\n{image}{image}what?" in prompts[1]
    assert "user\nand now?" in prompts[1]


def test_image_options_are_attached_to_the_first_message(
    run: Run, prompts: list[str], image_file: Path
) -> None:
    for flag in (("--image",), ()):
        result = run("chat", *flag, image_file, "--max-tokens", 3, stdin="what?\n")
        assert "a photo.png 150 x 100 -> 20 tokens; now ask about it" in result.stderr
        assert "user\n<|vision_start|><|vision_end|>what?" in prompts.pop()


def test_a_missing_image_option_is_an_error(run: Run, prompts: list[str]) -> None:
    result = run("chat", "--image", "nowhere.png", stdin="what?\n")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()  # before the model is loaded
    assert "file 'nowhere.png' not found" in line
    assert not prompts


def test_boxes_are_in_pixels_of_the_latest_image(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "<|box_start|>(0,0),(500,500)<|box_end|>")
    Image.new("RGB", (1000, 400)).save("large.png")
    result = chat(run, f"/image {image_file}", "where?", "/image large.png", "where?", "and now?")
    lines = result.stdout.splitlines()
    assert lines == ["(0, 0) to (75, 50)"] + 2 * ["(0, 0) to (500, 200)"]


def test_boxes_are_drawn_on_the_latest_image(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "<|box_start|>(100,100),(500,500)<|box_end|>")
    Image.new("RGB", (1000, 400)).save("large.png")
    lines = (f"/image {image_file}", "where?", "/image large.png", "where?")
    result = run("chat", "-o", "boxes.png", stdin="".join(f"{line}\n" for line in lines))
    assert result.stderr.count("wrote boxes.png") == 2
    drawn = Image.open("boxes.png")
    assert drawn.size == (1000, 400)
    changed = drawn.convert("L").point(lambda v: 255 if v else 0).getbbox()
    assert changed is not None
    assert changed[0] in range(95, 105) and changed[2] in range(495, 506)


def test_one_command_attaches_several_images(
    run: Run, prompts: list[str], image_file: Path
) -> None:
    for name in ("f2.png", "f10.png", "other.png"):
        Image.new("RGB", (60, 60)).save(name)
    result = chat(run, f"/image f*.png '{image_file}' other.png", "what?")
    names = re.findall(r"qwen2vl: (.*) \d+ x \d+ ->", result.stderr)
    assert names == ["f2.png", "f10.png", "a photo.png", "other.png"]
    assert prompts[0].count("<|vision_start|>") == 4
    result = chat(run, f"/image *.png '{image_file}' other.png", "what?")
    (line,) = (line for line in result.stderr.splitlines() if "now ask" in line)
    assert re.fullmatch(r"qwen2vl: 6 files -> \d+ tokens; now ask about them", line)
    assert prompts[1].count("<|vision_start|>") == 6
    assert "/image f1*.jpg: no file matches" in chat(run, "/image f1*.jpg").stderr


def test_images_are_attached_all_or_none(run: Run, prompts: list[str], image_file: Path) -> None:
    Path("page.png").write_text("<!doctype html>")
    chat(run, f"/image '{image_file}' page.png", f"/image '{image_file}' nope.png", "what?")
    assert "vision_start" not in prompts[0]


def test_a_system_prompt_is_set_and_reset(run: Run, prompts: list[str]) -> None:
    result = run(
        *("chat", "--system", "Be brief.", "--max-tokens", 2),
        stdin="one\n/system Be kind.\ntwo\n/clear\nthree\n/system\nfour\n",
    )
    assert result.exit_code == 0
    system = [prompt.split("<|im_end|>")[0].split("system\n")[1] for prompt in prompts]
    assert system[:3] == ["Be brief.", "Be kind.", "Be kind."]
    assert system[3] not in system[:3], "the default"
    assert "user\none" in prompts[1] and "user\none" not in prompts[2]


def test_undo_takes_back_a_message_and_attaches_its_images_again(
    run: Run, prompts: list[str], image_file: Path
) -> None:
    result = chat(run, "one", f"/image {image_file}", "two", "/undo", "three", "/undo", "/undo")
    assert "two" not in prompts[2]
    assert "user\n<|vision_start|><|vision_end|>three" in prompts[2]
    assert "user\none" in prompts[2]
    assert result.stderr.count("the last message is taken back; what it showed is attached") == 2
    assert "error: there is no message yet" in chat(run, "/undo").stderr


def test_undo_detaches_what_was_not_sent(run: Run, prompts: list[str], image_file: Path) -> None:
    result = chat(run, "one", f"/image {image_file}", "/undo", "two", "/undo", "three")
    assert "the attached files are detached" in result.stderr
    assert all("vision_start" not in prompt for prompt in prompts)
    assert "user\none" in prompts[2] and "user\ntwo" not in prompts[2]


def test_retry_answers_the_last_message_again(run: Run, prompts: list[str]) -> None:
    result = chat(run, "one", "two", "/retry", "three", "/retry")
    assert prompts[1] == prompts[2] and prompts[3] == prompts[4]
    assert prompts[3].count("<|im_start|>user") == 3
    assert len(result.stdout.splitlines()) == 5


def test_retry_with_a_seed_draws_another_answer(run: Run, prompts: list[str]) -> None:
    sampling = ("--temperature", 3, "--seed", 1, "--max-tokens", 8)
    text = run("chat", *sampling, stdin="one\n/retry\n/retry\n").stdout
    assert len(set(text.splitlines())) >= 3  # these answers may contain line breaks
    assert run("chat", *sampling, stdin="one\n/retry\n/retry\n").stdout == text


def test_a_saved_conversation_is_loaded_and_continued(
    run: Run, prompts: list[str], llm: LLM, image_file: Path
) -> None:
    Path("away").mkdir()
    chat(run, "/system Be brief.", f"/image '{image_file.name}'", "one", "/save away/c.json", "two")
    messages = json.loads(Path("away/c.json").read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"][0] == {"type": "image", "image": str(image_file)}
    assert len(llm.chat(messages, SamplingParams(max_tokens=1))) == 1
    result = chat(run, "other", "/load away/c.json", "two", "/save away/c.json")
    assert prompts[3] == prompts[1]
    assert f"{image_file.name} 150 x 100" in result.stderr
    assert len(json.loads(Path("away/c.json").read_text())) == 5


def test_an_image_from_stdin_is_saved_with_the_conversation(
    loaded: LoadedModel, image_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = ChatSession(LocalBackend(loaded, SamplingParams(max_tokens=1)))
    session.attach([MediaFile(kind="image", source=image_file.read_bytes())])
    session.handle_line("what?")
    session.handle_line(f"/save {tmp_path / 'c.json'}")
    (reloaded,) = loaded.llm.chat(json.loads((tmp_path / "c.json").read_text()))
    assert reloaded.image_tokens == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "c.json: cannot be read: No such file"),
        ("{", "c.json: is not JSON"),
        ("[]", "c.json: is no conversation: messages is empty"),
        ('{"a": 1}', "c.json: is no conversation"),
        ('[{"role": "user"}]', "content is missing"),
        ('[{"role": "user", "content": [{"image": "gone.png"}]}]', "'gone.png' not found"),
    ],
)
def test_a_bad_file_leaves_the_conversation_unchanged(
    run: Run, prompts: list[str], content: str | None, message: str
) -> None:
    if content is not None:
        Path("c.json").write_text(content)
    result = chat(run, "one", "/load c.json", "two")
    assert "qwen2vl: error: " in result.stderr
    assert message in result.stderr
    assert "user\none" in prompts[1]


def test_saving_overwrites_conversations_only(run: Run, prompts: list[str]) -> None:
    Path("notes.txt").write_text("mine")
    result = chat(
        run, "/save c.json", "one", "/save notes.txt", "/save no/c.json", "/save", "/load"
    )
    assert Path("notes.txt").read_text() == "mine"
    for message in (
        "there is nothing to save yet",
        "notes.txt: is not JSON",
        "/save no/c.json: the folder",
        "/save needs a file",
        "/load needs a file",
    ):
        assert message in result.stderr


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one \\", "two"], "one \ntwo"),
        (['"""one', "  two\\", 'three"""'], "one\n  two\\\nthree"),
        (['"""one"""'], "one"),
        (['"""one'], "one"),
        (["one\\"], "one"),
    ],
)
def test_messages_of_several_lines(
    run: Run, prompts: list[str], lines: list[str], message: str
) -> None:
    chat(run, *lines)
    assert prompts[0].endswith(f"user\n{message}<|im_end|>\n<|im_start|>assistant\n")


def test_adapters_are_chosen_by_name(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    model = qwen2vl.load(tiny_folder)[0]
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, model, TEXT, seed=seed)
    result = run(
        *("chat", "--model", tiny_folder, "--adapter", "a=one", "--adapter", "b=two"),
        *("--max-tokens", 6),
        stdin="Hi\n/adapter b\n/retry\n/adapter c\n/adapter\n",
    )
    asked = ("ask", "--model", tiny_folder, "Hi", "--max-tokens", 6, "--adapter")
    assert result.stdout == run(*asked, "one").stdout + run(*asked, "two").stdout
    assert "/adapter c: no such adapter; known: a, b" in result.stderr
    assert "qwen2vl: b answers; /adapter NAME chooses another of a\n" in result.stderr


def test_lines_pasted_at_once_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal has the next line already when the first is read."""
    simulate_input(monkeypatch, "one", "two", "three", "four")
    pasted = iter([True, True, False, False])
    monkeypatch.setattr(terminal, "has_pasted_line", lambda: next(pasted))
    assert read_message() == "one\ntwo\nthree"
    assert read_message() == "four"


def test_clear_removes_turns_and_images(run: Run, prompts: list[str], image_file: Path) -> None:
    chat(run, "one", f"/image {image_file}", "/clear", "two")
    assert "one" not in prompts[1]
    assert "vision_start" not in prompts[1]


def test_errors_are_reported_and_the_conversation_is_kept(run: Run, prompts: list[str]) -> None:
    result = chat(run, "one", "/image none.png", "/image", "/video", "/foo", "", "two")
    assert result.exit_code == 0
    assert len(prompts) == 2
    assert "one" in prompts[1]
    errors = [line for line in result.stderr.splitlines() if "error" in line or "/foo" in line]
    assert len(errors) == 4
    assert "file 'none.png' not found" in errors[0]
    assert "/image needs a file" in errors[1]
    assert "/foo is no command; /help lists them" in errors[3]


def test_a_path_is_not_a_command(run: Run, prompts: list[str]) -> None:
    chat(run, "/pictures/x.png is what?")
    assert "user\n/pictures/x.png is what?" in prompts[0]


def test_invalid_utf8_input_is_escaped(run: Run, prompts: list[str]) -> None:
    assert run("chat", "--max-tokens", 2, stdin=b"caf\xe9\n").exit_code == 0
    assert "user\ncaf\\xe9<|im_end|>" in prompts[0]


def test_a_closed_stdin_ends_the_chat(tiny_folder: Path) -> None:
    shell = f'"{sys.executable}" -m qwen2vl chat --model "{tiny_folder}" <&-'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit"])
def test_help_and_quit(run: Run, prompts: list[str], word: str) -> None:
    result = chat(run, "/help", word, "never")
    assert "/clear          clear the conversation" in result.stdout
    assert prompts == []
    assert result.exit_code == 0


def test_a_prompt_that_exceeds_the_context_is_reported_and_the_chat_continues(
    run: Run, prompts: list[str], llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 80)
    result = chat(run, "x" * 100, "short")
    assert "qwen2vl: error: the prompt has 1" in result.stderr
    assert len(result.stdout.splitlines()) >= 1
    (prompt,) = prompts
    assert "xxx" not in prompt
    assert "user\nshort" in prompt


def simulate_input(monkeypatch: pytest.MonkeyPatch, *lines: InputLine) -> None:
    """Simulate input lines; KeyboardInterrupt is Ctrl-C at the prompt, None the end of input."""
    keys: Iterator[InputLine] = iter(lines)

    def read(_: str) -> str | None:
        key = next(keys)
        if key is KeyboardInterrupt:
            raise KeyboardInterrupt
        return key  # type: ignore[return-value]

    monkeypatch.setattr(terminal, "read_line", read)


def interrupting(times: int) -> Callable[..., Any]:
    """Return a writer class that raises Ctrl-C at the second delta of the first `times` answers."""
    left = [times]

    class DeltaWriter(terminal.DeltaWriter):
        def __call__(self, delta: terminal.StreamedText) -> None:
            super().__call__(delta)
            if left[0] and len(self.text) > 1:
                left[0] -= 1
                raise KeyboardInterrupt

    return DeltaWriter


def test_ctrl_c_stops_generation_and_keeps_the_partial_answer(
    run: Run, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "DeltaWriter", interrupting(1))
    simulate_input(monkeypatch, "one", "two", None)
    result = run("chat", "--max-tokens", 50)
    assert result.exit_code == 0
    assert "stopped; Ctrl-C again, Ctrl-D or /quit leaves" in result.stderr
    assert "user\none" in prompts[1]
    cut = prompts[1].split("assistant\n")[1]
    assert 1 <= len(cut.split("<|im_end|>")[0]) <= 4


def test_a_second_ctrl_c_exits_with_130(
    run: Run, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "DeltaWriter", interrupting(1))
    simulate_input(monkeypatch, "one", KeyboardInterrupt)
    assert run("chat", "--max-tokens", 50).exit_code == 130


def test_ctrl_c_twice_at_the_prompt_exits_with_130(
    run: Run, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_input(monkeypatch, KeyboardInterrupt, KeyboardInterrupt)
    result = run("chat")
    assert result.exit_code == 130
    assert "qwen2vl: Ctrl-C again, Ctrl-D or /quit leaves\n" in result.stderr


def test_input_between_two_ctrl_c_keeps_the_chat_running(
    run: Run, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_input(monkeypatch, KeyboardInterrupt, "one", KeyboardInterrupt, None)
    assert run("chat", "--max-tokens", 2).exit_code == 0
    assert len(prompts) == 1


def test_the_llm_is_consistent_after_an_interrupt(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    messages = [{"role": "user", "content": "Hi"}]
    (want,) = llm.chat(messages, params)

    def stop(_: Delta) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qwen2vl.LLM.chat(llm, messages, params, on_delta=stop)
    assert llm.chat(messages, params)[0].token_ids == want.token_ids


def test_ctrl_c_during_prefill_stops_after_the_step_and_keeps_the_engine_core(
    run: Run, llm: LLM, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, num_steps = llm.engine_core, 0
    execute = core.runner.execute_model

    def interrupted(scheduler_output: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 1:
            signal.raise_signal(signal.SIGINT)
        return execute(scheduler_output)

    monkeypatch.setattr(core.runner, "execute_model", interrupted)
    simulate_input(monkeypatch, "one", None)
    result = run("chat", "--max-tokens", 50)
    assert result.exit_code == 0 and "stopped; Ctrl-C again, " in result.stderr
    assert num_steps == 1
    assert llm.engine_core is core and not llm.has_unfinished_requests
    assert len(prompts) == 1
