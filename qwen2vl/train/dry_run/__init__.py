"""Dry runs: what a training run would read, compute and allocate, without loading weights.

`report.py` checks data and settings; `memory.py` and `activation_memory.py` estimate bytes per rank.
"""
