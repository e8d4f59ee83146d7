"""Generators of the frozen suites, which have written their files in qwen2vl/eval/suites/ once.

    python -m dev.suites.honesty      writes qwen2vl/eval/suites/frozen/honesty.jsonl

A suite is sampled by a fixed seed, before anything is trained for it. Running a generator again
after it, or qwen2vl.synth, has changed gives another suite and invalidates all earlier scores;
tests check the SHA-256 of the files. `FROZEN` is their folder.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FROZEN"]

FROZEN = Path(__file__).resolve().parents[2] / "qwen2vl" / "eval" / "suites" / "frozen"
