"""Files of the layout of Fashion-MNIST with few images, of random pixels."""

from __future__ import annotations

import gzip
from hashlib import sha256
from pathlib import Path

import numpy as np

PREFIXES = {"train": "train", "test": "t10k"}


def write_idx_files(folder: Path, *, num_images: int, split: str = "train") -> dict[str, str]:
    """Write images and labels 0, 1, ... 9, 0, ...; return the digests of the files by name."""
    pixels = np.zeros((num_images, 28, 28), np.uint8)  # with an empty margin, as the published ones
    pixels[:, 8:20, 8:20] = np.random.default_rng(5).integers(0, 256, (num_images, 12, 12))
    labels = (np.arange(num_images) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, str] = {}
    for kind, magic, values in (("images-idx3", 0x0803, pixels), ("labels-idx1", 0x0801, labels)):
        header = np.array([magic, *values.shape], ">u4").tobytes()
        content = gzip.compress(header + values.tobytes(), mtime=0)
        name = f"{PREFIXES[split]}-{kind}-ubyte.gz"
        (folder / name).write_bytes(content)
        digests[name] = sha256(content).hexdigest()
    return digests
