"""Parity with transformers: injected faults are located at the first step that differs."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl.convert import quantize_folder
from qwen2vl.errors import CheckpointError
from qwen2vl.eval.parity import (
    ActivationRecorder,
    ParityPrompt,
    ParityReport,
    StepComparison,
    Trace,
    compare,
    model_tracer,
    run_model,
    synthetic_prompt,
)
from qwen2vl.eval.reference import prepare, reference_tracer, run_reference
from qwen2vl.loading import load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor
from tests.eval.faults import FAULTS
from tests.folders import edit_json, write_tiny
from tests.quantized_folders import AWQ, GPTQ, W8A8, w4a16, write_quantized
from tests.tiny import tiny_config, tiny_model


@dataclass
class ParitySetup:
    """A tiny model, and the reference trace of the synthetic prompt."""

    folder: Path
    model: Qwen2VL
    processor: Processor
    reference: Trace

    def report(self, model: Qwen2VL, processor: Processor | None = None) -> ParityReport:
        inputs = (processor or self.processor)(synthetic_prompt().messages)
        return compare(run_model(model, inputs), self.reference)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> ParitySetup:
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    model = write_tiny(folder)
    processor = load_processor(folder)
    reference = reference_tracer(folder, processor)(synthetic_prompt())
    return ParitySetup(folder, model, processor, reference)


def test_model_matches_the_reference_in_every_step(setup: ParitySetup) -> None:
    report = compare(
        model_tracer(setup.folder, setup.processor)(synthetic_prompt()), setup.reference
    )
    assert report.first_divergence is None
    assert 0 < report.worst.relative < 1e-5
    assert [step.name for step in report.steps] == [
        "pixels",
        "grids",
        "ids",
        "positions",
        "rope_delta",
        "vision.patch_embed",
        "vision.rotary",
        "vision.block.0",
        "vision.block.1",
        "vision.merger",
        "text.rotary",
        "text.embeddings",
        "text.layer.0",
        "text.layer.1",
        "text.norm",
        "logits",
    ]


def test_text_only_prompt_has_no_vision_steps(setup: ParitySetup) -> None:
    prompt = ParityPrompt("What is 2 + 2?", ())
    trace = model_tracer(setup.folder, setup.processor)(prompt)
    reference = reference_tracer(setup.folder, setup.processor)(prompt)
    assert compare(trace, reference).first_divergence is None
    assert not [name for name in trace if name.startswith("vision.") or name in ("pixels", "grids")]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_located_at_its_step(
    setup: ParitySetup, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, inject = FAULTS[name]
    model = deepcopy(setup.model)
    inject(monkeypatch, model)
    first = setup.report(model).first_divergence
    assert first is not None and first.name == expected


# Folders that transformers alone cannot open ---------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        AWQ | {"bits": 4, "group_size": 32},
        GPTQ | {"bits": 8, "group_size": 32},
        W8A8,
        w4a16(32, symmetric=False),
    ],
    ids=["awq", "gptq", "w8a8", "w4a16"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_folders_are_compared_dequantized(
    tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    folder = tmp_path / "quantized"
    model = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    plain = write_quantized(folder, settings, model=model)
    processor = load_processor(folder)
    trace = model_tracer(folder, processor)(synthetic_prompt())
    plain_trace = run_model(plain, processor(synthetic_prompt().messages))
    assert compare(trace, plain_trace).worst.relative < 1e-6
    report = compare(trace, reference_tracer(folder, processor)(synthetic_prompt()))
    assert report.first_divergence is None


def test_folder_of_quantize_is_compared(setup: ParitySetup, tmp_path: Path) -> None:
    quantize_folder(setup.folder, tmp_path / "int8", "int8")
    processor = load_processor(tmp_path / "int8")
    trace = model_tracer(tmp_path / "int8", processor)(synthetic_prompt())
    reference = reference_tracer(tmp_path / "int8", processor)(synthetic_prompt())
    assert compare(trace, reference).first_divergence is None
    # Not of the unquantized source: the weights that are stored are the ones compared.
    assert compare(trace, setup.reference).first_divergence is not None


@pytest.mark.parametrize("place", ["chat_template.json", "nowhere"])
def test_template_outside_of_the_tokenizer_is_found(tmp_path: Path, place: str) -> None:
    """Released folders may have it in chat_template.json alone."""
    write_tiny(tmp_path / "model")
    edit_json(tmp_path / "model" / "tokenizer_config.json", chat_template=None)
    if place == "nowhere":
        (tmp_path / "model" / "chat_template.json").unlink()
    processor = load_processor(tmp_path / "model")
    inputs = prepare(tmp_path / "model", processor, synthetic_prompt())
    assert inputs.ids == processor(synthetic_prompt().messages).input_ids


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "transformers cannot open the image processor: OSError: "),
        ("{", "transformers cannot open the image processor: OSError: "),
    ],
)
def test_errors_of_transformers_name_folder_and_remedy(
    setup: ParitySetup, tmp_path: Path, content: str | None, text: str
) -> None:
    folder = tmp_path / "model"
    write_tiny(folder)
    (folder / "preprocessor_config.json").unlink()
    if content is not None:
        (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        prepare(folder, setup.processor, synthetic_prompt())
    message = str(caught.value)
    assert message.startswith(f"{folder}: {text}")
    assert "fetch the missing file" in message and "\n" not in message


# The comparison itself ------------------------------------------------------------------------


def test_errors_are_relative_to_the_reference() -> None:
    reference = {"a": torch.tensor([1.0, -50.0])}
    report = compare({"a": torch.tensor([1.5, -50.0])}, reference, tolerance=0.02)
    assert report.steps == (StepComparison("a", 0.5, 0.01, 0.02),)
    assert report.first_divergence is None
    assert compare({"a": torch.tensor([1.5, -52.0])}, reference, tolerance=0.02).first_divergence


def test_integers_and_pixels_must_be_exactly_equal() -> None:
    report = compare({"ids": torch.tensor([10**6 + 1])}, {"ids": torch.tensor([10**6])}, 1.0)
    assert report.first_divergence == StepComparison("ids", 1.0, 1e-6, 0.0)


def test_error_is_absolute_for_a_reference_of_zeros() -> None:
    zeros = {"a": torch.zeros(2)}
    assert compare(zeros, zeros).first_divergence is None
    assert compare({"a": torch.tensor([0.0, 0.25])}, zeros).steps[0].relative == 0.25


def test_nan_never_matches() -> None:
    broken = {"a": torch.tensor([math.nan])}
    assert compare(broken, {"a": torch.ones(1)}).first_divergence
    assert compare(broken, broken).first_divergence


def test_different_shapes_and_missing_steps_are_noted() -> None:
    reference = {"a": torch.zeros(2), "b": torch.zeros(1)}
    steps = compare({"a": torch.zeros(3), "c": torch.zeros(1)}, reference).steps
    assert [(step.name, step.note, step.matches) for step in steps] == [
        ("a", "shapes (3,) and (2,)", False),
        ("b", "only in the reference", False),
        ("c", "only in this library", False),
    ]


def test_the_first_divergence_is_the_first_in_order() -> None:
    reference = {name: torch.ones(1) for name in "abc"}
    trace = reference | {"b": torch.tensor([1.1]), "c": torch.tensor([9.0])}
    report = compare(trace, reference)
    assert report.first_divergence is not None and report.first_divergence.name == "b"
    assert report.worst.name == "c"


def test_hooks_are_removed_after_an_exception() -> None:
    module = nn.Linear(2, 2)
    recorder = ActivationRecorder()

    def fail() -> None:
        with recorder.recording():
            recorder.record_output("out", module)
            module(torch.zeros(1, 3))

    with pytest.raises(RuntimeError):
        fail()
    module(torch.zeros(1, 2))
    assert not recorder.activations and not module._forward_hooks


# The reference ----------------------------------------------------------------------------------


def test_frames_of_a_video_are_interleaved(setup: ParitySetup) -> None:
    """Each half of a video patch equals the patch of that frame processed as an image."""
    video = synthetic_prompt().media[1][1]
    interleaved = prepare(setup.folder, setup.processor, ParityPrompt("?", (("video", video),)))
    stills = prepare(
        setup.folder, setup.processor, ParityPrompt("?", tuple(("image", frame) for frame in video))
    )
    assert interleaved.grids == ((4, 4, 6),)
    halves = interleaved.patches[0].view(4, 24, 3, 2, 196)
    for index, still in enumerate(stills.patches):
        for patches in still.view(24, 3, 2, 196).unbind(2):
            assert torch.equal(halves[index // 2, :, :, index % 2], patches)


def test_reference_runs_on_a_text_only_prompt(setup: ParitySetup) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(setup.folder, dtype=torch.float32)
    prompt = prepare(setup.folder, setup.processor, ParityPrompt("Hello", ()))
    trace = run_reference(model, prompt)
    assert trace["positions"].tolist() == [list(range(len(prompt.ids)))] * 3
    assert trace["logits"].shape == (len(prompt.ids), setup.processor.config.text.vocab_size)
