"""Writes the file of the frozen suite `clips`: python -m dev.suites.clips.

Running it again after qwen2vl.synth has changed may give another suite, which invalidates all
earlier scores.
"""

from __future__ import annotations

from dev.suites.clips import freeze

if __name__ == "__main__":
    freeze()
