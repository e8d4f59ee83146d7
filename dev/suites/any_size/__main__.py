"""Writes the file of the frozen suite `any-size`: python -m dev.suites.any_size.

Running it again after qwen2vl.synth has changed may give another suite, which invalidates all
earlier scores.
"""

from __future__ import annotations

from dev.suites.any_size import freeze

if __name__ == "__main__":
    freeze()
