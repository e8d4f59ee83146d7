"""OCR programs as answerers of suites: Tesseract and PP-OCRv6, each at two scales.

    peers, absent = find_ocr_peers(["latin", "greek"])
    run_items(suite, suite.items(["latin"]), peers[0].open_answerer("latin"), results)

They answer parts that ask for one line of text: all of `lines`, `text*` of synthetic, `line_*` of
any-size. A peer reads the same pixels at 1x, and enlarged by bicubic interpolation at 2x; its
better scale counts, by part (`better_scale`).

Tesseract has a model for each language; CI installs `tesseract-ocr`, which has English. Others are
packages of Debian: tesseract-ocr-tha (Thai), and likewise ell heb ara kor jpn chi-sim chi-tra hin
mar nep tam khm mya amh script-latn script-cyrl script-beng. PP-OCRv6 has one model, for Latin
letters, Chinese and Japanese: `qwen2vl fetch-data rapidocr`, `pip install onnxruntime`.
"""

from __future__ import annotations

import os
import subprocess
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen2vl.errors import ConfigError
from qwen2vl.eval.runner.run import Answerer, SuiteAnswer
from qwen2vl.eval.task import ExampleResult, Messages, TaskResults
from qwen2vl.fetch import dataset_folder, is_fetched

__all__ = [
    "LANGUAGES",
    "SCALES",
    "OcrPeer",
    "PaddleAnswerer",
    "TesseractAnswerer",
    "better_scale",
    "crop_to_ink",
    "ctc_greedy_decode",
    "find_ocr_peers",
    "prepare_line",
    "select_languages",
]

SCALES = (1, 2)
TESSERACT, PADDLE = "Tesseract", "PP-OCRv6"

# Part -> models of Tesseract, the best one first: the first whose files are all installed is used.
# "Latin", "Cyrillic" and "Bengali" are models of a script, which read several languages.
LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "text*": ("eng",),  # of synthetic
    "line_*": ("eng",),  # of any-size
    "latin": ("eng",),
    "digits": ("eng",),
    "latin_accents": ("Latin", "deu+fra+spa+pol+ces+tur"),
    "greek": ("ell", "Greek"),
    "cyrillic": ("Cyrillic", "rus+ukr+bul+srp+mkd", "rus"),
    "hebrew": ("heb", "Hebrew"),
    "arabic": ("ara", "Arabic"),
    "hangul": ("kor", "Hangul"),
    "japanese": ("jpn", "Japanese"),
    "han": ("chi_sim+chi_tra", "HanS+HanT"),
    "devanagari": ("hin+mar+nep", "Devanagari", "hin"),
    "bengali": ("Bengali", "ben+asm", "ben"),
    "tamil": ("tam", "Tamil"),
    "thai": ("tha", "Thai"),  # codespell:ignore tha
    "khmer": ("khm", "Khmer"),
    "myanmar": ("mya", "Myanmar"),
    "ethiopic": ("amh", "Ethiopic"),
}
PADDLE_PARTS = ("text*", "line_*", "latin", "latin_accents", "digits", "japanese", "han")
WITHOUT_SPACES = ("han", "japanese")  # their lines have none, and Tesseract adds some
IN_LARGE_PICTURES = ("line_*", "text_odd_aspect")  # cropped to the line, for which these are made

RECOGNITION_MODEL = "models/PP-OCRv6_rec_small.onnx"
PADDLE_HEIGHT, PADDLE_MIN_WIDTH = 48, 320  # pixels; narrower lines are padded with gray
BLANK = 0  # class of CTC

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class OcrPeer:
    """A program at one scale."""

    name: str  # "tesseract-2x"
    program: str  # "Tesseract"
    scale: int
    identity: Mapping[str, Any]  # what decides on its answers, for the header of a results file
    open_answerer: Callable[[str], Answerer]  # of a part
    parts: tuple[str, ...]  # that it can read


def find_ocr_peers(parts: Sequence[str]) -> tuple[list[OcrPeer], list[str]]:
    """Return what can read some parts on this machine, and why a program or a part is left out.

    No peer answers, without a reason, parts that ask for no line of text; nor does PP-OCRv6 those
    of scripts that its alphabet lacks.
    """
    peers, absent = _tesseract_peers([part for part in parts if _models_of(part)])
    known = [part for part in parts if _matches(part, PADDLE_PARTS)]
    if known and (reason := _missing_paddle()):
        absent.append(f"{PADDLE} is left out: {reason}")
    elif known:
        peers += _paddle_peers(known)
    return peers, absent


