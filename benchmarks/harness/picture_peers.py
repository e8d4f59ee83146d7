"""Peers of the suite named-pictures: the most similar of named pictures in the training styles.

    peers = build_peers()                                 {"efficientnet": ..., "pixels": ...}
    run_items(suite, items, peers["pixels"], results)     as a model does

efficientnet: cosine similarity of EfficientNet-Lite0's features with the mean of each name over the
styles. pixels: correlation of colors at 24 x 24 pixels with the nearest picture. An open question
is answered with the most similar of all names, one with options with the most similar of these.
Both see only the whole picture, so that they answer the parts of single icons (`PARTS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from harness.efficientnet import SIDE, load_efficientnet, preprocess
from qwen2vl.eval.runner.run import SuiteAnswer
from qwen2vl.eval.task import Messages
from qwen2vl.synth.compositing import Composite, Icon, draw_composite, icon_names

__all__ = [
    "PARTS",
    "STYLES",
    "NearestName",
    "build_peers",
    "normalize_rows",
    "parse_options",
    "pixel_features",
]

STYLES = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1")
TEST_STYLES = ("openmoji", "emojione", "emojione_v1")
PARTS = (*TEST_STYLES, *(f"{style}_choice" for style in TEST_STYLES))

PIXELS = 24  # a side
BATCH = 32
CANVAS, ICON_BOX = 224, (8, 8, 216, 216)  # of the suite's pictures
OPTIONS = re.compile(r"Which of these is it: (.+) or (.+)\?")

Image3 = NDArray[np.uint8]  # (H, W, 3)
Rows = NDArray[np.float32]  # (N, D), of norm 1
Embed = Callable[[Sequence[Image3]], Rows]


class NearestName:
    """Answers by the name of the most similar prototype. (Implements Answerer.)"""

    def __init__(self, embed: Embed, prototypes: Rows, names: Sequence[str]) -> None:
        """Keep prototypes.

        Args:
            embed: N images -> (N, D) rows of norm 1.
            prototypes: (P, D) rows of norm 1.
            names: of the P prototypes; a name may have several.
        """
        assert len(prototypes) == len(names), "every prototype has a name"
        self._embed = embed
        self._prototypes = prototypes
        self._names = tuple(names)

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer questions about one image each, in their order."""
        prompts = [_read_message(messages) for messages in batch]
        features = self._embed([image for image, _ in prompts])
        similarities = features @ self._prototypes.T
        answers: list[SuiteAnswer] = []
        for row, (_, question) in zip(similarities, prompts, strict=True):
            answers.append(SuiteAnswer(text=self._best_name(row, parse_options(question))))
            on_answer()
        return answers

    def _best_name(self, similarities: NDArray[np.float32], options: Sequence[str]) -> str:
        """Return the name of the most similar prototype, among the options if there are any."""
        order = np.argsort(-similarities, kind="stable")
        fitting = (self._names[i] for i in order if not options or self._names[i] in options)
        return next(fitting, "")


def build_peers(side: int = SIDE) -> dict[str, NearestName]:
    """Build both peers from the training styles; it takes minutes.

    Args:
        side: pixels of the network's input.

    Raises:
        DatasetNotFoundError: named-pictures or efficientnet-lite0 is not on this machine.
    """
    embed = efficientnet_features(side)
    names: list[str] = []
    features: list[Rows] = []
    pixels: list[Rows] = []
    pictures = _training_pictures()
    while batch := list(islice(pictures, BATCH)):
        names += [name for name, _ in batch]
        images = [image for _, image in batch]
        features.append(embed(images))
        pixels.append(pixel_features(images))
    means, distinct = mean_by_name(np.concatenate(features), names)
    return {
        "efficientnet": NearestName(embed, means, distinct),
        "pixels": NearestName(pixel_features, np.concatenate(pixels), names),
    }


def efficientnet_features(side: int = SIDE) -> Embed:
    """Load the network, and return the function from images to normalized features."""
    model = load_efficientnet()

    def embed(images: Sequence[Image3]) -> Rows:
        with torch.inference_mode():
            return normalize_rows(model.features(preprocess(images, side)).numpy())

    return embed


def pixel_features(images: Sequence[Image3]) -> Rows:
    """Return colors at 24 x 24 pixels, minus their mean: products of rows are correlations."""
    small = [
        np.asarray(Image.fromarray(image).resize((PIXELS, PIXELS), Image.Resampling.BOX))
        for image in images
    ]
    flat = np.stack(small).reshape(len(small), -1).astype(np.float32)
    return normalize_rows(flat - flat.mean(1, keepdims=True))


def mean_by_name(rows: Rows, names: Sequence[str]) -> tuple[Rows, list[str]]:
    """Return the normalized mean of the rows of each name, and the names in their first order."""
    distinct = list(dict.fromkeys(names))
    own = np.array(names)
    return normalize_rows(np.stack([rows[own == name].mean(0) for name in distinct])), distinct


def normalize_rows(rows: NDArray[np.float32]) -> Rows:
    """Divide rows by their norms; rows of zeros, as of one color, stay zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def parse_options(question: str) -> list[str]:
    """Return the names that a question lists: [] of an open one."""
    match = OPTIONS.fullmatch(question)
    return [*match[1].split(", "), match[2]] if match else []


def _training_pictures() -> Iterator[tuple[str, Image3]]:
    """Yield every training picture of the basic names, drawn as those of the suite are."""
    for icon in icon_names().values():
        for style in STYLES if icon.is_basic else ():
            if style in icon.icons:
                layer = Icon(style=style, name=icon.name, box=ICON_BOX)
                picture = Composite(width=CANVAS, height=CANVAS, layers=(layer,))
                yield icon.name, draw_composite(picture)


def _read_message(messages: Messages) -> tuple[Image3, str]:
    """Return the image and the question of an item."""
    image, text = messages[0]["content"]
    return image["image"], text["text"]
