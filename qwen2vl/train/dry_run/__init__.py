"""Dry runs: what a training run would read, compute and allocate, without loading weights.

`report.py` checks config and data; `memory.py` and `activation_memory.py` estimate bytes per rank.
"""