def select_languages(part: str, installed: frozenset[str]) -> str | None:
    """Return the models with which Tesseract reads a part, or None where none of them is installed.

    Args:
        part: name of it.
        installed: names of models, as `tesseract --list-langs` lists them.
    """
    return next((m for m in _models_of(part) if installed.issuperset(m.split("+"))), None)


def better_scale(runs: Mapping[int, Sequence[ExampleResult]]) -> int:
    """Return the scale with the lowest character error rate; of equal ones, the smallest.

    Args:
        runs: scale -> results of the same lines.
    """
    return min(sorted(runs), key=lambda scale: _character_error_rate(runs[scale]))


class TesseractAnswerer:
    """Tesseract in single-line mode (--psm 7), one process for a batch. (Implements Answerer.)"""

    def __init__(self, languages: str, scale: int = 1, part: str = "") -> None:
        """Take the models, such as "hin+mar", the scale, and the part whose lines are read."""
        self._languages, self._scale, self._part = languages, scale, part

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer a batch; each message has one image.

        Raises:
            RuntimeError: the program failed.
        """
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{index:03d}.png" for index in range(len(batch))]
            for path, messages in zip(paths, batch, strict=True):
                _enlarge(_image_of(messages, self._part), self._scale).save(path)
            pages = _run_tesseract(Path(folder), paths, self._languages)
        answers = []
        for page in pages:
            answers.append(SuiteAnswer(text=_normalize(page, self._part)))
            on_answer()
        return answers


class PaddleAnswerer:
    """The recognition model of PP-OCRv6 on one line, with onnxruntime. (Implements Answerer.)"""

    def __init__(self, scale: int = 1, part: str = "") -> None:
        """Take the scale, and the part whose lines are read."""
        self._scale, self._part = scale, part

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer a batch; each message has one image.

        Raises:
            DatasetNotFoundError: the dataset rapidocr is not on this machine.
        """
        session, alphabet = _open_recognition()
        answers = []
        for messages in batch:
            image = _enlarge(_image_of(messages, self._part), self._scale)
            (scores_1TV,) = session.run(None, {"x": prepare_line(image)})
            text = ctc_greedy_decode(scores_1TV[0].argmax(-1), alphabet)
            answers.append(SuiteAnswer(text=_normalize(text, self._part)))
            on_answer()
        return answers


def ctc_greedy_decode(classes_T: Sequence[int] | NDArray[Any], alphabet: Sequence[str]) -> str:
    """Join the characters of the best classes of all steps: repetitions count once, blanks nothing.

    Args:
        classes_T: of each step.
        alphabet: character of each class; that of the blank is not read.
    """
    classes = [int(one) for one in classes_T]
    previous = [BLANK, *classes]
    return "".join(
        alphabet[now]
        for before, now in zip(previous, classes, strict=False)
        if now not in (before, BLANK)
    )


