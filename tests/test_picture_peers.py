"""Peers of the suite named-pictures: the network's shapes, options of a question, nearest names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.eval.suites.registry import open_suite
from qwen2vl.eval.task import ExampleResult, Messages, TaskResults
from qwen2vl.fetch import dataset_folder
from tests.requirements import needs_dataset

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RED, BLUE = (np.full((30, 40, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def network() -> Any:
    return import_module("harness.efficientnet")


@pytest.fixture
def peers() -> Any:
    return import_module("harness.picture_peers")


def ask(image: np.ndarray[Any, Any], question: str) -> Messages:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_network_has_the_published_size_and_shapes(network: Any) -> None:
    model = network.EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    images = network.preprocess([RED, BLUE])
    assert images.shape == (2, 3, 224, 224)
    assert torch.allclose(images[0, :, 0, 0], torch.tensor([73.0, -127.0, -127.0]) / 128)
    with torch.inference_mode():
        assert model.features(images).shape == (2, network.FEATURES)
        assert model(images[:, :, :33, :47]).shape == (2, 1000)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(224, 3, 2, (0, 1)), (113, 3, 2, (1, 1)), (14, 5, 1, (2, 2)), (56, 5, 2, (1, 2))],
)
def test_padding_is_that_of_tensorflow(
    network: Any, size: int, kernel: int, stride: int, padding: tuple[int, int]
) -> None:
    conv = network.SameConv2d(1, 1, kernel, stride)
    torch.nn.init.ones_(conv.weight)
    out = conv(torch.ones(1, 1, size, size))
    assert out.shape[-1] == -(-size // stride)
    corners = (kernel - padding[0]) ** 2, (kernel - padding[1]) ** 2
    assert (out[0, 0, 0, 0].item(), out[0, 0, -1, -1].item()) == corners


@needs_dataset("efficientnet-lite0")
@needs_dataset("photos")
def test_weights_classify_photos(network: Any) -> None:
    model = network.load_efficientnet()
    photos = [
        np.array(Image.open(dataset_folder("photos") / name).convert("RGB"))
        for name in ("chelsea.png", "coffee.png")
    ]
    with torch.inference_mode():
        probabilities = model(network.preprocess(photos)).softmax(-1)
    cats, espresso = range(281, 286), 967  # classes of ImageNet
    assert probabilities[0].argmax().item() in cats
    assert probabilities[1, espresso].item() == pytest.approx(0.90, abs=0.01)


def test_options_of_a_question(peers: Any) -> None:
    question = "Which of these is it: jack-o-lantern, T-Rex, hot dog or snow-capped mountain?"
    expected = ["jack-o-lantern", "T-Rex", "hot dog", "snow-capped mountain"]
    assert peers.parse_options(question) == expected
    assert peers.parse_options("What is this? Answer with its name only.") == []


def test_options_of_the_suite_are_all_names(peers: Any) -> None:
    names = {icon.name for icon in peers.icon_names().values() if icon.is_basic}
    suite = open_suite("named-pictures")
    for item in suite.items(peers.PARTS):
        options = peers.parse_options(item.question)
        assert len(options) == (4 if item.part.endswith("_choice") else 0)
        assert set(options) <= names
        assert not options or item.answers[0] in options


def test_nearest_name_of_all_or_of_the_options(peers: Any) -> None:
    def embed(images: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        return peers.normalize_rows(np.stack([i.mean((0, 1)) for i in images]).astype(np.float32))

    prototypes = embed([RED, BLUE, RED // 2 + BLUE // 4])
    peer = peers.NearestName(embed, prototypes, ["tomato", "whale", "plum"])
    batch = [
        ask(RED, "What is this? Answer with its name only."),
        ask(BLUE, "Which of these is it: tomato, pear, lemon or plum?"),
        ask(RED, "Which of these is it: pear, lemon, apple or fig?"),
    ]
    counted: list[int] = []
    answers = peer.answer(batch, lambda: counted.append(1))
    assert [answer.text for answer in answers] == ["tomato", "plum", ""]
    assert len(counted) == 3


def test_pixel_features_ignore_brightness(peers: Any) -> None:
    gradient = np.tile(np.arange(0, 120, 3, dtype=np.uint8)[None, :, None], (30, 1, 3))
    rows = peers.pixel_features([gradient, gradient + 100, gradient[:, ::-1], RED * 0])
    assert rows.shape == (4, 24 * 24 * 3)
    assert rows[0] @ rows[1] == pytest.approx(1, abs=1e-4)
    assert rows[0] @ rows[2] == pytest.approx(-1, abs=1e-2)
    assert np.array_equal(rows[3], np.zeros_like(rows[3]))  # of one color


def test_mean_by_name(peers: Any) -> None:
    rows = np.array([[1, 0], [0, 1], [0, -1]], np.float32)
    means, names = peers.mean_by_name(rows, ["ant", "bee", "ant"])
    assert names == ["ant", "bee"]
    assert np.allclose(means, [[0.5**0.5, -(0.5**0.5)], [0, 1]])


def test_table_has_accuracies_and_intervals() -> None:
    results = TaskResults(
        task="openmoji", note="", results=tuple(example(score) for score in (1.0, 0.0, 0.0, 0.0))
    )
    table = import_module("named_pictures_peers").format_table({"openmoji": {"pixels": results}})
    header, row = table.splitlines()
    assert header.split() == ["part", "items", "pixels"]
    assert row.split() == ["openmoji", "4", "25.0", "%", "(4.6", "to", "69.9)"]


def example(score: float) -> ExampleResult:
    return ExampleResult(
        name="openmoji/000",
        part="openmoji",
        kind="open",
        question="What is this?",
        truth="owl",
        answer="owl",
        score=score,
        chance=0.0,
    )
