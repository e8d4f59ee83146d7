"""PBM, PGM and PPM files for tests: plain and binary, of every largest value."""

from __future__ import annotations

import numpy as np


def pnm(kind: int, values: np.ndarray, most: int | None) -> bytes:
    """Write a file of one of the kinds P1 to P6, with a comment."""
    head = f"P{kind}\n# made by a test\n{values.shape[1]} {values.shape[0]}\n"
    if most is not None:
        head += f"{most}\n"
    if kind < 4:
        return head.encode() + " ".join(map(str, values.ravel())).encode() + b"\n"
    if most is None:
        return head.encode() + np.packbits(values[..., 0].astype(bool), axis=1).tobytes()
    return head.encode() + values.astype(">u2" if most > 255 else "u1").tobytes()