def prepare_line(image: Image.Image) -> NDArray[np.float32]:
    """Preprocess a line as PaddleOCR does: (1, 3, 48, width), BGR between -1 and 1, padded by 0."""
    width = max(1, -(-PADDLE_HEIGHT * image.width // image.height))
    resized = image.resize((width, PADDLE_HEIGHT), Image.Resampling.BILINEAR)
    line_CHW = (np.asarray(resized, np.float32) / 127.5 - 1)[:, :, ::-1].transpose(2, 0, 1)
    padding = max(0, PADDLE_MIN_WIDTH - width)
    return np.ascontiguousarray(np.pad(line_CHW, ((0, 0), (0, 0), (0, padding)))[None])


def crop_to_ink(pixels_HWC: Pixels, margin: int = 8) -> Pixels:
    """Crop a picture of one line on a plain or faintly textured ground.

    Ink is what differs from the median shade by at least half of the largest difference.
    """
    gray_HW = pixels_HWC.astype(np.float32).mean(axis=2)
    difference_HW = np.abs(gray_HW - np.median(gray_HW))
    if not difference_HW.any():
        return pixels_HWC
    rows, columns = np.nonzero(difference_HW >= difference_HW.max() / 2)
    top, left = max(0, rows.min() - margin), max(0, columns.min() - margin)
    return pixels_HWC[top : rows.max() + margin + 1, left : columns.max() + margin + 1]


def _tesseract_peers(parts: Sequence[str]) -> tuple[list[OcrPeer], list[str]]:
    if not parts:
        return [], []
    try:
        version, installed = _tesseract()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"it cannot be run ({error}); apt-get install tesseract-ocr"
        return [], [f"{TESSERACT} is left out: {reason}"]
    models = {part: select_languages(part, installed) for part in parts}
    known = {part: model for part, model in models.items() if model is not None}
    absent = [
        f"{TESSERACT} is left out of {part}: no model {' or '.join(_models_of(part))}; "
        "apt-get install tesseract-ocr-LANGUAGE"
        for part in parts
        if part not in known
    ]
    peers = [
        OcrPeer(
            name=f"tesseract-{scale}x",
            program=TESSERACT,
            scale=scale,
            identity={"name": f"tesseract-{scale}x", "version": version, "languages": known},
            open_answerer=lambda part, scale=scale: TesseractAnswerer(known[part], scale, part),
            parts=tuple(known),
        )
        for scale in SCALES
    ]
    return (peers if known else []), absent


def _paddle_peers(parts: Sequence[str]) -> list[OcrPeer]:
    import onnxruntime

    return [
        OcrPeer(
            name=f"pp-ocrv6-{scale}x",
            program=PADDLE,
            scale=scale,
            identity={
                "name": f"pp-ocrv6-{scale}x",
                "version": onnxruntime.__version__,
                "model": RECOGNITION_MODEL,
            },
            open_answerer=lambda part, scale=scale: PaddleAnswerer(scale, part),
            parts=tuple(parts),
        )
        for scale in SCALES
    ]


def _missing_paddle() -> str:
    """Return why the model cannot be run, or nothing."""
    if not is_fetched("rapidocr"):
        return "the dataset is absent; qwen2vl fetch-data rapidocr"
    return "" if find_spec("onnxruntime") else "onnxruntime is absent; pip install onnxruntime"


def _models_of(part: str) -> tuple[str, ...]:
    return next((models for name, models in LANGUAGES.items() if _matches(part, (name,))), ())


def _matches(part: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for pattern in patterns)


@cache
def _tesseract() -> tuple[str, frozenset[str]]:
    """Return the version and the installed models."""

    def run(option: str) -> list[str]:
        command = ["tesseract", option]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    return run("--version")[1], frozenset(run("--list-langs"))


def _run_tesseract(folder: Path, paths: Sequence[Path], languages: str) -> list[str]:
    """Read images, each a line, and return their texts."""
    listed = folder / "images.txt"
    listed.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    done = subprocess.run(
        ["tesseract", listed, "stdout", "--psm", "7", "-l", languages],
        capture_output=True,
        # On images of one line it is slower with its own threads.
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
    )
    pages = done.stdout.decode("utf-8").split("\f")
    if done.returncode or len(pages) != len(paths):
        errors = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise RuntimeError(
            f"tesseract -l {languages}: {len(pages)} texts of {len(paths)} images, exit status "
            f"{done.returncode}: {' '.join(errors)}"
        )
    return pages


@cache
def _open_recognition() -> tuple[Any, list[str]]:
    """Open the model, with one thread; its alphabet is in the file: blank, characters, space."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(dataset_folder("rapidocr") / RECOGNITION_MODEL),
        options,
        providers=["CPUExecutionProvider"],
    )
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    alphabet = ["", *characters, " "]
    num_classes = session.get_outputs()[0].shape[-1]
    if num_classes != len(alphabet):
        raise ConfigError(
            f"{RECOGNITION_MODEL}: {num_classes} classes, but {len(alphabet)} characters with the "
            "blank and the space; fetch rapidocr again"
        )
    return session, alphabet


def _image_of(messages: Messages, part: str) -> Image.Image:
    (pixels_HWC,) = [item["image"] for item in messages[0]["content"] if item["type"] == "image"]
    if _matches(part, IN_LARGE_PICTURES):
        pixels_HWC = crop_to_ink(pixels_HWC)
    return Image.fromarray(pixels_HWC)


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    size = (scale * image.width, scale * image.height)
    return image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)


def _normalize(text: str, part: str) -> str:
    """Write a text as the suites do: NFC, single spaces, no invisible directions or joiners."""
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    separator = "" if part in WITHOUT_SPACES else " "
    return separator.join(unicodedata.normalize("NFC", visible).split())


def _character_error_rate(results: Sequence[ExampleResult]) -> float:
    rate = TaskResults(task="", note="", results=tuple(results)).character_error_rate
    assert rate is not None, "lines of text have an edit distance"
    return rate
