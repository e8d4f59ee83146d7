"""Writes the file of the frozen suite `named-pictures`: python -m dev.suites.named_pictures.

Running it again after qwen2vl.synth or the dataset has changed may give another suite, which
invalidates all earlier scores.
"""

from __future__ import annotations

from dev.suites.named_pictures import freeze

if __name__ == "__main__":
    freeze()
