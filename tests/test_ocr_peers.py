"""OCR programs as answerers: decoding, models by part, the better scale, the table, real runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl.eval.suites.registry import open_suite
from qwen2vl.eval.task import ExampleResult, Messages
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.spec import Line
from tests.requirements import needs_dataset, needs_tesseract

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
WORDS = ("Green apple", "north wind", "Open window")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def ocr() -> Any:
    return import_module("harness.ocr_peers")


def message(pixels_HWC: np.ndarray) -> Messages:
    content = [{"type": "image", "image": pixels_HWC}, {"type": "text", "text": "Read the text."}]
    return [{"role": "user", "content": content}]


def line(text: str, width: int = 300, height: int = 60) -> np.ndarray:
    """Draw a line in a bundled face."""
    picture = Line(
        width=width,
        height=height,
        text=text,
        font="Caladea-Regular.ttf",
        size=28,
        x=12,
        y=40,
        ink=(0, 0, 0),
        ground=(255, 255, 255),
    )
    return draw_image(picture)


def result(edits: int, length: int, name: str = "latin/000", part: str = "latin") -> ExampleResult:
    return ExampleResult(
        name=name,
        part=part,
        kind="en",
        question="Read the text.",
        truth="x" * length,
        answer="",
        score=float(not edits),
        chance=0.0,
        edits=edits,
        length=length,
    )


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        ([0, 1, 1, 0, 2, 2, 2], "ab"),
        ([1, 0, 1], "aa"),  # a blank separates equal characters
        ([1, 3, 2, 0, 0], "a b"),
        ([0, 0], ""),
        ([], ""),
    ],
)
def test_ctc_drops_repetitions_and_blanks(ocr: Any, classes: list[int], text: str) -> None:
    assert ocr.ctc_greedy_decode(np.array(classes, dtype=np.int64), ["", "a", "b", " "]) == text


@pytest.mark.parametrize(
    ("part", "installed", "models"),
    [
        ("latin", "eng osd", "eng"),
        ("text_2x", "eng", "eng"),
        ("line_64x64", "eng", "eng"),
        ("latin_accents", "Latin deu fra", "Latin"),
        ("latin_accents", "deu fra spa pol ces tur", "deu+fra+spa+pol+ces+tur"),
        ("han", "chi_sim HanS HanT", "HanS+HanT"),  # not all of the first choice
        ("greek", "eng osd", None),
        ("counting", "eng", None),
    ],
)
def test_a_part_is_read_with_the_best_models(
    ocr: Any, part: str, installed: str, models: str | None
) -> None:
    assert ocr.select_languages(part, frozenset(installed.split())) == models


def test_every_part_of_lines_has_models(ocr: Any) -> None:
    everything = frozenset("+".join(m for ms in ocr.LANGUAGES.values() for m in ms).split("+"))
    parts = open_suite("lines").parts
    assert not [part for part in parts if ocr.select_languages(part, everything) is None]


def test_the_better_scale_has_fewer_errors_per_character(ocr: Any) -> None:
    """Lines weigh by their length: at 1x more lines are right, at 2x more characters."""
    at_1x = [result(0, 2), result(0, 2), result(10, 20)]
    at_2x = [result(1, 2), result(1, 2), result(0, 20)]
    assert ocr.better_scale({1: at_1x, 2: at_2x}) == 2
    assert ocr.better_scale({2: at_1x, 1: at_1x}) == 1


def test_a_line_is_cropped_from_a_large_picture(ocr: Any) -> None:
    pixels = np.random.default_rng(0).integers(200, 212, (300, 400, 3), dtype=np.uint8)
    pixels[100:120, 150:250] = 10
    assert ocr.crop_to_ink(pixels, margin=8).shape == (36, 116, 3)
    assert (ocr.crop_to_ink(pixels, margin=0) == 10).all()
    plain = np.full((5, 6, 3), 7, dtype=np.uint8)
    assert ocr.crop_to_ink(plain).shape == plain.shape


def test_a_line_is_prepared_as_paddleocr_does(ocr: Any) -> None:
    red = Image.new("RGB", (40, 24), (255, 0, 0))
    prepared = ocr.prepare_line(red)
    assert prepared.shape == (1, 3, 48, 320) and prepared.dtype == np.float32
    assert prepared[0, :, 0, 0].tolist() == [-1, -1, 1]  # BGR
    assert (prepared[..., 80:] == 0).all() and (prepared[..., :80] != 0).all()
    assert ocr.prepare_line(Image.new("RGB", (401, 24))).shape == (1, 3, 48, 802)


@pytest.mark.parametrize(("scale", "size"), [(1, (30, 20)), (2, (60, 40))])
def test_tesseract_reads_enlarged_pictures_and_its_answer_is_normalized(
    ocr: Any, monkeypatch: pytest.MonkeyPatch, scale: int, size: tuple[int, int]
) -> None:
    def run(folder: Path, paths: Sequence[Path], languages: str) -> list[str]:
        assert languages == "jpn" and [Image.open(path).size for path in paths] == [size] * 2
        return ["か\u3099 い\u200f\n\n", ""]

    monkeypatch.setattr(ocr, "_run_tesseract", run)
    batch = [message(np.zeros((20, 30, 3), dtype=np.uint8))] * 2
    calls: list[int] = []
    answerer = ocr.TesseractAnswerer("jpn", scale, "japanese")
    answers = answerer.answer(batch, lambda: calls.append(1))
    assert [answer.text for answer in answers] == ["がい", ""] and len(calls) == 2


def test_absent_programs_are_named_with_their_remedy(
    ocr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise FileNotFoundError("tesseract")

    monkeypatch.setattr(ocr, "_tesseract", fail)
    monkeypatch.setattr(ocr, "is_fetched", lambda name: False)
    peers, absent = ocr.find_ocr_peers(["latin"])
    assert not peers
    assert "apt-get install tesseract-ocr" in absent[0]
    assert absent[1].endswith("qwen2vl fetch-data rapidocr")
    assert ocr.find_ocr_peers(["counting"]) == ([], [])


def test_peers_are_listed_with_the_parts_they_read(
    ocr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr, "_tesseract", lambda: ("5.3.0", frozenset({"eng"})))
    monkeypatch.setattr(ocr, "is_fetched", lambda name: False)
    peers, absent = ocr.find_ocr_peers(["latin", "greek", "find"])
    assert [(p.name, p.scale, p.parts) for p in peers] == [
        ("tesseract-1x", 1, ("latin",)),
        ("tesseract-2x", 2, ("latin",)),
    ]
    assert peers[1].open_answerer("latin")._scale == 2
    assert "out of greek: no model ell or Greek" in absent[0] and len(absent) == 2


@needs_tesseract
def test_tesseract_reads_a_batch_as_it_reads_single_lines(ocr: Any) -> None:
    """Pictures without text, also some that are too small, do not shift the answers."""
    batch = [message(line(text)) for text in WORDS]
    batch.insert(1, message(np.full((60, 300, 3), 255, dtype=np.uint8)))
    batch.insert(2, message(np.full((2, 2, 3), 255, dtype=np.uint8)))
    answerer = ocr.TesseractAnswerer("eng", 1)
    texts = [answer.text for answer in answerer.answer(batch, lambda: None)]
    assert [texts[0], *texts[3:]] == list(WORDS)
    assert [answerer.answer([one], lambda: None)[0].text for one in batch] == texts


@needs_tesseract
def test_a_model_that_is_not_installed_is_an_error(ocr: Any) -> None:
    with pytest.raises(RuntimeError, match=r"tesseract -l nowhere: .*exit status 1"):
        ocr.TesseractAnswerer("nowhere").answer([message(line("ab"))], lambda: None)


@needs_dataset("rapidocr")
@pytest.mark.parametrize("scale", [1, 2])
def test_pp_ocr_reads_lines(ocr: Any, scale: int) -> None:
    pytest.importorskip("onnxruntime")
    answerer = ocr.PaddleAnswerer(scale, "latin")
    answers = answerer.answer([message(line(text)) for text in WORDS], lambda: None)
    assert [answer.text for answer in answers] == list(WORDS)


@needs_dataset("rapidocr")
def test_pp_ocr_finds_a_line_in_a_large_picture(ocr: Any) -> None:
    pytest.importorskip("onnxruntime")
    large = message(line(WORDS[0], width=900, height=700))
    (cropped,) = ocr.PaddleAnswerer(1, "line_1024x768").answer([large], lambda: None)
    (whole,) = ocr.PaddleAnswerer(1, "latin").answer([large], lambda: None)
    assert cropped.text == WORDS[0] != whole.text
