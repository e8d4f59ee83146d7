"""`chat`: multi-turn prompts, chat commands, attached media, and Ctrl-C."""

from __future__ import annotations

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
from qwen2vl.cli.options import LoadedModel
from qwen2vl.engine import LLM, Delta, SamplingParams
from tests.cli.commands.test_ask import scripted_llm
from tests.cli.conftest import Run

InputLine = str | None | type[KeyboardInterrupt]


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder)


@pytest.fixture
def prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the prompts of the LLM as text while `chat` runs with it."""
    prompts: list[str] = []
    real = llm.generate_prepared

    def record(prepared: Any, **named: Any) -> Any:
        pads = set(llm.config.placeholder_ids)
        text_ids = [token for token in prepared[0].prompt.input_ids if token not in pads]
        prompts.append(llm.processor.tokenizer.decode(text_ids, keep_special="all"))
        return real(prepared, **named)

    monkeypatch.setattr(llm, "generate_prepared", record)
    loaded = LoadedModel(llm=llm, name="tiny", load_seconds=0.0)
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
    result = run("chat", "--image", image_file, "--max-tokens", 3, stdin="what?\n")
    assert "a photo.png 150 x 100 -> 20 tokens; now ask about it" in result.stderr
    assert "user\n<|vision_start|><|vision_end|>what?" in prompts[0]


def test_a_missing_image_option_is_an_error(run: Run, prompts: list[str]) -> None:
    result = run("chat", "--image", "nowhere.png", stdin="what?\n")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("qwen2vl: error: nowhere.png: file")
    assert not prompts


def test_boxes_are_in_pixels_of_the_latest_image(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "<|box_start|>(0,0),(500,500)<|box_end|>")
    Image.new("RGB", (1000, 400)).save("large.png")
    result = chat(run, f"/image {image_file}", "where?", "/image large.png", "where?", "and now?")
    lines = [line for line in result.stdout.splitlines() if line.startswith("box: ")]
    assert lines == ["box: (0, 0) to (75, 50)"] + 2 * ["box: (0, 0) to (500, 200)"]


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


def test_help_and_quit(run: Run, prompts: list[str]) -> None:
    result = chat(run, "/help", "/quit", "never")
    assert "/clear        clear the conversation" in result.stdout
    assert prompts == []
    assert result.exit_code == 0


def test_a_prompt_that_exceeds_the_context_is_reported_and_the_chat_continues(
    run: Run, prompts: list[str], llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "max_model_len", 80)
    result = chat(run, "x" * 100, "short")
    assert "qwen2vl: error: prompt 1" in result.stderr
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
        def __call__(self, delta: Delta) -> None:
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
    assert "stopped; Ctrl-C again leaves" in result.stderr
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
    assert run("chat").exit_code == 130


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
    assert result.exit_code == 0 and "stopped; Ctrl-C again leaves" in result.stderr
    assert num_steps == 1
    assert llm.engine_core is core and not llm.has_unfinished_requests
    assert len(prompts) == 1
