"""The model class for lmms-eval, with a stub in place of lmms-eval."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl import LLM, SamplingParams
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.eval import lmms_plugin

ROOT = Path(__file__).resolve().parents[2]
MODULE = "qwen2vl.eval.lmms_model"


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class Lmms:
    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    def clean(self) -> None:
        self.cleaned = True


class ChatMessages:
    """As lmms_eval.protocol.ChatMessages: items have the keys type and text or url."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def to_hf_messages(self, video_kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "role": m["role"],
                "content": [self._item(item, video_kwargs) for item in m["content"]],
            }
            for m in self.messages
        ]

    @staticmethod
    def _item(item: dict[str, Any], video_kwargs: dict[str, Any]) -> dict[str, Any]:
        kind = item["type"]
        if kind == "text":
            return item
        return {"type": kind, kind: item["url"], **(video_kwargs if kind == "video" else {})}


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def lmms_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        stub(monkeypatch, package)
    stub(
        monkeypatch,
        "lmms_eval.api.instance",
        GenerationResult=GenerationResult,
        TokenCounts=TokenCounts,
    )
    stub(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
    stub(monkeypatch, "lmms_eval.protocol", ChatMessages=ChatMessages)
    stub(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield
    sys.modules.pop(MODULE, None)  # it refers to the stub


@pytest.fixture
def build() -> Callable[..., Any]:
    return import_module(MODULE).Qwen2VLModel


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((56, 84, 3), value, np.uint8))


QUESTION = "What does the picture show?"


def request(doc: Any, messages: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A request as Instance of lmms-eval; `doc` is a document of its own."""

    def doc_to_messages(doc: Any, **_: Any) -> list[dict[str, Any]]:
        media = [{"type": "image", "url": doc}] if isinstance(doc, Image.Image) else doc
        return [{"role": "user", "content": [*media, {"type": "text", "text": QUESTION}]}]

    generation = {"until": ["\n\n"], "max_new_tokens": 8, "do_sample": False, **options}
    return SimpleNamespace(args=("", messages or doc_to_messages, generation, doc, "task", "test"))


class Documents:
    """A split whose document ids are the documents, which need not be hashable."""

    def __getitem__(self, doc: Any) -> Any:
        return doc


def loaded(build: Callable[..., Any], **options: Any) -> Any:
    model = build(pretrained="nano", dtype="float32", device="cpu", **options)
    model.task_dict = {"task": {"test": Documents()}}
    return model


def test_manifest_names_the_class(build: Callable[..., Any]) -> None:
    manifest = lmms_plugin.manifest()
    assert manifest.model_id == "qwen2vl"
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert getattr(import_module(module), name) is build
    assert manifest.simple_class_path is None
    assert build.is_simple is False
    assert issubclass(build, Lmms)


def test_entry_point_is_declared() -> None:
    import tomllib

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    points = tomllib.loads(text)["project"]["entry-points"]["lmms_eval.models"]
    assert points == {"qwen2vl": f"{lmms_plugin.__name__}:{lmms_plugin.manifest.__name__}"}


def test_answers_are_those_of_the_llm(build: Callable[..., Any]) -> None:
    docs = [picture(10 * i) for i in range(5)]
    model = loaded(build, batch_size="2")
    results = model.generate_until([request(doc) for doc in docs])
    params = SamplingParams(temperature=0, max_tokens=8, skip_grounding_tokens=True)
    content = [[{"type": "image", "image": d}, {"type": "text", "text": QUESTION}] for d in docs]
    expected = model.llm.chat([[{"role": "user", "content": c}] for c in content], params)
    assert [one.text for one in results] == [one.text for one in expected]
    counts = [(one.token_counts.input_tokens, one.token_counts.output_tokens) for one in results]
    assert counts == [(one.prompt_tokens, len(one.token_ids)) for one in expected]


def test_videos_have_the_options_of_the_model(build: Callable[..., Any]) -> None:
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    clip = [{"type": "video", "url": frames}]
    few, all_frames = (
        loaded(build, **options).generate_until([request(clip)])[0].token_counts.input_tokens
        for options in ({"max_num_frames": 2}, {})
    )
    assert all_frames - few == 3 * 16  # 4 pairs of frames and 1 pair, of 4 x 4 tokens


def test_fps_and_max_num_frames(build: Callable[..., Any]) -> None:
    options = import_module(MODULE)._video_options
    assert options(None, None) == {}
    assert options(32, None) == {"nframes": 32}
    assert options(None, 1.0) == {"fps": 1.0}
    assert options(32, 1.0) == {"fps": 1.0, "max_frames": 32}


def test_a_request_that_cannot_run_gets_the_sentinel(
    build: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(build, batch_size=3)
    sound = [{"type": "audio", "url": "a.wav"}]
    first, failed, last = model.generate_until(
        [request(picture(0)), request(sound), request(picture(0))]
    )
    assert failed.text.startswith(lmms_plugin.FAILED)
    assert "audio is not supported" in failed.text and "audio is not supported" in caplog.text
    assert failed.token_counts.output_tokens is None
    assert first.text == last.text and not first.text.startswith(lmms_plugin.FAILED)


def test_a_single_failed_request_gets_the_sentinel(build: Callable[..., Any]) -> None:
    (failed,) = loaded(build).generate_until([request([{"type": "audio", "url": "a.wav"}])])
    assert failed.text.startswith(lmms_plugin.FAILED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"temperature": 0, "max_tokens": 1024}),
        ({"max_new_tokens": 5, "until": ["a"], "num_beams": 1}, {"max_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9, "seed": 3}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": None, "top_p": None}, {"temperature": None, "top_p": None}),
        ({"temperature": 0.7, "top_p": 0, "do_sample": True}, {"temperature": 0.7, "top_p": 0}),
        ({"n": 1}, {"n": 1}),
    ],
)
def test_sampling_parameters(options: dict[str, Any], expected: dict[str, Any]) -> None:
    params = import_module(MODULE)._sampling_params(options)
    assert {name: getattr(params, name) for name in expected} == expected


def test_several_answers_are_refused() -> None:
    with pytest.raises(InputError, match="n: got 2; one answer"):
        import_module(MODULE)._sampling_params({"n": 2})


def test_rounds_end_where_the_task_says(build: Callable[..., Any]) -> None:
    seen: list[Any] = []

    def rounds(doc: Any, **given: Any) -> Any:
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
        if not given:
            return messages
        seen.append(given)
        return messages, given["round_idx"] == 2, given["previous_output"], "info"

    (answers,) = loaded(build).generate_until_multi_round([request(picture(0), rounds)])
    assert len(answers) == 2
    assert [one["round_idx"] for one in seen] == [1, 2]
    assert [one["previous_round_info"] for one in seen] == [None, "info"]
    assert seen[1]["previous_output"] == answers


def test_a_task_without_further_rounds_has_one(build: Callable[..., Any]) -> None:
    (answers,) = loaded(build).generate_until_multi_round([request(picture(0))])
    assert len(answers) == 1


def test_loglikelihood_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"loglikelihood: 3 requests; .* generate_until"):
        loaded(build).loglikelihood([1, 2, 3])


def test_model_is_another_name_of_pretrained(build: Callable[..., Any]) -> None:
    assert isinstance(build(model="nano", device="cpu").llm, LLM)
    with pytest.raises(InputError, match=r"pretrained nano and model other .* give one"):
        build(pretrained="nano", model="other")


@pytest.mark.parametrize("value", ["auto", 0, "1.5"])
def test_batch_size_is_a_number(build: Callable[..., Any], value: Any) -> None:
    with pytest.raises(InputError, match=f"batch_size: got {value}, must be a whole number"):
        build(batch_size=value)


def test_unknown_arguments_are_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="device_map: there is no such model argument"):
        build(device_map="auto")
    with pytest.raises(InputError, match="engine: there is no such model argument"):
        build(engine="x")


def test_the_guide_lists_the_arguments(build: Callable[..., Any]) -> None:
    text = (ROOT / "docs/guides/lmms-eval.md").read_text(encoding="utf-8")
    table = text.partition("| model argument | |\n|---|---|\n")[2].partition("\n\n")[0]
    names = [
        name for row in table.splitlines() for name in re.findall("`(\\w+)`", row.split("|")[1])
    ]
    assert sorted(names) == sorted(import_module(MODULE).MODEL_ARGUMENTS)


def test_several_processes_are_refused(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4: .* one process"):
        build()


def test_clean_frees_the_model(build: Callable[..., Any]) -> None:
    model = loaded(build)
    model.clean()
    assert model.cleaned
    assert model.llm.engine.is_closed


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16"])
def test_an_image_is_the_same_as_its_png(
    build: Callable[..., Any], mode: str, tmp_path: Path
) -> None:
    """A client sends PNG; in-process the image itself is used."""
    gradient = np.arange(56 * 84 * 4, dtype=np.uint32).reshape(56, 84, 4)
    image = Image.fromarray((gradient % 251).astype(np.uint8))
    image = (
        Image.fromarray((gradient[..., 0] * 13 % 65521).astype(np.uint16))
        if mode == "I;16"
        else image.convert("RGB").convert("P")
        if mode == "P"
        else image.convert(mode)
    )
    image.save(tmp_path / "image.png")
    model = loaded(build)
    items = [
        model.llm.prepare([{"role": "user", "content": [{"type": "image", "image": one}]}])
        for one in (image, str(tmp_path / "image.png"))
    ]
    one, other = (item.prompt.items[0] for item in items)
    assert one.pair_digests == other.pair_digests
