"""Peers of the suites: OCR programs where text is read, image features where a picture is named.

A peer that is absent on this machine is left out with a note: its scores of earlier runs are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import metadata

from harness.ocr_peers import find_ocr_peers
from harness.picture_peers import PARTS, STYLES, NearestName, build_peers
from harness.suite_runs import SuiteRun
from qwen2vl.errors import ConfigError
from qwen2vl.eval.runner.run import Answerer
from qwen2vl.eval.suites.suite import Suite

__all__ = ["peer_runs"]

OCR_SUITES = ("synthetic", "lines", "any-size")
PICTURE_COLUMNS = {"efficientnet": "EfficientNet-Lite0", "pixels": "pixels"}


def peer_runs(suite: Suite) -> Iterator[SuiteRun]:
    """Return the runs of all peers that can answer parts of a suite."""
    if suite.name == "named-pictures":
        yield from _picture_runs()
        return
    if suite.name not in OCR_SUITES:
        return
    peers, absent = find_ocr_peers(suite.parts)
    for reason in absent:
        print(f"{suite.name}: {reason}", file=sys.stderr)
    for peer in peers:
        yield SuiteRun(
            name=peer.name,
            column=peer.program,
            identity=peer.identity,
            open_answerer=peer.open_answerer,
            parts=peer.parts,
        )


def _picture_runs() -> Iterator[SuiteRun]:
    try:
        peers = _picture_peers()
    except ConfigError as error:
        print(f"named-pictures: image features are left out: {error}", file=sys.stderr)
        return
    for name, column in PICTURE_COLUMNS.items():
        identity = {"name": name, "styles": list(STYLES), "torch": metadata.version("torch")}
        yield SuiteRun(
            name=name,
            column=column,
            identity=identity,
            open_answerer=_answerer_of(peers[name]),
            parts=PARTS,
        )


@cache
def _picture_peers() -> Mapping[str, NearestName]:
    return build_peers()


def _answerer_of(peer: NearestName) -> Callable[[str], Answerer]:
    return lambda part: peer
