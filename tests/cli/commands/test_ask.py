"""`ask`: streaming, JSON, file names, boxes, prompt summary, and errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import qwen2vl
from qwen2vl.cli import options, prompt_summary
from qwen2vl.cli.options import LoadedModel
from qwen2vl.engine import LLM, Completion, SamplingParams
from qwen2vl.engine.ttft import Throughput
from qwen2vl.weights import read_config
from tests import media
from tests.adapters import TEXT, write_adapter
from tests.cli.conftest import Run

KEYS = {
    "text",
    "raw_text",
    "adapter",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "image_tokens",
    "video_tokens",
    "items",
    "boxes",
    "seconds",
}


def test_an_answer_streams_to_stdout(run: Run, tiny_folder: Path) -> None:
    result = run("ask", "--model", tiny_folder, "Hi", "--max-tokens", 4)
    assert result.exit_code == 0
    (completion,) = qwen2vl.LLM(tiny_folder).chat(
        [{"role": "user", "content": "Hi"}], qwen2vl.SamplingParams(max_tokens=4)
    )
    assert result.stdout == completion.text.removesuffix("\n") + "\n"
    assert result.stderr == "qwen2vl: the answer was cut after 4 tokens; --max-tokens allows more\n"


def test_json_output_has_exactly_these_keys(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run(
        "ask", "--model", tiny_folder, "--image", image_file, "Hi", "--max-tokens", 4, "--json"
    )
    answer = json.loads(result.stdout)
    assert set(answer) == KEYS
    assert set(answer["seconds"]) == {"load", "process", "queue", "vision", "prefill", "decode"}
    assert all(seconds > 0 for seconds in answer["seconds"].values())
    (item,) = answer["items"]
    assert item["name"] == "a photo.png"
    assert item["original_size"] == [100, 150]
    assert answer["image_tokens"] == item["tokens"] == 20
    assert len(answer["token_ids"]) == 4
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights(run: Run, tiny_folder: Path, image_file: Path, mode: str) -> None:
    result = run(
        *("ask", "--model", tiny_folder, "--quantize", mode, "--image", image_file),
        *("Hi", "--max-tokens", 4, "--json"),
    )
    assert result.exit_code == 0
    llm = qwen2vl.LLM(tiny_folder, quantize=mode)  # type: ignore[arg-type]
    content = [{"type": "image", "image": str(image_file)}, {"type": "text", "text": "Hi"}]
    messages = [{"role": "user", "content": content}]
    (completion,) = llm.chat(messages, qwen2vl.SamplingParams(max_tokens=4))
    assert json.loads(result.stdout)["token_ids"] == list(completion.token_ids)


def test_an_int8_kv_cache(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run(
        *("ask", "--model", tiny_folder, "--kv-cache-dtype", "int8", "--image", image_file),
        *("Hi", "--max-tokens", 4, "--json"),
    )
    assert result.exit_code == 0
    llm = qwen2vl.LLM(tiny_folder, kv_cache_dtype="int8")
    (completion,) = llm.chat("Hi", images=str(image_file), max_tokens=4)
    assert json.loads(result.stdout)["token_ids"] == list(completion.token_ids)


def test_an_unknown_precision_is_a_usage_error(run: Run, tiny_folder: Path) -> None:
    result = run("ask", "--model", tiny_folder, "--quantize", "int2", "Hi")
    assert result.exit_code == 2
    assert "'int2' is not one of 'int8', 'int4'" in result.stderr
    result = run("ask", "--model", tiny_folder, "--kv-cache-dtype", "fp8", "Hi")
    assert result.exit_code == 2
    assert "'fp8' is not one of 'auto', 'int8'" in result.stderr


def test_an_empty_question_is_a_usage_error(run: Run, tiny_folder: Path) -> None:
    result = run("ask", "--model", tiny_folder, " ")
    assert result.exit_code == 2
    assert "QUESTION is empty" in result.stderr


def test_an_adapter_changes_the_answer(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    vocab_size = read_config(tiny_folder).text.vocab_size
    letter_x = torch.zeros(vocab_size, 2)
    letter_x[ord("x") - ord("!")] = 1e4
    key = "base_model.model.lm_head.lora"
    ones = torch.ones(2, 64)
    save_file(
        {f"{key}_A.weight": ones, f"{key}_B.weight": letter_x}, folder / "adapter_model.safetensors"
    )
    ask = ("ask", "--model", tiny_folder, "Hi", "--max-tokens", 4)
    plain, adapted = run(*ask), run(*ask, "--adapter", folder)
    assert "x" in adapted.stdout
    assert plain.stdout != adapted.stdout


def test_structured_output(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    (tmp_path / "two.json").write_text(json.dumps(schema))
    ask = ("ask", "--model", tiny_folder, "Well?")
    assert run(*ask, "--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    assert re.fullmatch(r"[0-9]{3}\n", run(*ask, "--regex", "[0-9]{3}").stdout)
    for given in ("two.json", json.dumps(schema)):
        answer = json.loads(run(*ask, "--json-schema", given).stdout)
        assert [type(value) for value in answer] == [bool, bool]


def test_structured_output_of_boxes(run: Run, tiny_folder: Path, image_file: Path) -> None:
    result = run(
        *("ask", "--model", tiny_folder, "--image", image_file, "Where?", "--boxes"),
        *("--max-tokens", 300, "--json"),
    )
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "stop"
    point = r"\(\d{1,3},\d{1,3}\)"
    named = r"(<\|object_ref_start\|>.+?<\|object_ref_end\|>)?"
    item = rf"{named}<\|box_start\|>{point},{point}<\|box_end\|>\n?"
    assert re.fullmatch(rf"({item})+", answer["raw_text"])
    assert "<|" not in answer["text"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--boxes", "--regex", "a"], 2, "--regex and --boxes are mutually exclusive"),
        (["--json-schema", "none.json"], 2, "none.json: cannot be read: No such file or directory"),
        (["--json-schema", '{"type":'], 2, "JSON schema"),
        (["--json-schema", "photo"], 2, "photo: is not text in UTF-8"),
        (["--regex", "("], 2, "regex: unclosed group at character 1"),
        (["--choice", ""], 2, "choice: got '', must be a text"),
    ],
)
def test_invalid_structured_output_options(
    run: Run, tiny_folder: Path, tmp_path: Path, flags: list[str], code: int, message: str
) -> None:
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff")
    result = run("ask", "--model", tiny_folder, "Hi", *flags)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_a_missing_adapter(run: Run, tiny_folder: Path) -> None:
    result = run("ask", "--model", tiny_folder, "--adapter", "nowhere", "Hi")
    assert result.exit_code == 2
    assert result.stderr == (
        "qwen2vl: error: adapter 'nowhere': no such folder; give the folder that PEFT saved\n"
    )


def test_a_video_is_sampled_at_the_given_fps(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (112, 112), (25 * i,) * 3) for i in range(8)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:], duration=500)

    def times(fps: float) -> list[float]:
        result = run(
            *("ask", "--model", tiny_folder, "--video", "c.gif", "--fps", fps),
            *("What moves?", "--max-tokens", 1, "--json"),
        )
        answer = json.loads(result.stdout)
        assert answer["video_tokens"] == answer["items"][0]["tokens"] > 0
        return answer["items"][0]["frame_timestamps"]

    assert len(times(2.0)) == 8
    assert len(times(1.0)) == 4


def test_seeds_and_temperature_reach_the_sampler(run: Run, tiny_folder: Path) -> None:
    def ask(*more: object) -> str:
        return run("ask", "--model", tiny_folder, "Hi", "--max-tokens", 20, *more).stdout

    drawn = ask("--temperature", 1.5, "--seed", 1)
    assert drawn == ask("--temperature", 1.5, "--seed", 1)
    assert drawn != ask("--temperature", 1.5, "--seed", 2)
    assert ask("--temperature", 1.5, "--top-k", 1) == ask("--temperature", 0)


@pytest.mark.parametrize(
    "name", ["two words.png", "-x.png", "[1]*.png", "\u56fe \u00e9.png", "~x.png"]
)
def test_any_file_name_works(run: Run, tiny_folder: Path, image_file: Path, name: str) -> None:
    image_file.rename(image_file.with_name(name))
    given = f"./{name}" if name.startswith("~") else name
    arguments = ["ask", "--model", tiny_folder, "--image", given, "Hi", "--max-tokens", 1, "--json"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["items"][0]["name"] == name


def test_tilde_is_the_home_folder(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(image_file.parent))
    result = run("ask", "--model", tiny_folder, "--image", "~/a photo.png", "Hi", "--max-tokens", 1)
    assert result.exit_code == 0, result.stderr


def test_pixel_limits_reach_the_processor(run: Run, tiny_folder: Path, image_file: Path) -> None:
    def tokens(*more: object) -> int:
        base = ["ask", "--model", tiny_folder, "--image", image_file, "Hi", "--max-tokens", 1]
        return json.loads(run(*base, "--json", *more).stdout)["image_tokens"]

    assert tokens("--max-pixels", 4 * 784) <= 4
    assert tokens("--max-pixels", 784) == 1  # below the model's min_pixels
    assert tokens("--min-pixels", 100 * 784) >= 100


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--image", "none.png"], 2, "file 'none.png' not found"),
        (["--temperature", "-1"], 2, "temperature: got -1.0"),
        (["--temperature", "nan"], 2, "temperature: got nan"),
        (["--max-tokens", "0"], 2, "max_tokens: got 0"),
        (["--seed", str(2**64)], 2, "seed: got 18446744073709551616"),
        (["--top-k", "-5"], 2, "top_k: got -5"),
        (["--top-p", "1.1"], 2, "top_p: got 1.1"),
        (["--device", "abacus"], 2, "device 'abacus' is unknown"),
        (["--fps", "0"], 2, "--fps': got 0, must be from"),
        (["--fps", "nan"], 2, "--fps': got nan, must be from"),
        (["--max-pixels", "-3"], 2, "max_pixels"),
        (["--min-pixels", "9999999", "--max-pixels", "3136"], 2, "min_pixels 9999999"),
        (["-o", "boxes.png"], 2, "draws boxes on the images and videos of the prompt, got none"),
    ],
)
def test_errors_are_one_line(
    run: Run, tiny_folder: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("ask", "--model", tiny_folder, "Hi", *arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("qwen2vl: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "the folder is empty; fill it with `hf download"),
        (lambda path: path.write_text("x"), "is a file; give the folder"),
    ],
)
def test_errors_about_model_folders_name_the_remedy(
    run: Run, tmp_path: Path, make: Any, message: str
) -> None:
    make(tmp_path / "model")
    result = run("ask", "--model", tmp_path / "model", "Hi")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_one_token_is_singular(run: Run, tiny_folder: Path) -> None:
    result = run("ask", "--model", tiny_folder, "Hi", "--max-tokens", 1)
    assert "the answer was cut after 1 token; --max-tokens" in result.stderr


def test_a_missing_file_is_reported_without_the_import_of_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qwen2vl.cli.main import main; main(['ask', 'nope.png', 'What?'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "qwen2vl: error: file 'nope.png' not found; check the path\n"
    assert done.returncode == 2


def test_output_is_checked_before_the_model_is_loaded(run: Run, image_file: Path) -> None:
    for output, message in (
        ("boxes.txt", "ends in .png"),
        ("no/boxes.png", "does not exist"),
        ("no/a/", "/no does not exist"),
    ):
        result = run("ask", "--model", "nowhere", "--image", image_file, "Hi", "-o", output)
        assert result.exit_code == 2
        assert message in result.stderr


@dataclass
class ScriptedLLM:
    """An LLM whose completions have a given text; everything else is real."""

    real: LLM
    text: str
    asked: list[Any] = field(default_factory=list)
    asked_params: list[SamplingParams] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def prepare(self, messages: Any, params: SamplingParams) -> Any:
        self.asked_params.append(params)
        return self.real.prepare(messages, params)

    def generate_prepared(
        self, prepared: Any, *, on_delta: Any = None, on_step: Any = None
    ) -> list[Completion]:
        self.asked.append(prepared[0].prompt)
        if on_delta:
            on_delta(qwen2vl.engine.Delta(index=0, text=self.text, finish_reason="stop"))
        (completion,) = self.real.generate_prepared(prepared)
        return [_replace(completion, self.text)]


def _replace(completion: Completion, text: str) -> Completion:
    values = {name: getattr(completion, name) for name in Completion.__dataclass_fields__}
    return Completion(**{**values, "text": text, "finish_reason": "stop"})


def scripted_llm(
    monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, name: str = "x", **given: Any
) -> ScriptedLLM:
    llm = ScriptedLLM(qwen2vl.LLM(folder, **given), text)
    loaded = LoadedModel(llm=llm, name=name, load_seconds=0.1, is_default=name == "nano")  # type: ignore[arg-type]
    monkeypatch.setattr(options, "load_model_from_options", lambda given: loaded)
    return llm


BOX_TEXT = (
    "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|>"
)


@pytest.fixture
def white(tmp_path: Path) -> Path:
    """Write a white image of 1000 x 500."""
    path = tmp_path / "white.png"
    Image.new("RGB", (1000, 500), "white").save(path)
    return path


def test_boxes_are_printed_and_drawn_in_pixels_of_the_original_image(
    run: Run, tiny_folder: Path, tmp_path: Path, white: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, BOX_TEXT)
    result = run("ask", "--image", white, "Where?", "-o", "boxes.png", "--max-pixels", 3136)
    assert result.exit_code == 0
    assert result.stdout == "the cat: (100, 100) to (500, 400)\n"
    assert "wrote boxes.png" in result.stderr
    drawn = Image.open(tmp_path / "boxes.png")
    assert drawn.size == (1000, 500)
    ground = (255, 255, 255)
    assert all(drawn.getpixel(at) != ground for at in [(100, 250), (500, 250), (300, 400)])
    assert all(drawn.getpixel(at) == ground for at in [(300, 250), (600, 250), (300, 450)])


def test_json_output_has_boxes_in_pixels(
    run: Run, tiny_folder: Path, white: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, BOX_TEXT)
    answer = json.loads(run("ask", "--image", white, "Where?", "--json").stdout)
    assert answer["boxes"] == [{"phrase": "the cat", "pixels": [[100, 100], [500, 400]], "item": 0}]
    assert answer["text"] == "the cat: (100, 100) to (500, 400)"
    assert answer["raw_text"] == BOX_TEXT


def test_special_tokens_may_be_kept(
    run: Run, tiny_folder: Path, white: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = scripted_llm(monkeypatch, tiny_folder, BOX_TEXT)
    command = ["ask", "--image", white, "Where?", "--no-skip-special-tokens"]
    assert run(*command).stdout == f"{BOX_TEXT}\n"
    assert llm.asked_params[-1].skip_special_tokens is False
    assert json.loads(run(*command, "--json").stdout)["text"] == BOX_TEXT


@pytest.mark.parametrize(
    ("preset", "size", "corner"),
    [("paper", (500, 1000), (50, 200)), ("qwen_vl_utils_0_0_8", (1000, 500), (100, 100))],
)
def test_boxes_have_the_orientation_of_the_preset(
    run: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    size: tuple[int, int],
    corner: tuple[int, int],
) -> None:
    path = tmp_path / "on its side.png"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (1000, 500), "white").save(path, exif=exif)
    scripted_llm(monkeypatch, tiny_folder, BOX_TEXT, video_preset=preset)
    result = run("ask", "--image", path, "Where?", "-o", "boxes.png")
    assert f"the cat: ({corner[0]}, {corner[1]}) to" in result.stdout
    drawn = Image.open(tmp_path / "boxes.png")
    assert drawn.size == size
    assert drawn.getpixel((corner[0], corner[1] + 30)) != (255, 255, 255)


def test_without_boxes_no_image_is_written(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "Nothing to see.")
    result = run("ask", "--image", image_file, "Where?", "-o", "boxes.png")
    assert result.exit_code == 0
    assert "the answer has no boxes: boxes.png was not written" in result.stderr
    assert not Path("boxes.png").exists()


def test_the_limits_of_nano_are_noted_where_they_matter(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(drawing).ellipse((30, 20, 80, 70), fill="red")
    drawing.save(tmp_path / "drawing.png")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    scripted_llm(monkeypatch, tiny_folder, "Hello.", name="nano")
    for prompt in (("Hi",), ("photo.png", "Hi")):
        (line,) = run("ask", *prompt).stderr.splitlines()
        assert "--model Qwen/Qwen2-VL-2B-Instruct (downloads 4.4 GB once)" in line
    assert run("ask", "drawing.png", "Hi").stderr == ""
    assert run("ask", "--json", "photo.png", "Hi").stderr == ""
    scripted_llm(monkeypatch, tiny_folder, "Hello.", name="a folder")
    assert run("ask", "photo.png", "Hi").stderr == ""


def test_a_long_ttft_is_reported_with_an_option_that_reduces_it(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (1568, 1176)).save(path)
    monkeypatch.setattr(prompt_summary, "NEGLIGIBLE_FLOPS", 0.0)
    monkeypatch.setattr(Throughput, "measure", lambda model: Throughput(vision=2e7, text=1e7))
    llm = scripted_llm(monkeypatch, tiny_folder, "Gray.")
    result = run("ask", "--image", path, "Hi", "--max-tokens", 1)
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(
        r"qwen2vl: photo.jpg 1568 x 1176 -> 2,352 tokens, about \d+ min here; "
        r"--max-pixels 1003520 gives at most 1,280, about \d+ min",
        line,
    )
    assert len(llm.asked) == 1


def test_a_long_ttft_for_a_video_suggests_a_lower_fps(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.mp4"
    path.write_bytes(media.encoded_video(64, rate=8))
    monkeypatch.setattr(prompt_summary, "NEGLIGIBLE_FLOPS", 0.0)
    monkeypatch.setattr(Throughput, "measure", lambda model: Throughput(vision=2e5, text=1e5))
    scripted_llm(monkeypatch, tiny_folder, "Gray.")
    line = run("ask", "--video", path, "Hi", "--max-tokens", 1).stderr.splitlines()[0]
    assert re.search(
        r"16 frames -> \d+ tokens, about \d+ min here; "
        r"--fps 0\.5 shows a quarter of the frames, about \d+",
        line,
    ), line


def test_a_prompt_that_exceeds_the_context_is_an_error_before_the_ttft_estimate(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_summary, "NEGLIGIBLE_FLOPS", 0.0)
    scripted_llm(monkeypatch, tiny_folder, "Never.", max_model_len=50)
    result = run("ask", "--image", image_file, "Hi")
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "text + 20 image tokens, more than 50, the context" in line


def test_a_short_ttft_is_not_reported(
    run: Run, tiny_folder: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "Gray.")
    assert run("ask", "--image", image_file, "Hi").stderr == ""


def test_truncation_by_the_context_does_not_suggest_max_tokens(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = qwen2vl.LLM(tiny_folder)
    llm.max_model_len = len(llm.processor([{"role": "user", "content": "Hi"}]).input_ids) + 3
    loaded = LoadedModel(llm=llm, name="x", load_seconds=0.1)
    monkeypatch.setattr(options, "load_model_from_options", lambda given: loaded)
    (line,) = run("ask", "Hi").stderr.splitlines()
    assert f"cut after 3 tokens, where the context of {llm.max_model_len} is full" in line
    assert "--max-tokens" not in line


def test_preprocessing_notes_are_reported(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (60, 60), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    scripted_llm(monkeypatch, tiny_folder, "Red.")
    result = run("ask", "--image", "two.gif", "Hi")
    assert re.fullmatch(r"qwen2vl: two\.gif: .*first.*\n", result.stderr)


def test_files_and_flags_become_one_prompt_in_order(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    for name in ("a.png", "b.png"):
        frames[0].save(tmp_path / name)
    llm = scripted_llm(monkeypatch, tiny_folder, "Hi.")
    given = ("a.png", "--video", "clip.gif", "--image", "b.png", "clip.gif", "What is it?")
    assert run("ask", *given, "--system", "Be brief.").exit_code == 0
    (prompt,) = llm.asked
    assert [(item.kind, item.name) for item in prompt.items] == [
        ("image", "a.png"),
        ("video", "clip.gif"),
        ("image", "b.png"),
        ("video", "clip.gif"),
    ]
    text = llm.processor.tokenizer.decode(prompt.input_ids, keep_special="all")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "What is it?<|im_end|>" in text


def test_an_image_from_stdin(run: Run, tiny_folder: Path, image_file: Path) -> None:
    ask = ("ask", "--model", tiny_folder, "Hi", "--max-tokens", 4, "--json")
    piped = json.loads(run(*ask, "--image", "-", stdin=image_file.read_bytes()).stdout)
    named = json.loads(run(*ask, "--image", image_file).stdout)
    assert piped["token_ids"] == named["token_ids"]
    assert piped["image_tokens"] == 20


@pytest.mark.parametrize(
    ("arguments", "notes"),
    [
        (["--fps", "1"], ["--fps has no effect without a video"]),
        (["--max-pixels", "9999"], ["--max-pixels has no effect without an image or video"]),
        (
            ["--choice", "red, green"],
            ["--choice 'red, green' is one choice; for several, repeat it: --choice red --choice "],
        ),
        (["--choice", "red, green", "--choice", "blue"], []),
    ],
)
def test_options_without_effect_are_named(
    run: Run,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    notes: list[str],
) -> None:
    scripted_llm(monkeypatch, tiny_folder, "red")
    lines = run("ask", "Hi", *arguments).stderr.splitlines()
    assert len(lines) == len(notes)
    for line, note in zip(lines, notes, strict=True):
        assert line.startswith(f"qwen2vl: {note}")


def test_boxes_are_drawn_on_each_of_several_files(
    run: Run, tiny_folder: Path, tmp_path: Path, white: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grays = (255, 251, 247, 243)  # equal frames would be merged
    frames = [Image.new("RGB", (560, 280), (gray,) * 3) for gray in grays]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    scripted_llm(monkeypatch, tiny_folder, BOX_TEXT)
    result = run("ask", white, "clip.gif", "Where?", "-o", "boxes.png")
    assert result.stdout == (
        "the cat: (100, 100) to (500, 400) in white.png, (56, 56) to (280, 224) in clip.gif\n"
    )
    assert "does not say in which of 2 images or videos its boxes are" in result.stderr
    image, sheet = Image.open("boxes-1.png"), Image.open("boxes-2.png")
    assert image.getpixel((100, 250)) != (255, 255, 255)
    assert sheet.width == 4 * 560
    pixels = np.asarray(sheet)
    for frame, gray in enumerate(grays):  # the left border of the box
        assert abs(int(pixels[250, frame * 560 + 300, 0]) - gray) < 4
        assert pixels[140, frame * 560 + 56, 1] < 100
    for output in ("drawn/", "drawn"):  # made by the first
        assert run("ask", white, "clip.gif", "Where?", "-o", output).exit_code == 0
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["clip.png", "white.png"]


def test_adapters_with_names_answer_in_turn(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, qwen2vl.load(tiny_folder)[0], TEXT, seed=seed)
    ask = ("ask", "--model", tiny_folder, "Hi", "--max-tokens", 6)
    named = ("--adapter", "first=one", "--adapter", "second=two")
    lines = [json.loads(line) for line in run(*ask, *named, "--json").stdout.splitlines()]
    assert [line["adapter"] for line in lines] == ["first", "second"]
    merged = [
        json.loads(run(*ask, "--adapter", name, "--json").stdout)["token_ids"]
        for name in ("one", "two")
    ]
    assert [line["token_ids"] for line in lines] == merged
    assert merged[0] != merged[1]
    text = run(*ask, *named).stdout
    assert text.startswith("first:\n") and "\nsecond:\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "a", "--adapter", "b"], "needs a name: --adapter NAME=a"),
        (["--adapter", "x=a", "--adapter", "x=b"], "the name x is given twice"),
        (["--adapter", "x=a", "--compile"], "cannot be compiled; give one without a name"),
        (["--adapter", "run"], "is no adapter, but the folder of a run; give the adapter inside, "),
        (["--adapter", "x=run"], "run/adapter-000020, the last of 2"),
    ],
)
def test_unusable_adapters(run: Run, tiny_folder: Path, arguments: list[str], message: str) -> None:
    for steps in (10, 20):
        folder = Path("run") / f"adapter-{steps:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").touch()
    result = run("ask", "--model", tiny_folder, "Hi", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
