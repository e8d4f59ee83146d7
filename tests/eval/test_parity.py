"""The comparison names the first step that differs: shown by injecting faults on our side."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from qwen2vl.eval.parity import (
    Question,
    Recorder,
    Report,
    Step,
    Trace,
    compare,
    drawn_question,
    our_side,
    run_model,
)
from qwen2vl.eval.reference import prepare, reference_side, run_reference
from qwen2vl.loading import load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor
from tests.eval.faults import FAULTS
from tests.folders import write_tiny


@dataclass
class Bench:
    """A tiny model beside the reference's trace of the drawn question."""

    folder: Path
    model: Qwen2VL
    processor: Processor
    theirs: Trace

    def report(self, model: Qwen2VL, processor: Processor | None = None) -> Report:
        inputs = (processor or self.processor)(drawn_question().messages)
        return compare(run_model(model, inputs), self.theirs)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("parity") / "tiny"
    model = write_tiny(folder)
    processor = load_processor(folder)
    theirs = reference_side(folder, processor)(drawn_question())
    return Bench(folder, model, processor, theirs)


def test_a_sound_model_agrees_in_every_step(bench: Bench) -> None:
    report = compare(our_side(bench.folder, bench.processor)(drawn_question()), bench.theirs)
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


def test_text_alone_has_no_steps_of_vision(bench: Bench) -> None:
    question = Question("What is 2 + 2?", ())
    ours = our_side(bench.folder, bench.processor)(question)
    theirs = reference_side(bench.folder, bench.processor)(question)
    assert compare(ours, theirs).first_divergence is None
    assert not [name for name in ours if name.startswith("vision.") or name in ("pixels", "grids")]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named_at_its_step(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, inject = FAULTS[name]
    model = deepcopy(bench.model)
    inject(monkeypatch, model)
    first = bench.report(model).first_divergence
    assert first is not None and first.name == expected


# The comparison itself ------------------------------------------------------------------------


def test_errors_are_relative_to_the_reference() -> None:
    theirs = {"a": torch.tensor([1.0, -50.0])}
    report = compare({"a": torch.tensor([1.5, -50.0])}, theirs, tolerance=0.02)
    assert report.steps == (Step("a", 0.5, 0.01, 0.02),)
    assert report.first_divergence is None
    assert compare({"a": torch.tensor([1.5, -52.0])}, theirs, tolerance=0.02).first_divergence


def test_integers_and_pixels_must_be_equal() -> None:
    report = compare({"ids": torch.tensor([10**6 + 1])}, {"ids": torch.tensor([10**6])}, 1.0)
    assert report.first_divergence == Step("ids", 1.0, 1e-6, 0.0)


def test_a_reference_of_zeros_is_measured_absolutely() -> None:
    zeros = {"a": torch.zeros(2)}
    assert compare(zeros, zeros).first_divergence is None
    assert compare({"a": torch.tensor([0.0, 0.25])}, zeros).steps[0].relative == 0.25


def test_not_a_number_agrees_with_nothing() -> None:
    broken = {"a": torch.tensor([math.nan])}
    assert compare(broken, {"a": torch.ones(1)}).first_divergence
    assert compare(broken, broken).first_divergence


def test_shapes_and_missing_steps_are_told() -> None:
    theirs = {"a": torch.zeros(2), "b": torch.zeros(1)}
    steps = compare({"a": torch.zeros(3), "c": torch.zeros(1)}, theirs).steps
    assert [(step.name, step.note, step.agrees) for step in steps] == [
        ("a", "shapes (3,) and (2,)", False),
        ("b", "only the reference did", False),
        ("c", "only we did", False),
    ]


def test_the_first_divergence_is_the_first_in_order() -> None:
    theirs = {name: torch.ones(1) for name in "abc"}
    ours = theirs | {"b": torch.tensor([1.1]), "c": torch.tensor([9.0])}
    report = compare(ours, theirs)
    assert report.first_divergence is not None and report.first_divergence.name == "b"
    assert report.worst.name == "c"


def test_hooks_are_taken_off_even_after_a_failure() -> None:
    module = nn.Linear(2, 2)
    recorder = Recorder()

    def fail() -> None:
        with recorder.listening():
            recorder.keep_output("out", module)
            module(torch.zeros(1, 3))

    with pytest.raises(RuntimeError):
        fail()
    module(torch.zeros(1, 2))
    assert not recorder.heard and not module._forward_hooks


# The reference's side --------------------------------------------------------------------------


def test_a_clip_is_woven_as_its_frames_are_shown(bench: Bench) -> None:
    """Each half of a clip's patch is the same patch of a picture of that frame."""
    clip = drawn_question().media[1][1]
    woven = prepare(bench.folder, bench.processor, Question("?", (("video", clip),)))
    stills = prepare(
        bench.folder, bench.processor, Question("?", tuple(("image", frame) for frame in clip))
    )
    assert woven.grids == ((4, 4, 6),)
    halves = woven.patches[0].view(4, 24, 3, 2, 196)
    for index, still in enumerate(stills.patches):
        for shown in still.view(24, 3, 2, 196).unbind(2):
            assert torch.equal(halves[index // 2, :, :, index % 2], shown)


def test_the_reference_runs_on_a_prompt_without_pictures(bench: Bench) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(bench.folder, dtype=torch.float32)
    prompt = prepare(bench.folder, bench.processor, Question("Hello", ()))
    trace = run_reference(model, prompt)
    assert trace["positions"].tolist() == [list(range(len(prompt.ids)))] * 3
    assert trace["logits"].shape == (len(prompt.ids), bench.processor.config.text.vocab_size)
